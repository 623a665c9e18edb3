// Boxes and points of the image in Try: they become masks by a session of the server.

import * as api from "./api.js";
import { guarded, tell } from "./dom.js";
import { withShape } from "./objects.js";
import { toRle } from "./rle.js";

export class Prompts {
  constructor(view) {
    this.view = view;
    this.session = null;
    this.queue = Promise.resolve();
  }

  /** Forget the session of another image. */
  reset() {
    if (this.session) this.session.then((id) => api.closeSession(id)).catch(() => {});
    this.session = null;
  }

  box(box) {
    return this.send(null, { class: this.view.toolbar.className, box });
  }

  /** Add a point to the chosen object; without one, it begins an object. */
  point([x, y], label) {
    const { objects, toolbar, viewer } = this.view;
    const object = objects.get(objects.active);
    if (!object && !label) {
      tell("Begin an object with a left click, or choose one first.", "error");
      return this.queue;
    }
    const earlier = object ? objects.promptsOf(object.key) : null;
    const point = [Math.min(Math.round(x * 10) / 10, viewer.width - 0.5), Math.min(Math.round(y * 10) / 10, viewer.height - 0.5)];
    const prompt = earlier ? { ...earlier } : { class: object?.class || toolbar.className };
    if (object && !earlier) prompt.mask = object.mask && !object.isChanged ? object.mask : toRle(object.shape);
    prompt.points = [...(earlier?.points || []), point];
    prompt.labels = [...(earlier?.labels || []), label];
    return this.send(object?.key ?? null, prompt);
  }

  /** Send a prompt when those before it are answered. */
  send(key, prompt) {
    const { picture } = this.view;
    this.queue = this.queue.then(() => guarded(async () => {
      if (picture !== this.view.picture) return;
      if (!this.view.about.sessions) throw new Error("The segmenter of this server takes no boxes and points.");
      tell(this.session ? "Segmenting …" : "Encoding the image …", "busy");
      const answer = await this.segment(prompt);
      if (picture !== this.view.picture) return;
      const entry = withShape(answer.objects[0], picture.width, picture.height);
      if (!entry.shape.area) {
        tell("There is nothing at this place; the prompt was left out.", "error");
        return;
      }
      this.view.objects.setPrompted(key, prompt, entry.shape, prompt.class, entry.mask_score ?? entry.score);
      tell("");
    }));
    return this.queue;
  }

  async segment(prompt) {
    for (let attempt = 0; ; attempt++) {
      this.session ??= api.openSession(this.view.picture.id).then((answer) => answer.id);
      try {
        return await api.segment(await this.session, [prompt]);
      } catch (error) {
        this.session = null; // it may have made room for others: it is opened again, once
        if (error.status !== 404 || attempt) throw error;
      }
    }
  }

  /** Draw the points of the chosen object. */
  draw(context, unit) {
    const prompt = this.view.objects.promptsOf(this.view.objects.active);
    (prompt?.points || []).forEach(([x, y], i) => {
      const isYes = prompt.labels[i] === 1;
      context.beginPath();
      context.arc(x, y, 5 * unit, 0, 2 * Math.PI);
      context.fillStyle = isYes ? "#1a9c3c" : "#d22222";
      context.fill();
      [context.strokeStyle, context.lineWidth] = ["#fff", 1.5 * unit];
      context.stroke();
      context.beginPath();
      context.moveTo(x - 3 * unit, y);
      context.lineTo(x + 3 * unit, y);
      if (isYes) {
        context.moveTo(x, y - 3 * unit);
        context.lineTo(x, y + 3 * unit);
      }
      context.stroke();
    });
  }
}
