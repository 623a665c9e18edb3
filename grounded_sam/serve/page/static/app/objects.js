// The objects of an image: candidates that a selection keeps, what a person has changed, and undo.

import { contains, fromBox, fromRle } from "./rle.js";

const LIMIT = 100;

function emptyState() {
  return { removed: new Set(), hidden: new Set(), classes: new Map(), shapes: new Map(), prompts: new Map(), added: [] };
}

function copyOf(state) {
  return {
    removed: new Set(state.removed),
    hidden: new Set(state.hidden),
    classes: new Map(state.classes),
    shapes: new Map(state.shapes),
    prompts: new Map(state.prompts),
    added: [...state.added],
  };
}

/** Return an object of an answer with its mask as `shape`; without a mask, its box. */
export function withShape(entry, width, height) {
  return { ...entry, shape: entry.mask ? fromRle(entry.mask) : fromBox(entry.box, width, height) };
}

export class Objects {
  /** @param onchange Called after every change. */
  constructor(onchange) {
    this.onchange = onchange;
    this.nextId = 1;
    this.clear(0, 0);
  }

  /** Forget everything, for an image of this size. */
  clear(width, height) {
    [this.width, this.height] = [width, height];
    this.base = []; // candidates or stored objects, each with a key
    this.selected = [];
    this.active = null;
    this.state = emptyState();
    this.past = [];
    this.future = [];
  }

  /** Take the objects of an answer: candidates of a prediction (`prefix` c) or objects of a store (`prefix` s). */
  setBase(entries, prefix) {
    this.base = entries.map((entry) => ({ ...withShape(entry, this.width, this.height), key: `${prefix}${entry.id}` }));
    this.selected = this.base;
    // What was changed about other candidates is over; what a person has added stays.
    this.state = { ...emptyState(), added: this.state.added, prompts: this.state.prompts };
    [this.past, this.future] = [[], []];
    if (!this.get(this.active)) this.active = null;
  }

  /** Return what is shown, most confident first, then what was added. */
  list() {
    const { removed, classes, shapes, hidden, added } = this.state;
    const all = [...this.selected, ...added].filter((object) => !removed.has(object.key));
    return all.map((object) => {
      const shape = shapes.get(object.key) || object.shape;
      const isChanged = shapes.has(object.key);
      return {
        ...object,
        class: classes.get(object.key) || object.class,
        shape,
        box: isChanged ? shape.box : object.box,
        area: isChanged ? shape.area : object.area,
        isHidden: hidden.has(object.key),
        isAdded: object.key.startsWith("a"),
        isChanged,
      };
    });
  }

  get(key) {
    return key === null ? undefined : this.list().find((object) => object.key === key);
  }

  /** Return the smallest object at a point. */
  at([x, y]) {
    const under = this.list().filter((object) => !object.isHidden && contains(object.shape, x, y));
    return under.sort((a, b) => a.area - b.area)[0];
  }

  change(action) {
    this.past.push(this.state);
    if (this.past.length > LIMIT) this.past.shift();
    this.future = [];
    this.state = copyOf(this.state);
    action(this.state);
    this.onchange();
  }

  undo() {
    return this.step(this.past, this.future);
  }

  redo() {
    return this.step(this.future, this.past);
  }

  step(from, to) {
    if (!from.length) return false;
    to.push(this.state);
    this.state = from.pop();
    if (!this.get(this.active)) this.active = null;
    this.onchange();
    return true;
  }

  remove(key) {
    const order = this.list().map((object) => object.key);
    this.active = order[order.indexOf(key) + 1] ?? order[order.indexOf(key) - 1] ?? null;
    this.change((state) => state.removed.add(key));
  }

  relabel(key, name) {
    this.change((state) => state.classes.set(key, name));
  }

  toggle(key) {
    this.change((state) => (state.hidden.has(key) ? state.hidden.delete(key) : state.hidden.add(key)));
  }

  setShape(key, shape) {
    this.change((state) => state.shapes.set(key, shape));
  }

  /** Add an object that was prompted, or change the mask of one; return its key. */
  setPrompted(key, prompts, shape, name, score) {
    const isNew = key === null;
    const id = isNew ? `a${this.nextId++}` : key;
    this.active = id;
    this.change((state) => {
      if (isNew) state.added.push({ key: id, id, class: name, score, box: shape.box, area: shape.area, shape });
      else state.shapes.set(id, shape);
      state.prompts.set(id, prompts);
    });
    return id;
  }

  promptsOf(key) {
    return this.state.prompts.get(key);
  }
}
