// The list of objects in Try: show, class, score, delete. Rows are made once, and shown when they are needed.

import { button, el } from "./dom.js";

export class ObjectList {
  constructor(place, view) {
    this.view = view;
    this.title = el("h2", {}, "Objects");
    this.list = el("ul", { class: "objects", "aria-label": "Objects", onkeydown: (event) => this.keyDown(event) });
    this.empty = el("p", { class: "hint" });
    place.append(this.title, this.list, this.empty);
    this.rows = new Map();
    this.classes = [];
  }

  setClasses(classes) {
    this.classes = classes;
    this.rows.clear();
  }

  row(object) {
    const { view } = this;
    const { key } = object;
    const show = el("input", { type: "checkbox", "aria-label": "Show", title: "Show or hide", onchange: () => view.objects.toggle(key) });
    const name = el("select", { "aria-label": "Class", onchange: () => view.objects.relabel(key, name.value) });
    const names = new Set([...this.classes, object.class, view.toolbar.className]);
    name.append(...[...names].map((item) => el("option", { value: item }, item)));
    const choose = button("", () => view.choose(key), { class: "choose", "aria-label": "Choose" });
    const remove = button("×", () => view.objects.remove(key), { class: "remove", "aria-label": "Delete", title: "Delete (Del)" });
    const score = el("span", { class: "score" });
    const item = el("li", { tabindex: -1, data: { key }, onclick: (event) => {
      if (event.target === item || event.target === score) view.choose(key);
    } }, show, choose, name, score, remove);
    return { item, show, name, score, choose };
  }

  show(objects, active) {
    const items = objects.map((object) => {
      let row = this.rows.get(object.key);
      if (!row) this.rows.set(object.key, (row = this.row(object)));
      const state = `${object.class} ${object.isHidden} ${object.isChanged} ${object.key === active}`;
      if (row.state !== state) this.fill(row, object, object.key === active);
      row.state = state;
      return row.item;
    });
    replace(this.list, items);
    this.title.textContent = objects.length ? `Objects: ${objects.length}` : "Objects";
    this.empty.textContent = objects.length ? "" : this.reason();
  }

  fill(row, object, isActive) {
    if (![...row.name.options].some((option) => option.value === object.class)) {
      row.name.append(el("option", { value: object.class }, object.class));
    }
    row.show.checked = !object.isHidden;
    row.name.value = object.class;
    row.score.textContent = object.isAdded ? "drawn" : object.score.toFixed(2) + (object.isChanged ? " *" : "");
    row.choose.style.setProperty("--color", this.view.colorOf(object.class));
    row.item.classList.toggle("active", isActive);
    row.choose.setAttribute("aria-pressed", String(isActive));
  }

  reason() {
    const { prediction, objects } = this.view;
    if (!prediction) return "Nothing was looked for yet.";
    const { length } = objects.base;
    if (!length) return "Nothing fits these words. Other words may: a color and a kind of thing, such as red car.";
    return `None of ${length} candidates is kept: lower the score below.`;
  }

  scrollTo(key) {
    this.rows.get(key)?.item.scrollIntoView({ block: "nearest" });
  }

  keyDown(event) {
    if (!["ArrowUp", "ArrowDown"].includes(event.key) || event.target.matches("select")) return;
    const keys = [...this.list.children].map((item) => item.dataset.key);
    const at = keys.indexOf(this.view.objects.active) + (event.key === "ArrowDown" ? 1 : -1);
    const key = keys[Math.min(Math.max(at, 0), keys.length - 1)];
    this.view.choose(key);
    this.rows.get(key)?.choose.focus();
    event.preventDefault();
  }
}

/** Make elements the children of a list, and leave those alone that are in place. */
function replace(list, items) {
  const wanted = new Set(items);
  for (const child of [...list.children]) if (!wanted.has(child)) child.remove();
  items.forEach((item, i) => {
    if (list.children[i] !== item) list.insertBefore(item, list.children[i] || null);
  });
}
