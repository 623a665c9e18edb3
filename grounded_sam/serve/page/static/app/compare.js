// The view Compare: two jobs of a sweep side by side, those images first that differ most.

import * as api from "./api.js";
import { Viewer, loadImage } from "./canvas.js";
import { colorOf } from "./colors.js";
import { countOf, el, guarded, isTyping, tell } from "./dom.js";
import { drawLabels } from "./labels.js";
import { withShape } from "./objects.js";

export class CompareView {
  constructor(place, about, router) {
    [this.place, this.about, this.router] = [place, about, router];
    const find = (name) => place.querySelector(`[data-part="${name}"]`);
    this.find = find;
    this.pictures = [];
    this.index = 0;
    this.viewers = ["a", "b"].map((side) => new Viewer(find(`canvas-${side}`), { onview: (viewer) => this.follow(viewer) }));
    this.viewers.forEach((viewer, i) => (viewer.decorate = (context, unit) => this.decorate(context, unit, "ab"[i])));
    this.makeFilters(find("jobs"));
    this.list = find("pictures");
    document.addEventListener("keydown", (event) => this.keyDown(event));
  }

  makeFilters(place) {
    const onchange = () => guarded(() => this.compare());
    this.sweepSelect = el("select", { onchange: () => guarded(() => this.load()) },
      this.about.sweeps.map((name) => el("option", { value: name }, name)));
    this.jobSelects = ["a", "b"].map((side) => el("select", { onchange, "aria-label": `Job ${side.toUpperCase()}` }));
    this.onlyDifferent = el("input", { type: "checkbox", onchange: () => this.draw() });
    place.append(el("label", {}, "Sweep ", this.sweepSelect), el("label", {}, "Left ", this.jobSelects[0]),
      el("label", {}, "Right ", this.jobSelects[1]), el("label", {}, this.onlyDifferent, " only what differs"));
  }

  start() {
    if (this.about.sweeps.length) return guarded(() => this.load());
    this.place.replaceChildren(el("div", { class: "nothing" }, el("h1", {}, "No sweep to compare"),
      el("p", {}, "A sweep runs the same images with several settings. Make one, and start the server with it:"),
      el("pre", {}, "grounded-sam -m input=photos/ text=[car] output=sweep sink=coco select.score=0.2,0.4\n" +
        "grounded-sam-serve 'serve.roots=[.]' 'serve.sweeps={scores: sweep}'")));
    return undefined;
  }

  async load() {
    const table = await api.sweep(this.sweepSelect.value);
    this.showTable(table);
    const jobs = table.rows.map((row) => String(row.job));
    this.labels = new Map(table.rows.map((row) => [String(row.job), this.describe(row, table)]));
    this.jobSelects.forEach((select, i) => {
      select.replaceChildren(...jobs.map((job) => el("option", { value: job }, this.labels.get(job))));
      select.value = jobs[Math.min(i, jobs.length - 1)];
    });
    if (jobs.length > 1) await this.compare();
    else tell("This sweep has one job: there is nothing to compare it with.", "error");
  }

  describe(row, { columns, metric }) {
    const settings = columns.filter((name) => name.includes(".") && typeof row[name] === "string" && row[name]);
    const value = typeof row.metric === "number" ? `, ${metric === "metric" ? "" : `${metric} `}${row.metric.toFixed(3)}` : "";
    return `job ${row.job}: ${settings.map((name) => `${name}=${row[name]}`).join(" ")}${value}`;
  }

  showTable({ columns, rows }) {
    const text = (value) => (typeof value === "number" ? String(Math.round(value * 1000) / 1000) : value ?? "");
    this.find("table").replaceChildren(el("table", {},
      el("tr", {}, columns.map((name) => el("th", { scope: "col" }, name))),
      rows.map((row) => el("tr", {}, columns.map((name) => el("td", {}, text(row[name])))))));
  }

  async compare() {
    const [a, b] = this.jobSelects.map((select) => select.value);
    const sweep = this.sweepSelect.value;
    [this.pictures, this.next] = [[], 0];
    tell("Comparing …", "busy");
    const answer = await this.more(sweep, a, b);
    tell("");
    this.find("summary").textContent =
      `${countOf(answer.total, "image")}: ${countOf(answer.matched, "object")} in both, ` +
      `${answer.only_a} only on the left, ${answer.only_b} only on the right.`;
    ["a", "b"].forEach((side, i) => (this.find(`title-${side}`).textContent = this.labels.get([a, b][i])));
    this.list.replaceChildren();
    this.addRows(0);
    if (this.pictures.length) await this.open(0);
  }

  async more(sweep = this.sweepSelect.value, ...jobs) {
    const [a, b] = jobs.length ? jobs : this.jobSelects.map((select) => select.value);
    const answer = await api.compare(sweep, a, b, this.next);
    this.pictures.push(...answer.pictures);
    this.next = answer.next;
    return answer;
  }

  addRows(from) {
    this.pictures.slice(from).forEach((picture, i) => {
      const number = picture.only_a.length + picture.only_b.length;
      this.list.append(el("li", {
        role: "option", id: `compared-${from + i}`, "aria-selected": "false",
        onclick: () => guarded(() => this.open(from + i)),
      }, el("span", {}, picture.name), el("span", {}, number ? `${number} differ` : "same")));
    });
    this.moreRow?.remove();
    this.moreRow = null;
    if (this.next === null) return;
    this.moreRow = el("li", { role: "option", "aria-selected": "false", onclick: () => guarded(async () => {
      const start = this.pictures.length;
      await this.more();
      this.addRows(start);
    }) }, "More …");
    this.list.append(this.moreRow);
  }

  async open(index) {
    this.index = index;
    const picture = this.pictures[index];
    [...this.list.children].forEach((row, i) => row.setAttribute("aria-selected", String(i === index)));
    this.list.setAttribute("aria-activedescendant", `compared-${index}`);
    this.list.children[index].scrollIntoView({ block: "nearest" });
    const [a, b] = this.jobSelects.map((select) => select.value);
    const url = (job) => api.comparedUrl(this.sweepSelect.value, job, picture.name);
    let image = null;
    try {
      image = await loadImage(url(a)).catch(() => loadImage(url(b)));
    } catch {
      tell("The image itself cannot be read by the server (see serve.roots): masks are shown without it.", "error");
    }
    if (index !== this.index) return;
    this.picture = picture;
    const shaped = (entry) => withShape(entry, picture.width, picture.height);
    picture.shapes ??= {
      a: [...picture.matched.map((pair) => [shaped(pair.a), true]), ...picture.only_a.map((entry) => [shaped(entry), false])],
      b: [...picture.matched.map((pair) => [shaped(pair.b), true]), ...picture.only_b.map((entry) => [shaped(entry), false])],
    };
    for (const viewer of this.viewers) viewer.setPicture(image, picture.width, picture.height);
    this.draw();
  }

  get classes() {
    const { a = [], b = [] } = this.picture?.shapes || {};
    return [...new Set([...a, ...b].map(([object]) => object.class))].sort();
  }

  draw() {
    if (!this.picture) return;
    ["a", "b"].forEach((side, i) => {
      const shapes = this.picture.shapes[side].filter(([, isMatched]) => !(isMatched && this.onlyDifferent.checked));
      this.viewers[i].setShapes(shapes.map(([object, isMatched]) => {
        const color = colorOf(object.class, this.classes.indexOf(object.class));
        return { mask: object.shape, color, opacity: isMatched ? 0.35 : 0.5, line: isMatched ? null : "#ffffff", width: 3 };
      }));
    });
  }

  decorate(context, unit, side) {
    const different = (this.picture?.shapes?.[side] || []).filter(([, isMatched]) => !isMatched);
    drawLabels(context, unit, different.map(([object]) => ({
      text: `only here: ${object.class} ${object.score.toFixed(2)}`,
      box: object.box,
      color: colorOf(object.class, this.classes.indexOf(object.class)),
    })));
  }

  follow(viewer) {
    for (const other of this.viewers) if (other !== viewer) other.follow(viewer);
  }

  keyDown(event) {
    if (this.router.current !== "compare" || isTyping(event) || event.target.matches("canvas, [role=tab]")) return;
    const step = { ArrowDown: 1, ArrowUp: -1 }[event.key];
    const index = this.index + step;
    if (!step || !this.pictures[index]) return;
    event.preventDefault();
    guarded(() => this.open(index));
  }
}
