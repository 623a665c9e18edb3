// Two kinds of videos with tracks: one that is being tracked, and one of a store. Both have the same methods.

import * as api from "./api.js";
import { fromBox, fromRle } from "./rle.js";

/** Return first and last of each stretch of frames; frames are `step` apart. */
function spansOf(frames, step) {
  const spans = [];
  for (const frame of frames) {
    const last = spans[spans.length - 1];
    if (last && frame - last[1] <= step) last[1] = frame;
    else spans.push([frame, frame]);
  }
  return spans;
}

const xyxy = ([x, y, width, height]) => [x, y, x + width, y + height];

/** A video that was sent, and the lines of the job that tracks it. What is edited is kept here. */
export class JobVideo {
  constructor(video) {
    this.video = video;
    [this.name, this.width, this.height] = [video.name, video.width, video.height];
    this.isStored = false;
    this.reset();
  }

  reset() {
    this.lines = new Map();
    this.shapes = new Map(); // masks that were clicked: by frame and track
    this.clicks = new Map();
    this.operations = [];
    this.total = this.video.frames;
  }

  /** Forget what was tracked, and keep the clicks. */
  restart() {
    [this.lines, this.operations] = [new Map(), []];
  }

  get frames() {
    const known = Math.max(0, ...this.lines.keys()) + 1;
    return Array.from({ length: this.total ?? known }, (_, i) => i);
  }

  get keyframes() {
    return [...this.clicks.values()].map((click) => click.frame);
  }

  imageUrl(frame) {
    return api.frameUrl(this.video.id, frame);
  }

  /** Return an image of the server with the pixels of a frame. */
  async picture(frame) {
    const answer = await fetch(this.imageUrl(frame));
    return api.addPicture(new File([await answer.blob()], `frame-${frame}.jpg`, { type: "image/jpeg" }));
  }

  addLine(line) {
    for (const object of line.objects) object.track = object.track_id;
    this.lines.set(line.frame, line);
  }

  /** Return track and class of an object after all edits; null if it was deleted. */
  edited(frame, object) {
    let [track, name] = [object.track_id, object.class];
    for (const edit of this.operations) {
      if (edit.track !== track) continue;
      if (edit.action === "delete") return null;
      if (edit.action === "split" && frame >= edit.frame) track = edit.into;
      if (edit.action === "merge") [track, name] = [edit.into, edit.class];
      if (edit.action === "relabel") name = edit.class;
    }
    return { track, class: name };
  }

  async objects(frame) {
    const found = [];
    for (const object of this.lines.get(frame)?.objects || []) {
      const edited = this.edited(frame, object);
      if (!edited) continue;
      object.shape ??= object.segmentation
        ? fromRle(object.segmentation)
        : fromBox(xyxy(object.bbox), this.width, this.height);
      found.push({ ...object, ...edited });
    }
    for (const [key, clicked] of this.shapes) {
      const [at, track] = key.split(":").map(Number);
      if (at !== frame) continue;
      const known = found.find((object) => object.track === track);
      if (known) known.shape = clicked.shape;
      else found.push({ track, class: clicked.class, score: 1, shape: clicked.shape });
    }
    return found;
  }

  tracks() {
    const seen = new Map();
    for (const frame of [...this.lines.keys()].sort((a, b) => a - b)) {
      for (const object of this.lines.get(frame).objects) {
        const edited = this.edited(frame, object);
        if (!edited) continue;
        if (!seen.has(edited.track)) seen.set(edited.track, { frames: [], names: new Map() });
        const entry = seen.get(edited.track);
        entry.frames.push(frame);
        entry.names.set(edited.class, (entry.names.get(edited.class) || 0) + 1);
      }
    }
    return [...seen].sort((a, b) => a[0] - b[0]).map(([track, { frames, names }]) => {
      const [[name]] = [...names].sort((a, b) => b[1] - a[1]);
      return { track, class: name, frames: frames.length, spans: spansOf(frames, 1) };
    });
  }

  find(track) {
    return this.tracks().find((entry) => entry.track === track);
  }

  async merge(track, into) {
    const framesOf = (entry) => new Set(entry.spans.flatMap(([first, last]) =>
      Array.from({ length: last - first + 1 }, (_, i) => first + i)));
    const [one, other] = [framesOf(this.find(track)), framesOf(this.find(into))];
    const both = [...one].filter((frame) => other.has(frame));
    if (both.length) {
      throw new Error(`Lanes ${track} and ${into} are both seen in ${both.length} frames, such as ${both[0]}; delete or split one of them there.`);
    }
    this.operations.push({ action: "merge", track, into, class: this.find(into).class });
  }

  async split(track, frame) {
    const { spans } = this.find(track);
    if (frame <= spans[0][0] || frame > spans[spans.length - 1][1]) {
      throw new Error(`Lane ${track} is seen from frame ${spans[0][0]} to ${spans[spans.length - 1][1]}: go to a frame between them.`);
    }
    const into = Math.max(...this.tracks().map((entry) => entry.track)) + 1;
    this.operations.push({ action: "split", track, frame, into });
  }

  async relabel(track, name) {
    this.operations.push({ action: "relabel", track, class: name });
  }

  async remove(track) {
    this.operations.push({ action: "delete", track });
  }

  async undo() {
    return Boolean(this.operations.pop());
  }

  /** Keep a mask that was clicked; the next run starts from its clicks. */
  async setMask(frame, track, name, prompt, shape) {
    const key = `${frame}:${track}`;
    this.shapes.set(key, { shape, class: name });
    const object = track > 0 ? { object: track } : {};
    const { points, labels, box } = prompt;
    this.clicks.set(key, { class: name, frame, ...object, ...(points ? { points, labels } : {}), ...(box ? { box } : {}) });
    return track;
  }

  /** Return the lines with all edits, as results.jsonl has them. */
  toJsonl() {
    const lines = [...this.lines.values()].sort((a, b) => a.frame - b.frame);
    return lines.map((line) => {
      const objects = line.objects.flatMap((object) => {
        const edited = this.edited(line.frame, object);
        const { track, shape, ...plain } = object;
        return edited ? [{ ...plain, class: edited.class, track_id: edited.track }] : [];
      });
      return JSON.stringify({ ...line, objects });
    }).join("\n") + "\n";
  }
}

/** A video of a store: what is edited is written into the store. */
export class StoredVideo {
  constructor(store, video, author) {
    [this.store, this.author, this.isStored] = [store, author, true];
    this.batches = [];
    this.ids = new Map();
    this.keyframes = [];
    this.take(video);
  }

  take(video) {
    this.stored = video;
    [this.name, this.width, this.height] = [video.name, video.width, video.height];
    this.known = new Map();
  }

  /** Read which frames there are. */
  async open() {
    let cursor = 0;
    while (cursor !== null) {
      const page = await api.storedPictures(this.store, { video: this.name, cursor });
      for (const picture of page.pictures) this.ids.set(picture.frame, picture.id);
      [cursor, this.classes] = [page.next, page.classes];
    }
    const numbers = [...this.ids.keys()].sort((a, b) => a - b);
    this.frames = numbers;
    this.keyframes = [];
    return this;
  }

  imageUrl(frame) {
    return api.storedImageUrl(this.store, this.ids.get(frame));
  }

  picture(frame) {
    return api.openStored(this.store, this.ids.get(frame));
  }

  async objects(frame) {
    if (!this.known.has(frame)) {
      const { detections } = await api.storedPicture(this.store, this.ids.get(frame));
      this.known.set(frame, detections.map((object) => ({
        ...object,
        track: object.track_id,
        shape: object.mask ? fromRle(object.mask) : fromBox(object.box, this.width, this.height),
      })));
    }
    return this.known.get(frame);
  }

  tracks() {
    return this.stored.tracks;
  }

  async edit(edits) {
    const answer = await api.edit(this.store, edits, this.author());
    if (answer.batch) this.batches.push(answer.batch);
    await this.reload();
  }

  async reload() {
    const { videos } = await api.storedVideos(this.store);
    this.take(videos.find((video) => video.name === this.name));
  }

  merge(track, into) {
    return this.edit([{ action: "merge_tracks", file: this.name, track, into }]);
  }

  split(track, frame) {
    return this.edit([{ action: "split_track", file: this.name, track, frame }]);
  }

  relabel(track, name) {
    return this.edit([{ action: "relabel_track", file: this.name, track, class: name, new_class: true }]);
  }

  remove(track) {
    return this.edit([{ action: "delete_track", file: this.name, track }]);
  }

  async undo() {
    const batch = this.batches.pop();
    if (!batch) return false;
    await api.undo(this.store, batch, this.author());
    await this.reload();
    return true;
  }

  /** Write a mask that was clicked: of the track in this frame, or a new object; return the track of a new one. */
  async setMask(frame, track, name, prompt, shape, rle) {
    const object = (await this.objects(frame)).find((entry) => entry.track === track);
    if (object) await this.edit([{ action: "mask", object_id: object.object_id, mask: rle }]);
    else {
      const before = new Set(this.tracks().map((entry) => entry.track));
      const kept = track > 0 ? { track } : {};
      await this.edit([{ action: "add", picture: this.ids.get(frame), class: name, mask: rle, new_class: true, ...kept }]);
      return this.tracks().find((entry) => !before.has(entry.track))?.track ?? track;
    }
    return track;
  }
}
