// The view Browse: the images of a store in a grid, and verdicts about their objects by keyboard.

import * as api from "./api.js";
import { Viewer, loadImage } from "./canvas.js";
import { colorOf } from "./colors.js";
import { button, el, guarded, isTyping, tell } from "./dom.js";
import { Grid } from "./grid.js";
import { drawLabels } from "./labels.js";
import { withShape } from "./objects.js";
import { Verdicts } from "./verdicts.js";

const REASONS = [
  ["", "all images"], ["uncertain", "least certain first"], ["empty", "without an object"],
  ["crowded", "most objects first"], ["alike", "look-alikes"],
];

export class BrowseView {
  constructor(place, about, router) {
    [this.place, this.about, this.router] = [place, about, router];
    const find = (name) => place.querySelector(`[data-part="${name}"]`);
    this.find = find;
    this.classes = [];
    this.picture = this.counts = null;
    this.index = this.object = this.generation = 0;
    this.store = "";
    this.filter = { class: "", reason: "", unreviewed: false };
    this.cache = new Map();
    this.viewer = new Viewer(find("canvas"));
    this.viewer.decorate = (context, unit) => this.decorate(context, unit);
    this.viewer.tool = { down: (point) => this.chooseAt(point) };
    this.verdicts = new Verdicts(() => this.store, () => router.author, (answer) => this.saved(answer));
    this.grid = new Grid(find("grid"), {
      load: (cursor) => this.loadPage(cursor),
      thumbnail: (picture) => api.thumbnailUrl(this.store, picture.id, 256),
      choose: (index) => this.open(index),
    });
    this.makeFilters(find("filters"));
    document.addEventListener("keydown", (event) => this.keyDown(event));
  }

  makeFilters(place) {
    const option = (value, text) => el("option", { value }, text);
    this.storeSelect = el("select", { onchange: () => this.reload() },
      this.about.stores.map((name) => option(name, name)));
    this.classSelect = el("select", { onchange: () => this.filterChanged("class", this.classSelect.value) });
    const reason = el("select", { onchange: () => this.filterChanged("reason", reason.value) },
      REASONS.map(([value, text]) => option(value, text)));
    const open = el("input", { type: "checkbox", onchange: () => this.filterChanged("unreviewed", open.checked) });
    this.total = el("span", { class: "quiet" });
    place.append(el("label", {}, "Store ", this.storeSelect), el("label", {}, "Class ", this.classSelect),
      el("label", {}, "Show ", reason), el("label", {}, open, " not reviewed yet"), this.total);
  }

  start() {
    if (!this.about.stores.length) {
      this.place.replaceChildren(el("div", { class: "nothing" }, el("h1", {}, "No store to browse"),
        el("p", {}, "A store holds what a run has found. Make one, and start the server with it:"),
        el("pre", {}, "grounded-sam preset=label input=photos/ text=[car] output=labels\n" +
          "grounded-sam-serve 'serve.roots=[.]' 'serve.stores={labels: labels}'")));
      return undefined;
    }
    return guarded(() => this.reload());
  }

  /** Come back to the view: what was corrected in Try is read anew. */
  shown() {
    if (!this.picture) return;
    this.cache.delete(this.picture.id);
    guarded(() => this.open(this.index));
  }

  filterChanged(key, value) {
    this.filter[key] = value;
    return guarded(() => this.reload());
  }

  async reload() {
    this.picture = null; // no key decides about what is on its way out
    await this.verdicts.settled();
    this.generation++;
    this.store = this.storeSelect.value;
    this.grid.reset({ total: 0, pictures: [] });
    this.cache.clear();
    const { generation } = this;
    const first = await this.loadPage(0);
    if (generation !== this.generation) return;
    this.showClasses();
    this.grid.reset(first);
    this.total.textContent = `${first.total.toLocaleString("en")} images`;
    if (first.total) await this.open(0);
    else this.nothing();
  }

  async loadPage(start) {
    const { unreviewed, ...filter } = this.filter;
    // Images that were reviewed in the meantime no longer pass, so that later ones have moved up.
    const read = unreviewed && start ? [...this.grid.read.values()].flat() : [];
    const cursor = start - read.filter((picture) => !picture.statuses.predicted).length;
    const page = await api.storedPictures(this.store, { ...filter, ...(unreviewed ? { unreviewed } : {}), cursor });
    this.classes = page.classes;
    this.counts = page.counts;
    this.showCounts();
    return page;
  }

  nothing() {
    this.picture = null;
    this.find("object").textContent = "No image passes these filters.";
  }

  showClasses() {
    const chosen = this.classSelect.value;
    this.classSelect.replaceChildren(el("option", { value: "" }, "any"),
      ...this.classes.map((name) => el("option", { value: name }, name)));
    this.classSelect.value = this.classes.includes(chosen) ? chosen : "";
    this.find("classes").replaceChildren(el("div", { class: "class-keys" }, ...this.classes.map((name, i) =>
      button(i < 9 ? `${i + 1} ${name}` : name, () => this.decide("relabel", name), {
        title: `This object is: ${name}`, style: { "border-left": `5px solid ${colorOf(name, i)}` },
      }))));
  }

  showCounts() {
    if (!this.counts) return;
    const { statuses, unreviewed } = this.counts;
    const { count, perMinute } = this.verdicts;
    const parts = [`${statuses.accepted} accepted`, `${statuses.rejected} rejected`, `${statuses.edited} edited`,
      `${statuses.added} added`, `${unreviewed} to review`];
    if (count) parts.push(`${count} verdicts, ${perMinute} a minute`);
    this.find("counts").replaceChildren(el("div", { class: "counts" }, ...parts.map((text) => el("span", {}, text))));
  }

  /** Read an image with its objects, once. */
  read(id) {
    if (!this.cache.has(id)) {
      if (this.cache.size > 60) this.cache.delete(this.cache.keys().next().value);
      const reading = Promise.all([
        api.storedPicture(this.store, id), loadImage(api.thumbnailUrl(this.store, id, 1600)),
      ]).then(([picture, image]) => {
        const objects = [...picture.detections, ...picture.rejected]
          .sort((a, b) => a.score - b.score)
          .map((object) => withShape(object, picture.width, picture.height));
        return { ...picture, objects, image };
      });
      reading.catch(() => this.cache.delete(id));
      this.cache.set(id, reading);
    }
    return this.cache.get(id);
  }

  async open(index) {
    const { generation } = this;
    const isCurrent = () => index === this.index && generation === this.generation;
    this.index = index;
    this.isOpening = true; // until then a verdict would be about the image before
    this.grid.setCurrent(index);
    const picture = await guarded(async () => {
      const entry = await this.grid.get(index);
      return entry && isCurrent() ? this.read(entry.id) : null;
    });
    if (!isCurrent()) return;
    this.isOpening = false;
    if (!picture) return;
    this.picture = picture;
    this.object = Math.max(0, picture.objects.findIndex((object) => object.status === "predicted"));
    this.viewer.setPicture(picture.image, picture.width, picture.height);
    this.draw();
    const next = this.grid.known(index + 1);
    if (next) this.read(next.id).catch(() => {});
  }

  get current() {
    return this.picture?.objects[this.object];
  }

  draw() {
    const { picture } = this;
    const shapes = picture.objects.map((object, i) => {
      const color = this.color(object);
      const isCurrent = i === this.object;
      const opacity = object.status === "rejected" ? 0 : isCurrent ? 0.45 : 0.25;
      return { mask: object.shape, color, opacity, line: isCurrent ? "#ffffff" : null, dashed: object.status === "rejected" };
    });
    this.viewer.setShapes(shapes);
    this.describe();
    this.showCounts();
  }

  color(object) {
    return colorOf(object.class, this.classes.indexOf(object.class));
  }

  describe() {
    const { picture, current } = this;
    const place = this.find("object");
    const title = `${picture.name}: `;
    if (!current) {
      place.replaceChildren(el("div", { class: "verdict" }, `${title}no object. `, button("Draw one in Try (E)", () => this.correct())));
      return;
    }
    const score = current.status === "added" ? "" : ` ${current.score.toFixed(2)}`;
    place.replaceChildren(el("div", { class: "verdict", "aria-live": "polite" },
      el("span", {}, `${title}object ${this.object + 1} of ${picture.objects.length}, `,
        el("strong", {}, current.class), score),
      el("span", { class: `status ${current.status}` }, current.status === "predicted" ? "not reviewed" : current.status),
      button("Accept", () => this.decide("accept"), { "aria-keyshortcuts": "a" }),
      button("Reject", () => this.decide("reject"), { "aria-keyshortcuts": "r" }),
      button("Correct in Try", () => this.correct(), { "aria-keyshortcuts": "e" })));
  }

  decorate(context, unit) {
    const { current } = this;
    if (!current) return;
    drawLabels(context, unit, [{ text: current.class, box: current.box, color: this.color(current) }]);
  }

  chooseAt([x, y]) {
    const objects = this.picture?.objects || [];
    const isUnder = ({ box }) => x >= box[0] && x < box[2] && y >= box[1] && y < box[3];
    const under = objects.filter(isUnder).sort((a, b) => a.area - b.area)[0];
    if (under) {
      this.object = objects.indexOf(under);
      this.draw();
    }
    return false;
  }

  /** Decide about the current object, and go on to the next one. */
  decide(action, name = null) {
    const { current, picture } = this;
    if (!current || this.isOpening) return picture && !this.isOpening ? this.move(1) : undefined;
    this.verdicts.add({ object: current, picture, action, name, before: { status: current.status, class: current.class } });
    this.mark(current, action, name);
    return this.next();
  }

  /** Decide about all objects of the image that nobody has decided about. */
  decideAll(action) {
    for (const object of (!this.isOpening && this.picture?.objects) || []) {
      if (object.status !== "predicted") continue;
      const before = { status: object.status, class: object.class };
      this.verdicts.add({ object, picture: this.picture, action, name: null, before });
      this.mark(object, action, null);
    }
    return this.move(1);
  }

  mark(object, action, name) {
    const status = { accept: "accepted", reject: "rejected", relabel: "edited" }[action];
    if (this.counts) {
      this.counts.statuses[object.status]--;
      this.counts.statuses[status]++;
      if (object.status === "predicted") this.counts.unreviewed--;
    }
    object.status = status;
    if (name) object.class = name;
  }

  next() {
    const { objects } = this.picture;
    const left = objects.findIndex((object, i) => i > this.object && object.status === "predicted");
    const any = left >= 0 ? left : objects.findIndex((object) => object.status === "predicted");
    if (any < 0) return this.move(1);
    this.object = any;
    this.draw();
    return undefined;
  }

  move(by) {
    const index = Math.min(Math.max(this.index + by, 0), this.grid.total - 1);
    if (index === this.index) {
      if (this.picture) this.draw();
      if (by > 0) tell("This was the last image.");
      return undefined;
    }
    return this.open(index);
  }

  moveObject(by) {
    const { length } = this.picture?.objects || [];
    if (!length) return;
    this.object = (this.object + by + length) % length;
    this.draw();
  }

  async undo() {
    const verdict = await this.verdicts.undo();
    if (!verdict) {
      tell("There is nothing to take back.");
      return;
    }
    Object.assign(verdict.object, verdict.before);
    if (this.picture === verdict.picture) {
      this.object = this.picture.objects.indexOf(verdict.object);
      this.draw();
    } else {
      const index = this.grid.indexOf(verdict.picture.id);
      if (index >= 0) await this.open(index);
      this.object = Math.max(0, this.picture.objects.indexOf(verdict.object));
      this.draw();
    }
  }

  /** Take over what the server says about the images that have changed. */
  saved(answer) {
    if (!this.verdicts.isBusy) this.counts = answer.counts;
    for (const picture of answer.pictures) this.grid.update(picture);
    this.showCounts();
  }

  async correct() {
    if (!this.picture) return;
    await this.verdicts.settled();
    await guarded(() => this.router.correct(this.store, this.picture.id, "browse"));
  }

  keyDown(event) {
    if (this.router.current !== "browse" || isTyping(event) || document.querySelector("dialog[open]")) return;
    if (!this.picture || event.target === this.viewer.canvas && event.key.startsWith("Arrow")) return;
    const { columns } = this.grid;
    const key = event.key.length === 1 ? event.key.toLowerCase() : event.key;
    const keys = {
      a: () => (event.shiftKey ? this.decideAll("accept") : this.decide("accept")),
      r: () => (event.shiftKey ? this.decideAll("reject") : this.decide("reject")),
      e: () => this.correct(), u: () => this.undo(), n: () => this.moveObject(1), p: () => this.moveObject(-1),
      ArrowRight: () => this.move(1), ArrowLeft: () => this.move(-1),
      ArrowDown: () => this.move(columns), ArrowUp: () => this.move(-columns),
    };
    if (event.target.matches("[role=tab]") && key.startsWith("Arrow")) return;
    const digit = /^[1-9]$/.test(key) ? this.classes[Number(key) - 1] : null;
    const action = digit ? () => this.decide("relabel", digit) : keys[key];
    if (!action) return;
    event.preventDefault();
    guarded(async () => action());
  }
}
