// A canvas with an image, masks on it, and a view that can be zoomed and moved, by pointer, wheel and keyboard.

import { outline, paint } from "./rle.js";
import { pixelOf } from "./colors.js";

/** Largest number of pixels of the layer of masks; of larger images it shows every second, third... pixel. */
const MAX_LAYER = 16e6;
const MAX_ZOOM = 8;
const isDark = matchMedia("(prefers-color-scheme: dark)");

export class Viewer {
  /**
   * @param canvas The canvas, whose parent decides its size.
   * @param options `onview(viewer)` is called when a person has changed the view.
   */
  constructor(canvas, { onview = () => {} } = {}) {
    this.canvas = canvas;
    this.context = canvas.getContext("2d");
    this.layer = document.createElement("canvas");
    this.image = null;
    this.width = this.height = 0;
    this.scale = 1; // CSS pixels for each pixel of the image
    this.offset = [0, 0]; // of the image in the canvas, in CSS pixels
    this.isFitted = true;
    this.tool = null; // { down, move, up, usesCursor } with points in pixels of the image
    this.cursor = null; // where the keyboard is, in pixels of the image
    this.decorate = () => {};
    this.onview = onview;
    this.outlined = [];
    this.pointers = new Map();
    this.listen();
    new ResizeObserver(() => this.resized()).observe(canvas.parentElement);
    isDark.addEventListener("change", () => this.draw());
  }

  /** Show an image; its size decides the coordinates. */
  setPicture(image, width, height, keepView = false) {
    const isSame = this.width === width && this.height === height;
    [this.image, this.width, this.height] = [image, width, height];
    this.step = Math.max(1, Math.ceil(Math.sqrt((width * height) / MAX_LAYER)));
    const [layerWidth, layerHeight] = [Math.ceil(width / this.step), Math.ceil(height / this.step)];
    if (!isSame || !this.pixels) {
      [this.layer.width, this.layer.height] = [layerWidth, layerHeight];
      this.data = new ImageData(layerWidth, layerHeight);
      this.pixels = new Uint32Array(this.data.data.buffer);
    }
    this.clearShapes();
    if (!(keepView && isSame)) {
      this.cursor = null;
      this.fit();
    } else this.draw();
  }

  clearShapes() {
    this.pixels.fill(0);
    this.painted = null;
    this.layer.getContext("2d").clearRect(0, 0, this.layer.width, this.layer.height);
    this.outlined = [];
  }

  /** Return first and last row of the layer that shapes are in; null if there is none. */
  around(shapes) {
    if (!shapes.length) return null;
    const top = Math.min(...shapes.map(({ mask }) => mask.box[1]));
    const bottom = Math.max(...shapes.map(({ mask }) => mask.box[3]));
    return [Math.floor(top / this.step), Math.ceil(bottom / this.step)];
  }

  clearPixels(rows) {
    if (rows) this.pixels.fill(0, rows[0] * this.layer.width, rows[1] * this.layer.width);
  }

  put(rows) {
    if (!rows) return;
    this.layer.getContext("2d").putImageData(this.data, 0, 0, 0, rows[0], this.layer.width, rows[1] - rows[0]);
  }

  /** Draw masks: { mask, color, opacity, line, width }, with a line around those that have a `line` (a color). */
  setShapes(shapes) {
    if (!this.pixels) return;
    const filled = shapes.filter(({ mask, opacity }) => opacity > 0 && mask.area);
    const before = this.painted;
    this.clearPixels(before);
    for (const { mask, color, opacity } of filled) {
      paint(this.pixels, this.layer.width, mask, pixelOf(color, opacity), this.step);
    }
    this.painted = this.around(filled);
    const changed = [before, this.painted].filter(Boolean);
    if (changed.length) this.put([Math.min(...changed.map(([top]) => top)), Math.max(...changed.map(([, bottom]) => bottom))]);
    this.outlined = shapes.filter((shape) => shape.line);
    this.drawNow();
  }

  draw() {
    if (this.isWaiting) return;
    this.isWaiting = true;
    requestAnimationFrame(() => {
      this.isWaiting = false;
      this.drawNow();
    });
  }

  drawNow() {
    const ratio = window.devicePixelRatio || 1;
    const { context } = this;
    context.setTransform(1, 0, 0, 1, 0, 0);
    context.clearRect(0, 0, this.canvas.width, this.canvas.height);
    if (!this.width) return;
    const scale = this.scale * ratio;
    context.setTransform(scale, 0, 0, scale, this.offset[0] * ratio, this.offset[1] * ratio);
    context.imageSmoothingEnabled = this.scale * ratio < 2;
    if (this.image) context.drawImage(this.image, 0, 0, this.width, this.height);
    context.drawImage(this.layer, 0, 0, this.layer.width * this.step, this.layer.height * this.step);
    for (const { mask, line, dashed, width = 2 } of this.outlined) {
      const path = outline(mask);
      context.setLineDash([]);
      context.lineWidth = (width + 2) / this.scale;
      context.strokeStyle = "#0008";
      context.stroke(path);
      context.lineWidth = width / this.scale;
      context.strokeStyle = line;
      if (dashed) context.setLineDash([6 / this.scale, 4 / this.scale]);
      context.stroke(path);
    }
    context.setLineDash([]);
    this.decorate(context, 1 / this.scale);
    if (this.cursor && document.activeElement === this.canvas) this.drawCursor(context);
  }

  drawCursor(context) {
    const [x, y] = this.cursor;
    const size = 11 / this.scale;
    for (const [color, width] of [["#000", 4], ["#fff", 2]]) {
      context.strokeStyle = color;
      context.lineWidth = width / this.scale;
      context.beginPath();
      context.moveTo(x - size, y);
      context.lineTo(x + size, y);
      context.moveTo(x, y - size);
      context.lineTo(x, y + size);
      context.stroke();
    }
  }

  resized() {
    const ratio = window.devicePixelRatio || 1;
    const { clientWidth, clientHeight } = this.canvas.parentElement;
    this.canvas.width = Math.max(1, Math.round(clientWidth * ratio));
    this.canvas.height = Math.max(1, Math.round(clientHeight * ratio));
    if (this.isFitted) this.fit();
    else this.drawNow();
  }

  /** Show the whole image. */
  fit() {
    const { clientWidth, clientHeight } = this.canvas.parentElement;
    if (this.width && clientWidth) {
      this.scale = Math.min(clientWidth / this.width, clientHeight / this.height, MAX_ZOOM);
      this.offset = [(clientWidth - this.width * this.scale) / 2, (clientHeight - this.height * this.scale) / 2];
    }
    this.isFitted = true;
    this.drawNow();
  }

  /** Zoom by a factor around a point of the canvas; without one, around its middle or the cursor. */
  zoom(factor, at = null) {
    const parent = this.canvas.parentElement;
    const middle = this.cursor ? this.toCanvas(...this.cursor) : [parent.clientWidth / 2, parent.clientHeight / 2];
    const [x, y] = at || middle;
    const least = Math.min(parent.clientWidth / this.width, parent.clientHeight / this.height, 1) / 4;
    const scale = Math.min(Math.max(this.scale * factor, least), MAX_ZOOM);
    const real = scale / this.scale;
    this.offset = [x - (x - this.offset[0]) * real, y - (y - this.offset[1]) * real];
    this.scale = scale;
    this.isFitted = false;
    this.draw();
    this.onview(this);
  }

  pan(dx, dy) {
    this.offset = [this.offset[0] + dx, this.offset[1] + dy];
    this.isFitted = false;
    this.draw();
    this.onview(this);
  }

  /** Take over the view of another viewer, whose image may be of another size. */
  follow(other) {
    [this.scale, this.offset, this.isFitted] = [other.scale, [...other.offset], other.isFitted];
    this.draw();
  }

  toCanvas(x, y) {
    return [x * this.scale + this.offset[0], y * this.scale + this.offset[1]];
  }

  /** Return where an event is, in pixels of the image. */
  pointOf(event) {
    const bounds = this.canvas.getBoundingClientRect();
    const [x, y] = [event.clientX - bounds.left - this.offset[0], event.clientY - bounds.top - this.offset[1]];
    return [x / this.scale, y / this.scale];
  }

  isInside([x, y]) {
    return x >= 0 && y >= 0 && x < this.width && y < this.height;
  }

  listen() {
    const { canvas } = this;
    canvas.addEventListener("wheel", (event) => {
      event.preventDefault();
      const bounds = canvas.getBoundingClientRect();
      const at = [event.clientX - bounds.left, event.clientY - bounds.top];
      this.zoom(Math.exp(-event.deltaY * (event.deltaMode ? 0.05 : 0.0015)), at);
    }, { passive: false });
    canvas.addEventListener("contextmenu", (event) => event.preventDefault());
    canvas.addEventListener("pointerdown", (event) => this.pointerDown(event));
    canvas.addEventListener("pointermove", (event) => this.pointerMove(event));
    for (const kind of ["pointerup", "pointercancel"]) {
      canvas.addEventListener(kind, (event) => this.pointerUp(event));
    }
    canvas.addEventListener("keydown", (event) => this.keyDown(event));
    for (const kind of ["focus", "blur"]) canvas.addEventListener(kind, () => this.draw());
  }

  pointerDown(event) {
    if (!this.width) return;
    this.canvas.setPointerCapture(event.pointerId);
    this.pointers.set(event.pointerId, [event.clientX, event.clientY]);
    this.cursor = null;
    const point = this.pointOf(event);
    this.isDrawing = event.button !== 1 && this.pointers.size === 1 && Boolean(this.tool?.down(point, event));
  }

  pointerMove(event) {
    const last = this.pointers.get(event.pointerId);
    if (!last) {
      if (this.width) this.tool?.hover?.(this.pointOf(event));
      return;
    }
    this.pointers.set(event.pointerId, [event.clientX, event.clientY]);
    if (this.pointers.size === 2) this.pinch(event.pointerId, last);
    else if (this.isDrawing) this.tool?.move?.(this.pointOf(event), event);
    else this.pan(event.clientX - last[0], event.clientY - last[1]);
  }

  pinch(id, last) {
    const [[, other]] = [...this.pointers].filter(([key]) => key !== id);
    const now = this.pointers.get(id);
    const distance = (point) => Math.hypot(point[0] - other[0], point[1] - other[1]) || 1;
    const bounds = this.canvas.getBoundingClientRect();
    const middle = [(now[0] + other[0]) / 2 - bounds.left, (now[1] + other[1]) / 2 - bounds.top];
    this.zoom(distance(now) / distance(last), middle);
  }

  pointerUp(event) {
    if (this.pointers.delete(event.pointerId) && this.isDrawing) {
      this.isDrawing = false;
      this.tool?.up?.(this.pointOf(event), event);
    }
  }

  keyDown(event) {
    if (!this.width || event.ctrlKey || event.metaKey || event.altKey) return;
    const arrows = { ArrowLeft: [-1, 0], ArrowRight: [1, 0], ArrowUp: [0, -1], ArrowDown: [0, 1] };
    const simple = { "+": () => this.zoom(1.25), "=": () => this.zoom(1.25), "-": () => this.zoom(0.8) };
    simple["0"] = () => {
      this.fit();
      this.onview(this);
    };
    if (event.key in simple) simple[event.key]();
    else if (event.key in arrows) {
      const [dx, dy] = arrows[event.key];
      if (this.tool?.usesCursor) this.moveCursor(dx, dy, event.shiftKey ? 10 : 1);
      else this.pan(-40 * dx, -40 * dy);
    } else if (this.tool?.key?.(event, this.cursor)) this.draw();
    else return;
    event.preventDefault();
    event.stopPropagation();
  }

  /** Move the cursor of the keyboard; it starts in the middle, and the view follows it. */
  moveCursor(dx, dy, pixels) {
    const size = Math.max(1, pixels / Math.min(this.scale, 1));
    const [x, y] = this.cursor || [Math.floor(this.width / 2), Math.floor(this.height / 2)];
    const clip = (value, limit) => Math.min(Math.max(value, 0), limit - 1);
    this.cursor = [clip(x + dx * size, this.width), clip(y + dy * size, this.height)];
    const [cx, cy] = this.toCanvas(...this.cursor);
    const { clientWidth, clientHeight } = this.canvas.parentElement;
    const beyond = (value, limit) => Math.min(0, value - 20) || Math.max(0, value - limit + 20);
    this.offset[0] -= beyond(cx, clientWidth);
    this.offset[1] -= beyond(cy, clientHeight);
    this.tool?.hover?.(this.cursor);
    this.draw();
  }
}

/** Load an image of the server, or of a file. */
export function loadImage(url) {
  return new Promise((done, fail) => {
    const image = new Image();
    image.onload = () => done(image);
    image.onerror = () => fail(new Error("The image cannot be shown; its file may be gone or have changed."));
    image.src = url;
  });
}
