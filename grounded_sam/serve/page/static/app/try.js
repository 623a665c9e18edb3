// The view Try: an image, words, what is found, and corrections.

import * as api from "./api.js";
import { Viewer, loadImage } from "./canvas.js";
import { colorOf, setColors } from "./colors.js";
import { button, countOf, debounce, guarded, isTyping, save, tell } from "./dom.js";
import { examplePictures, firstPicture } from "./first.js";
import { drawLabels } from "./labels.js";
import { ObjectList } from "./object_list.js";
import { Objects } from "./objects.js";
import { makePicker, takeDrops } from "./picker.js";
import { Prompts } from "./prompts.js";
import { cutOutPng, differing, drawnPng, toCoco } from "./saving.js";
import { select } from "./selection.js";
import { Sliders } from "./sliders.js";
import { StoredSource } from "./stored_source.js";
import { Toolbar } from "./toolbar.js";
import { Recipe } from "./recipe.js";
import { Words } from "./words.js";

const EXAMPLE_WORDS = ["red circle", "blue square", "green star", "yellow triangle", "orange ring", "purple cross"];
/** Opacity of masks, and of the one that is chosen. */
const [OPACITY, CHOSEN] = [0.5, 0.7];
/** Largest number of objects that all have a line around them. */
const OUTLINED = 40;

export class TryView {
  constructor(place, about, router) {
    [this.place, this.about, this.router] = [place, about, router];
    const find = (name) => place.querySelector(`[data-part="${name}"]`);
    this.initial = about.settings.select;
    this.settings = { ...this.initial };
    delete this.settings.status;
    this.floor = Math.min(0.1, this.initial.score / 2);
    this.picture = this.prediction = null;
    this.viewer = new Viewer(find("canvas"));
    this.viewer.decorate = (context, unit) => this.decorate(context, unit);
    this.objects = new Objects(() => this.changed());
    this.prompts = new Prompts(this);
    this.words = new Words(find("words"), "try-words", () => this.find());
    this.list = new ObjectList(find("objects"), this);
    this.toolbar = new Toolbar(find("tools"), this);
    this.sliders = new Sliders(find("sliders"), (s) => this.stepped(s), (s) => this.released(s));
    this.reconcile = debounce(() => guarded(() => this.compareWithServer()), 300);
    this.recipe = new Recipe(find("recipe"), this);
    this.stored = new StoredSource(find("stored"), this);
    this.makePickers(find);
    this.makeSaving(find("saving"));
    find("find").addEventListener("click", () => this.find());
    document.addEventListener("keydown", (event) => this.keyDown(event));
  }

  makePickers(find) {
    const pictures = examplePictures(this.about);
    const onchoose = (given) => guarded(() => this.open(given));
    makePicker(find("picker"), { kind: "image", examples: pictures, onchoose });
    takeDrops("image", () => this.router.current === "try", onchoose);
    this.pictures = pictures;
  }

  makeSaving(place) {
    const withObjects = (action) => () => guarded(async () => {
      const shown = this.objects.list().filter((object) => !object.isHidden);
      if (!shown.length) throw new Error("There is no object to save.");
      await action(shown, this.picture.name.replace(/\.[^.]*$/, ""));
    });
    place.append(
      button("COCO", withObjects((shown, name) => {
        const coco = toCoco(this.picture, shown, this.prediction?.classes || []);
        save(JSON.stringify(coco), `${name}.json`, "application/json");
      }), { title: "Boxes and masks as a COCO file" }),
      button("PNG", withObjects(async (shown, name) => save(await drawnPng(this.viewer), `${name}-masks.png`)), {
        title: "The image with its masks",
      }),
      button("Cut-out", withObjects(async (shown, name) => {
        const chosen = shown.filter((object) => object.key === this.objects.active);
        const { image, width, height } = this.viewer;
        save(await cutOutPng(image, chosen.length ? chosen : shown, width, height), `${name}-cut-out.png`);
      }), { title: "The chosen object, or all of them, on a transparent background" }),
    );
  }

  /** Show something at once: the first example, and what is in it. */
  async start() {
    this.words.set(this.about.classes.length ? this.about.classes : EXAMPLE_WORDS);
    if (this.pictures.length) await guarded(() => this.open(this.pictures[0], firstPicture));
  }

  /** Open an image: a File, or the path of an example, which may have been `sent` already. */
  async open(given, sent = null) {
    tell("Reading the image …", "busy");
    const picture = (await sent) || (await api.addPicture(given));
    const notes = picture.notes.join("; ");
    await this.show({ ...picture, source: typeof given === "string" ? given : picture.name }, api.pictureUrl(picture.id));
    this.stored.leave();
    tell(notes);
    this.find();
  }

  async show(picture, url) {
    this.abort?.abort();
    const image = await loadImage(url);
    this.picture = picture;
    this.prediction = null;
    this.objects.clear(picture.width, picture.height);
    this.prompts.reset();
    this.viewer.setPicture(image, picture.width, picture.height);
    this.place.querySelector("[data-part=name]").textContent = `${picture.name}, ${picture.width} × ${picture.height}`;
    this.changed();
  }

  /** Ask the server what is in the image. */
  find() {
    return guarded(async () => {
      this.words.commit();
      this.recipe.update();
      if (!this.picture) throw new Error("Open an image first.");
      if (this.stored.isOpen) throw new Error("This image is from a store: draw, relabel and save, or open another.");
      if (this.words.isEmpty) {
        this.prediction = null;
        this.objects.setBase([], "c");
        this.changed();
        tell("Type what to look for, and press Enter.");
        return;
      }
      this.abort?.abort();
      this.abort = new AbortController();
      const { picture, settings } = this;
      const known = new Set(this.words.ontology ? [] : this.words.classes);
      const scores = Object.entries(settings.class_score || {}).filter(([name]) => known.has(name));
      settings.class_score = scores.length ? Object.fromEntries(scores) : null;
      tell(this.about.ready ? "Looking …" : "The models are being loaded …", "busy");
      const body = {
        picture: picture.id, ...this.request(), min_score: this.floor, select: differing(settings, this.initial),
      };
      const started = performance.now();
      const answer = await api.predict(body, this.abort.signal);
      if (picture !== this.picture) return;
      this.take(answer);
      const seconds = ((performance.now() - started) / 1000).toFixed(1);
      tell(`${countOf(this.objects.list().length, "object")} in ${seconds} s`);
    });
  }

  /** The words of a request: those of the server are sent as none, since they may have phrases that the page lacks. */
  request() {
    const { words, about } = this;
    const isServers = JSON.stringify(words.request) === JSON.stringify({ text: about.classes });
    return isServers ? {} : words.request;
  }

  take(answer) {
    setColors(answer.classes, answer.colors);
    this.words.draw();
    this.prediction = { ...answer, has_masks: answer.objects.some((entry) => entry.mask) };
    this.objects.setBase(answer.objects, "c");
    this.sliders.setCandidates(this.objects.base, this.settings, this.prediction);
    this.toolbar.setClasses(answer.classes);
    this.list.setClasses(answer.classes);
    this.stepped(this.settings);
  }

  /** Select in the browser. */
  stepped(settings) {
    this.settings = settings;
    if (this.prediction) this.objects.selected = select(this.objects.base, settings, this.prediction);
    this.changed();
  }

  released(settings) {
    this.stepped(settings);
    this.reconcile();
  }

  /** Check the selection with that of the server, which counts. */
  async compareWithServer() {
    const { prediction, settings } = this;
    if (!prediction) return;
    const values = { ...settings };
    delete values.status;
    let answer;
    try {
      answer = await api.select({ prediction: prediction.prediction, select: values });
    } catch (error) {
      if (error.status !== 404 && error.status !== 409) throw error;
      this.floor = Math.min(this.floor, settings.score);
      await this.find();
      return;
    }
    if (prediction !== this.prediction || settings.score !== this.settings.score) return;
    const ids = this.objects.selected.map((object) => object.id);
    if (JSON.stringify(ids) === JSON.stringify(answer.selected)) return;
    const byId = new Map(this.objects.base.map((object) => [object.id, object]));
    this.objects.selected = answer.selected.map((id) => byId.get(id));
    this.changed();
  }

  /** Draw everything that depends on the objects. */
  changed() {
    const shown = this.objects.list();
    this.drawShapes(shown);
    this.list.show(shown, this.objects.active);
    this.recipe.update();
    this.toolbar.update();
    this.stored.update();
  }

  drawShapes(shown, preview = null) {
    const { active } = this.objects;
    const isOutlined = shown.length <= OUTLINED;
    const shapes = shown.filter((object) => !object.isHidden).map((object) => {
      const isActive = object.key === active;
      const mask = preview?.key === object.key ? preview.shape : object.shape;
      const color = this.colorOf(object.class);
      const line = preview ? null : isActive ? "#ffffff" : isOutlined ? "#ffffffb0" : null;
      return { mask, color, opacity: isActive ? CHOSEN : OPACITY, line, width: isActive ? 2.5 : 1 };
    });
    this.viewer.setShapes(shapes.reverse());
  }

  colorOf(name) {
    return colorOf(name, (this.prediction?.classes || this.stored.classes).indexOf(name));
  }

  decorate(context, unit) {
    const named = this.objects.list()
      .filter((object) => !object.isHidden && (this.toolbar.hasLabels || object.key === this.objects.active));
    drawLabels(context, unit, named.map((object) => ({
      text: object.isAdded ? object.class : `${object.class} ${object.score.toFixed(2)}`,
      box: object.box,
      color: this.colorOf(object.class),
    })));
    this.prompts.draw(context, unit);
    this.viewer.tool?.draw?.(context, unit);
  }

  choose(key) {
    this.objects.active = key;
    this.changed();
    this.list.scrollTo(key);
  }

  keyDown(event) {
    if (this.router.current !== "try" || document.querySelector("dialog[open]")) return;
    const key = event.key.toLowerCase();
    if ((event.ctrlKey || event.metaKey) && (key === "z" || key === "y") && !event.target.matches("input, textarea")) {
      event.preventDefault();
      this.step(key === "y" || event.shiftKey);
    } else if (!isTyping(event) && this.toolbar.key(event)) event.preventDefault();
  }

  step(isRedo) {
    if (!(isRedo ? this.objects.redo() : this.objects.undo())) tell(`There is nothing to ${isRedo ? "redo" : "undo"}.`);
  }
}
