// A grid of images of which only those in sight are in the document; pages are read when they are needed.

import { el, guarded } from "./dom.js";

const PAGE = 50;
const [CELL, HEIGHT] = [150, 140];

export class Grid {
  /** @param options `load(cursor)` reads a page, `thumbnail(picture)` is a URL, `choose(index)` is called by clicks. */
  constructor(place, options) {
    [this.place, this.options] = [place, options];
    this.space = el("div", { role: "presentation" });
    place.append(this.space);
    this.cells = new Map();
    this.pages = new Map();
    [this.total, this.current, this.columns] = [0, -1, 1];
    place.addEventListener("scroll", () => this.draw());
    new ResizeObserver(() => this.draw()).observe(place);
  }

  reset(first) {
    this.total = first.total;
    this.pages = new Map([[0, Promise.resolve(first.pictures)]]);
    this.read = new Map([[0, first.pictures]]);
    this.current = -1;
    for (const cell of this.cells.values()) cell.remove();
    this.cells.clear();
    this.place.scrollTop = 0;
    this.draw();
  }

  page(number) {
    if (!this.pages.has(number)) {
      const loading = this.options.load(number * PAGE).then((page) => {
        this.read.set(number, page.pictures);
        return page.pictures;
      });
      loading.catch(() => this.pages.delete(number));
      this.pages.set(number, loading);
    }
    return this.pages.get(number);
  }

  async get(index) {
    return (await this.page(Math.floor(index / PAGE)))[index % PAGE];
  }

  known(index) {
    return this.read?.get(Math.floor(index / PAGE))?.[index % PAGE];
  }

  indexOf(id) {
    for (const [number, pictures] of this.read || []) {
      const at = pictures.findIndex((picture) => picture.id === id);
      if (at >= 0) return number * PAGE + at;
    }
    return -1;
  }

  /** Replace what is known of an image. */
  update(picture) {
    const index = this.indexOf(picture.id);
    if (index < 0) return;
    this.read.get(Math.floor(index / PAGE))[index % PAGE] = picture;
    const cell = this.cells.get(index);
    if (cell) this.fill(cell, picture, index);
  }

  setCurrent(index) {
    this.cells.get(this.current)?.classList.remove("current");
    this.current = index;
    const top = Math.floor(index / this.columns) * HEIGHT;
    if (top < this.place.scrollTop) this.place.scrollTop = top;
    const bottom = top + HEIGHT - this.place.clientHeight;
    if (bottom > this.place.scrollTop) this.place.scrollTop = bottom;
    this.draw();
    this.cells.get(index)?.classList.add("current");
    this.place.setAttribute("aria-activedescendant", `cell-${index}`);
  }

  draw() {
    const { clientWidth, clientHeight, scrollTop } = this.place;
    if (!clientWidth) return;
    this.columns = Math.max(1, Math.floor(clientWidth / CELL));
    const width = clientWidth / this.columns;
    this.space.style.height = `${Math.ceil(this.total / this.columns) * HEIGHT}px`;
    const first = Math.max(0, Math.floor(scrollTop / HEIGHT) - 1) * this.columns;
    const last = Math.min(this.total, (Math.ceil((scrollTop + clientHeight) / HEIGHT) + 1) * this.columns);
    for (const [index, cell] of this.cells) {
      if (index < first || index >= last) {
        cell.remove();
        this.cells.delete(index);
      }
    }
    for (let index = first; index < last; index++) {
      let cell = this.cells.get(index);
      if (!cell) {
        cell = el("figure", { class: "cell", id: `cell-${index}`, role: "gridcell", onclick: () => this.options.choose(index) });
        this.cells.set(index, cell);
        this.space.append(cell);
        this.load(cell, index);
      }
      cell.classList.toggle("current", index === this.current);
      const place = { left: (index % this.columns) * width, top: Math.floor(index / this.columns) * HEIGHT, width, height: HEIGHT };
      for (const [key, value] of Object.entries(place)) cell.style.setProperty(key, `${value}px`);
    }
  }

  load(cell, index) {
    const known = this.known(index);
    if (known) this.fill(cell, known, index);
    else {
      guarded(async () => {
        const picture = await this.get(index);
        if (picture && this.cells.get(index) === cell) this.fill(cell, picture, index);
      });
    }
  }

  fill(cell, picture, index) {
    const { predicted = 0, ...decided } = picture.statuses;
    const isDone = !predicted && Object.values(decided).some(Boolean);
    cell.classList.toggle("done", isDone);
    const name = `${picture.name}, ${picture.objects} objects`;
    cell.setAttribute("aria-label", `${index + 1}: ${name}${isDone ? ", reviewed" : ""}`);
    const caption = `${picture.name} · ${picture.objects}`;
    if (cell.dataset.id === picture.id) {
      cell.querySelector("figcaption").textContent = caption;
      return;
    }
    cell.dataset.id = picture.id;
    cell.title = name;
    cell.replaceChildren(el("img", { src: this.options.thumbnail(picture), alt: "", loading: "lazy" }), el("figcaption", {}, caption));
  }
}
