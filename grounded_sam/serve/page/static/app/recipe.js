// The same run as a command and as Python, to copy.

import { button, copy, el } from "./dom.js";
import { differing, toCommand, toPythonCode } from "./saving.js";

export class Recipe {
  constructor(place, view) {
    this.view = view;
    this.command = el("pre", { tabindex: 0, "aria-label": "Command" });
    this.python = el("pre", { tabindex: 0, "aria-label": "Python" });
    const part = (title, made) =>
      el("div", { class: "recipe" }, el("h3", {}, title),
        button("Copy", () => copy(made.textContent), { "aria-label": `Copy the ${title.toLowerCase()}` }), made);
    place.append(part("Command", this.command), part("Python", this.python));
  }

  update() {
    const { picture, about, initial, settings } = this.view;
    if (!picture) return;
    const words = this.view.request();
    const changed = differing(settings, initial);
    const isExample = picture.source?.startsWith("builtin:");
    const input = isExample ? picture.source.replace(/\/[^/]*$/, "") : picture.name; // the command takes all examples
    this.command.textContent = toCommand(input, words, changed, about.overrides);
    this.python.textContent = toPythonCode(picture.name, words, changed, about.overrides);
  }
}
