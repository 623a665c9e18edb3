// The view Video: frames with masks, a lane for each track, and corrections.

import * as api from "./api.js";
import { Viewer, loadImage } from "./canvas.js";
import { colorOfTrack } from "./colors.js";
import { button, countOf, debounce, el, guarded, isTyping, save, tell } from "./dom.js";
import { drawLabels } from "./labels.js";
import { Lanes } from "./lanes.js";
import { withShape } from "./objects.js";
import { makePicker, takeDrops } from "./picker.js";
import { contains, toRle } from "./rle.js";
import { boxTool, moveTool, pointTool } from "./tools.js";
import { JobVideo, StoredVideo } from "./video_sources.js";
import { Words } from "./words.js";

const EXAMPLE_WORDS = ["red circle", "blue square", "green star", "yellow triangle", "orange ring", "purple cross"];
const FRAME_MS = 80;

export class VideoView {
  constructor(place, about, router) {
    [this.place, this.about, this.router] = [place, about, router];
    const find = (name) => place.querySelector(`[data-part="${name}"]`);
    this.source = this.active = this.job = this.session = null;
    [this.frame, this.shown, this.prompts] = [0, [], new Map()];
    this.viewer = new Viewer(find("canvas"));
    this.viewer.decorate = (context, unit) => this.decorate(context, unit);
    this.words = new Words(find("words"), "video-words", () => {});
    this.wordsStep = find("words").parentElement;
    this.lanes = new Lanes(find("lanes"), {
      choose: (track) => this.choose(track),
      relabel: (track, name) => name && this.edit(() => this.source.relabel(track, name)),
      go: (frame) => this.go(frame),
      split: (track) => this.edit(() => this.source.split(track, this.frame)),
    });
    this.refreshSoon = debounce(() => this.refresh(), 150);
    this.makeSources(find);
    this.makeTools(find);
    this.makePlayer(find("player"));
    document.addEventListener("keydown", (event) => this.keyDown(event));
  }

  makeSources(find) {
    const examples = this.about.examples.filter((path) => /\.(mp4|webm|mov|avi|mkv)$/i.test(path));
    const onchoose = (given) => guarded(() => this.open(given));
    makePicker(find("picker"), { kind: "video", examples, onchoose });
    takeDrops("video", () => this.router.current === "video", onchoose);
    this.examples = examples;
    this.storedSelect = el("select", { "aria-label": "Video of a store", onchange: () => {
      const [store, name] = JSON.parse(this.storedSelect.value || "[]");
      if (store) guarded(() => this.openStored(store, name));
    } });
    find("stored").append(this.storedSelect);
    this.runButton = button("Track", () => guarded(() => this.run()), { class: "main" });
    this.cancelButton = button("Stop", () => guarded(() => this.cancel()));
    this.progress = el("progress", { max: 1, value: 0, "aria-label": "Progress" });
    find("run").append(el("div", { class: "group" }, this.runButton, this.cancelButton, this.progress));
    this.cancelButton.hidden = this.progress.hidden = true;
  }

  makeTools(find) {
    const context = {
      viewer: this.viewer,
      objects: { at: ([x, y]) => this.shown.find((object) => contains(object.shape, x, y)) },
      choose: (key) => this.choose(key),
      promptBox: (box) => this.prompt({ box }),
      promptPoint: (point, label) => this.promptPoint(point, label),
    };
    this.tools = { move: moveTool(context), point: pointTool(context), box: boxTool(context) };
    this.tools.move.hint = "Click an object to choose its lane. To correct a frame choose Point or Box; what is clicked is tracked from there on.";
    this.toolButtons = Object.fromEntries([["move", "Move", "M"], ["point", "Point", "P"], ["box", "Box", "B"]].map(
      ([name, label, key]) => [name, button(label, () => this.use(name), { title: `${label} (${key})`, "aria-pressed": "false" })],
    ));
    this.classInput = el("input", { type: "text", size: 12, placeholder: "object", "aria-label": "Class of new objects" });
    this.laneTitle = el("strong");
    this.mergeSelect = el("select", { "aria-label": "Merge this lane into", onchange: () => {
      const into = Number(this.mergeSelect.value);
      if (into) this.edit(() => this.source.merge(this.active, into).then(() => (this.active = into)));
    } });
    this.laneTools = el("div", { class: "group", role: "group", "aria-label": "The chosen lane" }, this.laneTitle,
      button("Split here", () => this.edit(() => this.source.split(this.active, this.frame)), { title: "A new lane from this frame on (S)" }),
      this.mergeSelect,
      button("Delete", () => this.edit(() => this.source.remove(this.active))));
    this.undoButton = button("Undo", () => this.edit(async () => {
      if (!(await this.source.undo())) tell("There is nothing to undo.");
    }), { title: "Undo (U)" });
    this.saveButton = button("Save as JSON lines", () => save(this.source.toJsonl(), "results.jsonl", "application/jsonl"));
    find("tools").append(
      el("div", { class: "group", role: "group", "aria-label": "Tools" }, Object.values(this.toolButtons)),
      el("label", { class: "inline" }, "new: ", this.classInput), this.laneTools, this.undoButton, this.saveButton);
    this.hint = find("hint");
    this.use("move");
  }

  makePlayer(place) {
    this.slider = el("input", { type: "range", min: 0, max: 0, value: 0, "aria-label": "Frame", oninput: () =>
      this.go(this.source?.frames[Number(this.slider.value)] ?? 0) });
    this.playButton = button("Play", () => this.play(), { title: "Play (Space)" });
    this.position = el("output", {}, "");
    place.append(el("div", { class: "player" }, this.playButton,
      button("‹", () => this.step(-1), { "aria-label": "Frame before", title: "Frame before (,)" }),
      button("›", () => this.step(1), { "aria-label": "Next frame", title: "Next frame (.)" }), this.slider, this.position));
  }

  async start() {
    this.words.set(this.about.classes.length ? this.about.classes : EXAMPLE_WORDS);
    await guarded(() => this.listStored());
    if (!this.source && this.examples.length) await guarded(() => this.open(this.examples[0]));
  }

  async listStored() {
    const options = [];
    for (const store of this.about.stores) {
      const { videos } = await api.storedVideos(store);
      options.push(...videos.map(({ name }) =>
        el("option", { value: JSON.stringify([store, name]) }, `${store}: ${name}`)));
    }
    this.storedSelect.replaceChildren(el("option", { value: "" }, "or a video of a store …"), ...options);
    this.storedSelect.hidden = !options.length;
  }

  /** Open a video: a File, or the path of an example. */
  async open(given) {
    await this.cancel();
    tell("Reading the video …", "busy");
    const video = await api.addVideo(given);
    this.storedSelect.value = "";
    await this.take(new JobVideo(video));
    tell("Press Track to find and follow what the words name.");
  }

  async openStored(store, name) {
    await this.cancel();
    tell("Opening …", "busy");
    const { videos } = await api.storedVideos(store);
    const video = videos.find((entry) => entry.name === name);
    await this.take(await new StoredVideo(store, video, () => this.router.author).open());
    tell("What you change is written into the store.");
  }

  async take(source) {
    this.source = source;
    [this.active, this.session] = [null, null];
    this.prompts.clear();
    this.runButton.hidden = this.saveButton.hidden = this.wordsStep.hidden = source.isStored;
    await this.go(source.frames[0] ?? 0);
    await this.refresh();
  }

  /** Track the video; each line is shown as it comes. */
  async run() {
    const { source } = this;
    if (!source || source.isStored) throw new Error("Open a video first.");
    this.words.commit();
    const clicks = [...source.clicks.values()];
    if (this.words.isEmpty && !clicks.length) throw new Error("Type what to look for, or click an object.");
    await this.cancel();
    const words = this.words.isEmpty ? {} : this.words.request;
    const job = await api.track(source.video.id, { ...words, ...(clicks.length ? { clicks } : {}) });
    source.restart();
    this.job = job.id;
    this.setRunning(true, 0);
    tell("Tracking …", "busy");
    this.stop = api.readJob(job.id, (line) => {
      source.addLine(line);
      this.progress.value = job.total ? source.lines.size / job.total : 0;
      if (!this.isPlaying && line.frame !== this.frame && source.lines.size < 2) this.go(line.frame);
      this.refreshSoon();
    }, (end) => this.ended(source, end));
  }

  ended(source, end) {
    this.job = null;
    this.setRunning(false, 1);
    source.shapes.clear();
    if (end.frames) source.total = end.frames;
    this.refresh();
    if (end.state === "done") tell([`${countOf(source.tracks().length, "lane")} in ${countOf(end.frames, "frame")}.`, ...end.notes].join(" "));
    else if (end.state === "failed") tell(end.error, "error");
  }

  setRunning(isRunning) {
    this.cancelButton.hidden = this.progress.hidden = !isRunning;
    this.runButton.disabled = isRunning;
  }

  async cancel() {
    this.stop?.();
    const { job } = this;
    [this.stop, this.job] = [null, null];
    if (!job) return;
    this.setRunning(false);
    await api.cancelJob(job);
    tell("Stopped.");
  }

  async go(frame) {
    const { source } = this;
    if (!source) return;
    const { frames } = source;
    const nearest = frames.reduce((best, other) => (Math.abs(other - frame) < Math.abs(best - frame) ? other : best), frames[0] ?? 0);
    this.frame = nearest;
    this.slider.max = Math.max(0, frames.length - 1);
    this.slider.value = frames.indexOf(nearest);
    this.position.textContent = `frame ${nearest} of ${frames[frames.length - 1] ?? 0}`;
    await guarded(async () => {
      const [image, objects] = await Promise.all([loadImage(source.imageUrl(nearest)), source.objects(nearest)]);
      if (source !== this.source || nearest !== this.frame) return;
      this.viewer.setPicture(image, source.width, source.height, true);
      this.show(objects);
    });
  }

  show(objects) {
    const classes = this.source.tracks().map((entry) => entry.class);
    this.shown = objects.map((object) => (
      { ...object, key: object.track, color: colorOfTrack(object.track, object.class, classes) }));
    this.viewer.setShapes(this.shown.map((object) => {
      const { color } = object;
      const isActive = object.track === this.active;
      return { mask: object.shape, color, opacity: isActive ? 0.7 : 0.5, line: isActive ? "#ffffff" : null };
    }));
    this.lanes.setNow(this.frame);
  }

  /** Draw lanes and masks anew. */
  async refresh() {
    const { source } = this;
    if (!source) return;
    const tracks = source.tracks();
    const every = this.about.settings.track.redetect_every;
    const keyframes = source.isStored || !tracks.length ? [] : source.frames.filter((frame) => frame % every === 0);
    this.lanes.show(tracks, source.frames, keyframes, source.keyframes, this.active);
    this.laneTools.hidden = !tracks.some((entry) => entry.track === this.active);
    this.laneTitle.textContent = `Lane ${this.active}: `;
    const others = tracks.filter((entry) => entry.track !== this.active);
    this.mergeSelect.replaceChildren(el("option", { value: "" }, "merge into …"),
      ...others.map((entry) => el("option", { value: entry.track }, `#${entry.track} ${entry.class}`)));
    this.runButton.textContent = source.clicks?.size ? "Track with the clicks" : "Track";
    this.saveButton.disabled = !tracks.length;
    const { frame } = this;
    const objects = await guarded(() => source.objects(frame));
    if (objects && frame === this.frame && source === this.source) this.show(objects);
  }

  choose(track) {
    this.active = track;
    this.refresh();
  }

  edit(action) {
    return guarded(async () => {
      if (!this.source) throw new Error("Open a video first.");
      await action();
      if (!this.source.tracks().some((entry) => entry.track === this.active)) this.active = null;
      await this.refresh();
    });
  }

  promptPoint(point, label) {
    const key = `${this.frame}:${this.active}`;
    const earlier = this.prompts.get(key) || { points: [], labels: [] };
    return this.prompt({ points: [...earlier.points, point], labels: [...earlier.labels, label] });
  }

  /** Segment a prompt in this frame; the mask belongs to the chosen lane, or begins a new one. */
  prompt(given) {
    return guarded(async () => {
      const { source, frame } = this;
      const track = this.active ?? -(this.prompts.size + 1); // a new object has a negative number until it is tracked
      const name = source.tracks().find((entry) => entry.track === track)?.class || this.classInput.value.trim() || "object";
      tell("Segmenting …", "busy");
      if (this.session?.frame !== frame) {
        const picture = await source.picture(frame);
        this.session = { frame, id: (await api.openSession(picture.id)).id };
      }
      const answer = await api.segment(this.session.id, [{ class: name, ...given }]);
      const { shape } = withShape(answer.objects[0], source.width, source.height);
      if (!shape.area) throw new Error("There is nothing at this place.");
      this.prompts.set(`${frame}:${track}`, given);
      this.active = (await source.setMask(frame, track, name, given, shape, toRle(shape))) ?? track;
      tell(source.isStored ? "Saved to the store." : "Press “Track with the clicks” to follow it.");
      await this.refresh();
    });
  }

  step(by) {
    const frames = this.source?.frames || [];
    const at = frames.indexOf(this.frame) + by;
    if (at >= 0 && at < frames.length) return this.go(frames[at]);
    return undefined;
  }

  async play() {
    this.isPlaying = !this.isPlaying;
    this.playButton.textContent = this.isPlaying ? "Pause" : "Play";
    while (this.isPlaying && this.router.current === "video") {
      const { frames } = this.source || { frames: [] };
      const at = frames.indexOf(this.frame);
      const pause = new Promise((done) => setTimeout(done, FRAME_MS));
      await this.go(frames[(at + 1) % Math.max(1, frames.length)] ?? 0);
      await pause;
    }
    this.isPlaying = false;
    this.playButton.textContent = "Play";
  }

  decorate(context, unit) {
    drawLabels(context, unit, this.shown.map((object) => ({
      text: `${object.track > 0 ? `#${object.track}` : "new"} ${object.class}`,
      box: object.shape.box,
      color: object.color,
    })));
    this.viewer.tool?.draw?.(context, unit);
  }

  use(name) {
    this.viewer.tool = this.tools[name];
    this.viewer.canvas.dataset.tool = name;
    for (const [other, made] of Object.entries(this.toolButtons)) made.setAttribute("aria-pressed", String(other === name));
    this.hint.textContent = this.tools[name].hint;
  }

  keyDown(event) {
    if (this.router.current !== "video" || isTyping(event)) return;
    const isButton = event.target.matches("button, a");
    const keys = {
      " ": () => !isButton && this.play(), ",": () => this.step(-1), ".": () => this.step(1),
      m: () => this.use("move"), p: () => this.use("point"), b: () => this.use("box"),
      u: () => this.undoButton.click(), escape: () => this.choose(null),
    };
    const action = keys[event.key.toLowerCase()];
    if (!action || (event.key === " " && isButton)) return;
    event.preventDefault();
    action();
  }
}
