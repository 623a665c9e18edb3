// Verdicts on their way to the store: one request at a time, in order, so that each can be taken back.

import * as api from "./api.js";
import { tell } from "./dom.js";

/** A pause after which the speed is measured anew, in ms. */
const PAUSE = 60_000;

export class Verdicts {
  constructor(store, author, onsaved) {
    [this.store, this.author, this.onsaved] = [store, author, onsaved];
    this.done = [];
    this.times = [];
    this.waiting = 0;
    this.queue = Promise.resolve();
  }

  get isBusy() {
    return this.waiting > 0;
  }

  get count() {
    return this.done.length;
  }

  /** Verdicts a minute since the last pause. */
  get perMinute() {
    const { times } = this;
    if (times.length < 2) return times.length;
    return Math.round((60_000 * (times.length - 1)) / Math.max(1, times[times.length - 1] - times[0]));
  }

  add(verdict) {
    const now = performance.now();
    if (this.times.length && now - this.times[this.times.length - 1] > PAUSE) this.times = [];
    this.times.push(now);
    this.done.push(verdict);
    this.send(async () => {
      const edit = { action: verdict.action, object_id: verdict.object.object_id };
      if (verdict.name) edit.class = verdict.name;
      const answer = await api.edit(this.store(), [edit], this.author());
      verdict.batch = answer.batch;
      return answer;
    });
  }

  /** Take the last verdict back; return it. */
  async undo() {
    const verdict = this.done.pop();
    if (!verdict) return null;
    await this.send(() => (verdict.batch ? api.undo(this.store(), verdict.batch, this.author()) : null));
    return verdict;
  }

  send(action) {
    this.waiting++;
    this.queue = this.queue.then(async () => {
      try {
        const answer = await action();
        this.waiting--;
        if (answer) this.onsaved(answer);
      } catch (error) {
        this.waiting--;
        tell(`A verdict was not saved: ${error.message}`, "error");
      }
    });
    return this.queue;
  }

  settled() {
    return this.queue;
  }
}
