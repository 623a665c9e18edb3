// An image of a store in Try: its objects are corrected there, and saved as decisions.

import * as api from "./api.js";
import { button, countOf, el, guarded, tell } from "./dom.js";
import { toRle } from "./rle.js";

export class StoredSource {
  constructor(place, view) {
    [this.place, this.view] = [place, view];
    this.isOpen = false;
    this.classes = [];
    this.text = el("span");
    this.saveButton = button("Save to the store", () => guarded(() => this.save()), { class: "main" });
    place.append(this.text, this.saveButton, button("Back", () => this.back()));
    place.hidden = true;
  }

  /** Open an image of a store. */
  async open(store, id, from) {
    tell("Opening …", "busy");
    const [stored, picture, page] = await Promise.all([
      api.storedPicture(store, id), api.openStored(store, id), api.storedPictures(store, { cursor: 0 }),
    ]);
    [this.store, this.from, this.stored, this.classes] = [store, from, stored, page.classes];
    await this.view.show({ ...picture, name: stored.name }, api.pictureUrl(picture.id));
    this.isOpen = true;
    this.view.objects.setBase(stored.detections, "s");
    this.view.toolbar.setClasses(page.classes);
    this.view.list.setClasses(page.classes);
    this.place.hidden = false;
    document.body.classList.add("from-store");
    this.view.changed();
    tell("");
  }

  leave() {
    this.isOpen = false;
    this.place.hidden = true;
    document.body.classList.remove("from-store");
  }

  back() {
    const { from } = this;
    this.leave();
    this.view.router.go(from);
    this.view.start();
  }

  update() {
    if (!this.isOpen) return;
    const number = this.edits().flat().length;
    this.text.textContent = `${this.stored.name}, from store ${this.store}: ${countOf(number, "change")}`;
    this.saveButton.disabled = !number;
  }

  /** Return the decisions, in batches in which each object comes once. */
  edits() {
    const { objects } = this.view;
    const { removed, classes, shapes, added } = objects.state;
    const idOf = (key) => objects.base.find((object) => object.key === key)?.object_id;
    const masks = [...shapes].filter(([key]) => idOf(key) && !removed.has(key)).map(([key, shape]) => {
      return { action: "mask", object_id: idOf(key), mask: toRle(shape) };
    });
    const names = [...classes].filter(([key]) => idOf(key) && !removed.has(key)).map(([key, name]) => {
      return { action: "relabel", object_id: idOf(key), class: name, new_class: true };
    });
    const gone = [...removed].filter(idOf).map((key) => ({ action: "reject", object_id: idOf(key) }));
    const current = new Map(objects.list().map((object) => [object.key, object]));
    const news = added.filter((object) => current.has(object.key)).map((object) => {
      const { shape, class: name } = current.get(object.key);
      return { action: "add", picture: this.stored.id, class: name, mask: toRle(shape), new_class: true };
    });
    return [[...masks, ...gone, ...news], names].filter((batch) => batch.length);
  }

  async save() {
    const batches = this.edits();
    for (const batch of batches) await api.edit(this.store, batch, this.view.router.author);
    const number = batches.flat().length;
    const { store, stored, from } = this;
    await this.open(store, stored.id, from);
    tell(`${countOf(number, "change")} saved to store ${store}.`);
  }
}
