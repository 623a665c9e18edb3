// Lanes of a video: one for each track, with bars where it is seen.

import { button, el } from "./dom.js";
import { colorOfTrack } from "./colors.js";

export class Lanes {
  /** @param actions `choose(track)`, `relabel(track, name)`, `go(frame)`, `split(track)`. */
  constructor(place, actions) {
    [this.place, this.actions] = [place, actions];
    this.rows = [];
    place.addEventListener("keydown", (event) => this.keyDown(event));
  }

  show(tracks, frames, keyframes, clicked, active) {
    const [first, last] = [frames[0] ?? 0, frames[frames.length - 1] ?? 0];
    const whole = Math.max(1, last - first + 1);
    this.scale = (frame) => `${(100 * (frame - first)) / whole}%`;
    const marks = [...keyframes.map((frame) => ["mark", frame]), ...clicked.map((frame) => ["mark click", frame])];
    this.rows = tracks.map((entry) => {
      const { track } = entry;
      const color = colorOfTrack(track, entry.class, tracks.map((other) => other.class));
      const bars = entry.spans.map(([from, to]) => el("div", {
        class: "bar", style: { left: this.scale(from), width: `${(100 * (to - from + 1)) / whole}%` },
      }));
      const lines = marks.map(([kind, frame]) => el("div", { class: kind, style: { left: this.scale(frame) } }));
      const now = el("div", { class: "now" });
      const seen = entry.spans.map(([from, to]) => (from === to ? from : `${from} to ${to}`)).join(", ");
      const name = el("input", {
        type: "text", value: entry.class, "aria-label": `Class of lane ${track}`,
        onchange: () => this.actions.relabel(track, name.value.trim()),
      });
      const choose = button("", () => this.actions.choose(track), {
        class: "choose", "aria-label": `Choose lane ${track}`, "aria-pressed": String(track === active),
      });
      const strip = el("div", { class: "lane-track", title: `frames ${seen}`, onclick: (event) => {
        const bounds = strip.getBoundingClientRect();
        this.actions.go(first + Math.floor(((event.clientX - bounds.left) / bounds.width) * whole));
      } }, bars, lines, now);
      const row = el("div", {
        class: `lane${track === active ? " active" : ""}`, role: "group", style: { "--color": color },
        "aria-label": `Lane ${track}, ${entry.class}, seen in frames ${seen}`, data: { track },
      }, el("div", { class: "lane-head" }, choose, el("span", {}, `#${track}`), name,
        el("span", { class: "quiet" }, `${entry.frames}`)), strip);
      return { row, now, choose, track };
    });
    const focused = this.place.contains(document.activeElement) ? document.activeElement.closest(".lane")?.dataset.track : null;
    this.place.replaceChildren(...this.rows.map(({ row }) => row));
    if (focused) this.rows.find(({ track }) => String(track) === focused)?.choose.focus();
  }

  setNow(frame) {
    for (const { now } of this.rows) now.style.left = this.scale(frame);
  }

  keyDown(event) {
    if (event.target.matches("input")) return;
    const at = this.rows.findIndex(({ row }) => row.contains(event.target));
    if (at < 0) return;
    const step = { ArrowDown: 1, ArrowUp: -1 }[event.key];
    if (step) {
      const row = this.rows[Math.min(Math.max(at + step, 0), this.rows.length - 1)];
      this.actions.choose(row.track);
      this.rows.find(({ track }) => track === row.track)?.choose.focus();
    } else if (event.key.toLowerCase() === "s") this.actions.split(this.rows[at].track);
    else return;
    event.preventDefault();
    event.stopPropagation();
  }
}
