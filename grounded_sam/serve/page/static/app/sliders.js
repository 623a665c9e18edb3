// Sliders of the selection, each with a histogram of the candidates.

import { el } from "./dom.js";
import { overlaps } from "./selection.js";

const BINS = 40;
const [WIDTH, HEIGHT] = [240, 26];

function histogram(values, canvas) {
  const counts = new Array(BINS).fill(0);
  for (const value of values) counts[Math.min(BINS - 1, Math.max(0, Math.floor(value * BINS)))]++;
  const most = Math.max(...counts, 1);
  canvas.bars = counts.map((count) => (count ? 0.12 + (0.88 * count) / most : 0));
}

/** Draw the bars of a histogram, if they have changed; those between two places, 0 to 1, are strong. */
function drawBars(canvas, from, to, [strong, weak]) {
  const { bars = [] } = canvas;
  const last = canvas.drawn;
  if (last && last.bars === bars && last.from === from && last.to === to && last.strong === strong) return;
  canvas.drawn = { bars, from, to, strong };
  const context = canvas.getContext("2d");
  context.clearRect(0, 0, canvas.width, canvas.height);
  const width = canvas.width / bars.length;
  bars.forEach((bar, i) => {
    const middle = (i + 0.5) / bars.length;
    context.fillStyle = middle >= from && middle <= to ? strong : weak;
    context.fillRect(i * width + 0.5, canvas.height * (1 - bar), Math.max(1, width - 1), canvas.height * bar);
  });
}

export class Sliders {
  /**
   * @param place Element for the sliders.
   * @param onstep Called with the settings while a slider moves.
   * @param onrelease Called with them when it is released.
   */
  constructor(place, onstep, onrelease) {
    [this.onstep, this.onrelease] = [onstep, onrelease];
    this.rows = {};
    this.classPlace = el("div", { class: "class-sliders" });
    this.classDetails = el("details", {}, el("summary", {}, "Score by class"), this.classPlace);
    this.anyClass = el("input", {
      type: "checkbox", id: "any-class", onchange: () => this.changed({ class_agnostic: this.anyClass.checked }, true),
    });
    const row = (...values) => this.row(...values);
    this.readColors();
    matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => {
      this.readColors();
      if (this.prediction) this.show();
    });
    place.append(
      row("score", "Score", { step: 0.01 }, "lowest confidence"),
      this.classDetails,
      row("nms", "Overlap", { step: 0.01 }, "of two objects that overlap more, the more confident stays"),
      el("label", { class: "check" }, this.anyClass, " also between classes"),
      row("min_area", "Smallest area", { step: 0.005 }, "in pixels"),
      row("max_area", "Largest area", { step: 0.005 }, "in pixels"),
      row("top_k", "At most", { step: 1 }, "number of objects"),
    );
  }

  readColors() {
    const style = getComputedStyle(document.documentElement);
    this.colors = ["--accent", "--line"].map((name) => style.getPropertyValue(name));
  }

  row(key, label, options, help, place = null) {
    const id = `slider-${key}`;
    const bars = el("canvas", { width: WIDTH, height: HEIGHT, "aria-hidden": "true" });
    const output = el("output", { for: id });
    const input = el("input", {
      id, type: "range", min: 0, max: 1, ...options, title: help,
      oninput: () => this.moved(key, false), onchange: () => this.moved(key, true),
    });
    const made = { input, output, bars };
    if (place) place[key] = made;
    else this.rows[key] = made;
    return el("div", { class: "slider" }, el("label", { for: id, title: help }, label), output, bars, input);
  }

  /** Start anew with candidates, settings, and classes. */
  setCandidates(candidates, settings, prediction) {
    this.settings = { ...settings };
    this.prediction = prediction;
    this.candidates = candidates;
    this.logArea = Math.log(Math.max(2, prediction.width * prediction.height));
    const { score, nms, min_area, max_area, top_k } = this.rows;
    for (const input of [score.input]) {
      input.min = Math.floor(prediction.min_score * 100) / 100;
      input.max = 1;
    }
    top_k.input.max = Math.max(1, candidates.length);
    histogram(candidates.map((object) => object.score), score.bars);
    histogram(overlaps(candidates, this.settings.class_agnostic), nms.bars);
    for (const row of [min_area, max_area]) {
      histogram(candidates.map((object) => Math.log(Math.max(1, object.area)) / this.logArea), row.bars);
    }
    top_k.bars.bars = candidates.map((object) => object.score).sort((a, b) => b - a).slice(0, 200);
    this.makeClassRows();
    this.show();
  }

  makeClassRows() {
    const { classes } = this.prediction;
    this.classRows = {};
    this.classPlace.replaceChildren(
      ...classes.map((name, i) => this.row(`class-${i}`, name, { step: 0.01 }, "lowest confidence", this.classRows)),
    );
    classes.forEach((name, i) => {
      const row = this.classRows[`class-${i}`];
      row.input.min = this.rows.score.input.min;
      histogram(this.candidates.filter((object) => object.class === name).map((object) => object.score), row.bars);
    });
    this.classDetails.hidden = classes.length < 2;
  }

  areaOf(place) {
    return Math.round(Math.exp(place * this.logArea));
  }

  moved(key, isReleased) {
    const row = this.rows[key] || this.classRows[key];
    const value = Number(row.input.value);
    const isEnd = value >= Number(row.input.max);
    if (key.startsWith("class-")) {
      const name = this.prediction.classes[Number(key.slice(6))];
      this.changed({ class_score: { ...(this.settings.class_score || {}), [name]: value } }, isReleased);
      return;
    }
    const values = {
      score: () => value,
      nms: () => (isEnd ? null : value),
      min_area: () => (value === 0 ? Math.min(1, this.settings.min_area) : this.areaOf(value)),
      max_area: () => (isEnd ? null : this.areaOf(value)),
      top_k: () => (isEnd ? null : value),
    };
    this.changed({ [key]: values[key]() }, isReleased);
  }

  changed(values, isReleased) {
    if (!this.prediction) return;
    Object.assign(this.settings, values);
    if ("class_agnostic" in values) histogram(overlaps(this.candidates, values.class_agnostic), this.rows.nms.bars);
    this.show();
    (isReleased ? this.onrelease : this.onstep)(this.settings);
  }

  place(key, value, text, from, to, rows = this.rows) {
    const { input, output, bars } = rows[key];
    input.value = value;
    if (output.textContent !== text) {
      output.textContent = text;
      input.setAttribute("aria-valuetext", text);
    }
    drawBars(bars, from, to, this.colors);
  }

  /** Show the values of the settings. */
  show() {
    const { score, nms, min_area, max_area, top_k, class_score, class_agnostic } = this.settings;
    const place = (area) => Math.log(Math.max(1, area)) / this.logArea;
    const pixels = (area) => `${Math.round(area).toLocaleString("en")} px`;
    this.place("score", score, score.toFixed(2), score, 1);
    this.place("nms", nms ?? 1, nms === null ? "off" : nms.toFixed(2), 0, nms ?? 1);
    this.place("min_area", place(min_area), pixels(min_area), place(min_area), max_area ? place(max_area) : 1);
    const largest = max_area === null ? 1 : place(max_area);
    this.place("max_area", largest, max_area === null ? "any" : pixels(max_area), place(min_area), largest);
    const count = Number(this.rows.top_k.input.max);
    this.place("top_k", top_k ?? count, top_k === null ? "all" : String(top_k), 0, top_k === null ? 1 : top_k / count);
    this.anyClass.checked = class_agnostic;
    const own = { ...(this.prediction.class_score || {}), ...(class_score || {}) };
    this.prediction.classes.forEach((name, i) => {
      const value = own[name] ?? score;
      this.place(`class-${i}`, value, value.toFixed(2) + (name in own ? "" : " (as all)"), value, 1, this.classRows);
    });
  }
}
