// The tools of the canvas in Try, with their shortcuts.

import { button, el, tell } from "./dom.js";
import { boxTool, brushTool, moveTool, pointTool } from "./tools.js";

const TOOLS = [
  ["move", "Move", "v"],
  ["box", "Box", "b"],
  ["point", "Point", "p"],
  ["brush", "Brush", "d"],
  ["eraser", "Eraser", "e"],
];

export class Toolbar {
  constructor(place, view) {
    this.view = view;
    this.size = 24;
    const context = {
      viewer: view.viewer,
      objects: view.objects,
      choose: (key) => view.choose(key),
      promptBox: (box) => view.prompts.box(box),
      promptPoint: (point, label) => view.prompts.point(point, label),
      brushSize: () => this.size,
      paintable: (point) => this.paintable(point),
      preview: (key, shape) => view.drawShapes(view.objects.list(), { key, shape }),
      setShape: (key, shape) => view.objects.setShape(key, shape),
    };
    const makers = {
      move: moveTool, box: boxTool, point: pointTool,
      brush: (c) => brushTool(c, false), eraser: (c) => brushTool(c, true),
    };
    this.tools = Object.fromEntries(TOOLS.map(([name]) => [name, makers[name](context)]));
    this.buttons = Object.fromEntries(TOOLS.map(([name, label, key]) => [name,
      button(label, () => this.use(name), {
        "aria-pressed": "false", "aria-keyshortcuts": key, title: `${label} (${key.toUpperCase()})`,
      })]));
    this.classNames = el("datalist", { id: "class-names" });
    this.classInput = el("input", {
      type: "text", list: "class-names", size: 12, "aria-label": "Class of new objects", title: "Class of new objects",
    });
    this.labels = el("input", { type: "checkbox", checked: true, onchange: () => view.viewer.draw() });
    this.sizeInput = el("input", {
      type: "range", min: 4, max: 200, value: this.size, "aria-label": "Size of brush and eraser in pixels",
      oninput: () => this.setSize(Number(this.sizeInput.value)),
    });
    this.undoButton = button("Undo", () => view.step(false), { title: "Undo (Ctrl+Z, U)" });
    this.redoButton = button("Redo", () => view.step(true), { title: "Redo (Ctrl+Y)" });
    this.hint = el("p", { class: "hint", id: "tool-hint" });
    place.append(
      el("div", { class: "group", role: "group", "aria-label": "Tools" }, Object.values(this.buttons)),
      el("label", { class: "inline" }, "new: ", this.classInput, this.classNames),
      el("label", { class: "inline size" }, "size ", this.sizeInput),
      el("div", { class: "group" }, this.undoButton, this.redoButton),
      el("div", { class: "group", role: "group", "aria-label": "Zoom" },
        button("−", () => view.viewer.zoom(0.8), { "aria-label": "Zoom out", title: "Zoom out (−)" }),
        button("Fit", () => view.viewer.fit(), { title: "Show the whole image (0)" }),
        button("+", () => view.viewer.zoom(1.25), { "aria-label": "Zoom in", title: "Zoom in (+), up to 800%" })),
      el("label", { class: "inline" }, this.labels, " labels"),
    );
    view.place.querySelector("[data-part=hint]").append(this.hint);
    this.setClasses([]);
    this.use("move");
  }

  get className() {
    return this.classInput.value.trim() || this.classInput.placeholder;
  }

  get hasLabels() {
    return this.labels.checked;
  }

  setClasses(classes) {
    this.classNames.replaceChildren(...classes.map((name) => el("option", { value: name })));
    this.classInput.placeholder = classes[0] || "object";
  }

  use(name) {
    this.view.viewer.tool = this.tools[name];
    for (const [other, made] of Object.entries(this.buttons)) made.setAttribute("aria-pressed", String(other === name));
    this.hint.textContent = this.tools[name].hint;
    this.view.viewer.canvas.dataset.tool = name;
    this.sizeInput.closest("label").hidden = !["brush", "eraser"].includes(name);
    this.view.viewer.draw();
  }

  setSize(size) {
    this.size = Math.min(Math.max(size, 4), 200);
    this.sizeInput.value = this.size;
    this.view.viewer.draw();
  }

  /** Return the object that a brush changes: the chosen one, else the one under it. */
  paintable(point) {
    const { objects } = this.view;
    const object = objects.get(objects.active) || objects.at(point);
    if (!object) {
      tell("Choose an object first: click it in the list.", "error");
      return null;
    }
    if (objects.active !== object.key) this.view.choose(object.key);
    return object;
  }

  update() {
    this.undoButton.disabled = !this.view.objects.past.length;
    this.redoButton.disabled = !this.view.objects.future.length;
  }

  /** Handle a shortcut; return whether it was one. */
  key(event) {
    const key = event.key.toLowerCase();
    const tool = TOOLS.find(([, , shortcut]) => shortcut === key);
    const { objects } = this.view;
    if (tool) this.use(tool[0]);
    else if (key === "u") this.view.step(event.shiftKey);
    else if (key === "[") this.setSize(this.size * 0.8);
    else if (key === "]") this.setSize(this.size * 1.25);
    else if (key === "escape") this.view.choose(null);
    else if (key === "delete" && objects.active !== null) objects.remove(objects.active);
    else return false;
    return true;
  }
}
