// Tools of the canvas: move and choose, box, point, brush and eraser. Each works by pointer and by keyboard.

import { fromBytes, toBytes } from "./rle.js";

function boxOf([x1, y1], [x2, y2], { width, height }) {
  const clip = (value, limit) => Math.min(Math.max(value, 0), limit);
  const [left, right] = [clip(Math.min(x1, x2), width), clip(Math.max(x1, x2), width)];
  const [top, bottom] = [clip(Math.min(y1, y2), height), clip(Math.max(y1, y2), height)];
  return [left, top, right, bottom].map((value) => Math.round(value * 10) / 10);
}

const isEnter = (event) => event.key === "Enter" || event.key === " ";

/** Choose an object; dragging moves the image. */
export function moveTool(context) {
  return {
    name: "move",
    hint: "Click an object to choose it, drag to move the image, turn the wheel to zoom.",
    down(point, event) {
      if (event.button === 0) context.choose(context.objects.at(point)?.key ?? null);
      return false;
    },
  };
}

/** Draw a box around an object. */
export function boxTool(context) {
  const { viewer } = context;
  let start = null;
  let end = null;
  const finish = () => {
    const box = start && end ? boxOf(start, end, viewer) : null;
    [start, end] = [null, null];
    viewer.draw();
    if (box && box[2] - box[0] >= 2 && box[3] - box[1] >= 2) context.promptBox(box);
  };
  return {
    name: "box",
    hint: "Drag a box around an object. By keyboard: arrows move the cross, Enter sets two corners.",
    usesCursor: true,
    down(point, event) {
      if (event.button !== 0) return false;
      [start, end] = [point, point];
      return true;
    },
    move(point) {
      end = point;
      viewer.draw();
    },
    up: finish,
    hover(point) {
      if (start) end = point;
    },
    key(event, cursor) {
      if (event.key === "Escape" && start) [start, end] = [null, null];
      else if (isEnter(event) && cursor) {
        if (start) {
          end = cursor;
          finish();
        } else [start, end] = [cursor, cursor];
      } else return false;
      return true;
    },
    draw(canvas, unit) {
      if (!start) return;
      const [x1, y1, x2, y2] = boxOf(start, end, viewer);
      canvas.setLineDash([5 * unit, 4 * unit]);
      for (const [color, width] of [["#000", 3], ["#fff", 1.5]]) {
        [canvas.strokeStyle, canvas.lineWidth] = [color, width * unit];
        canvas.strokeRect(x1, y1, x2 - x1, y2 - y1);
      }
      canvas.setLineDash([]);
    },
  };
}

/** Click on an object, or on what does not belong to it. */
export function pointTool(context) {
  const { viewer } = context;
  return {
    name: "point",
    hint: "Left click: this belongs to the object. Right click: this does not. By keyboard: arrows, Enter (yes), N (no); Escape begins the next object.",
    usesCursor: true,
    down(point, event) {
      if (event.button === 1 || !viewer.isInside(point)) return false;
      context.promptPoint(point, event.button === 2 || event.shiftKey ? 0 : 1);
      return true;
    },
    key(event, cursor) {
      if (!cursor) return false;
      if (isEnter(event)) context.promptPoint(cursor, 1);
      else if (event.key.toLowerCase() === "n") context.promptPoint(cursor, 0);
      else return false;
      return true;
    },
  };
}

/** Paint pixels into the mask of the chosen object, or erase them. */
export function brushTool(context, isEraser) {
  const { viewer } = context;
  const value = isEraser ? 0 : 1;
  let stroke = null;
  let place = null;

  function dab([x, y]) {
    const radius = context.brushSize() / 2;
    const { bytes } = stroke;
    const { width, height } = viewer;
    for (let row = Math.max(0, Math.ceil(y - radius - 0.5)); row < Math.min(height, y + radius - 0.5 + 1); row++) {
      const half = Math.sqrt(Math.max(0, radius * radius - (row + 0.5 - y) ** 2));
      const [from, to] = [Math.max(0, Math.round(x - half)), Math.min(width, Math.round(x + half))];
      if (to > from) bytes.fill(value, row * width + from, row * width + to);
    }
  }

  function line(from, to) {
    const steps = Math.max(1, Math.ceil(Math.hypot(to[0] - from[0], to[1] - from[1]) / (context.brushSize() / 4)));
    for (let i = 1; i <= steps; i++) {
      dab([from[0] + ((to[0] - from[0]) * i) / steps, from[1] + ((to[1] - from[1]) * i) / steps]);
    }
    stroke.last = to;
    context.preview(stroke.key, fromBytes(stroke.bytes, viewer.width, viewer.height));
  }

  function begin(point) {
    const object = context.paintable(point);
    if (!object) return false;
    stroke = { key: object.key, bytes: toBytes(object.shape), last: point };
    line(point, point);
    return true;
  }

  function finish() {
    if (!stroke) return;
    const { key, bytes } = stroke;
    stroke = null;
    context.setShape(key, fromBytes(bytes, viewer.width, viewer.height));
  }

  return {
    name: isEraser ? "eraser" : "brush",
    hint: `Drag to ${isEraser ? "erase from" : "paint on"} the chosen object; [ and ] change the size. By keyboard: arrows, Enter.`,
    usesCursor: true,
    down(point, event) {
      return event.button === 0 && begin(point);
    },
    move(point) {
      place = point;
      line(stroke.last, point);
    },
    up: finish,
    hover(point) {
      place = point;
      viewer.draw();
    },
    key(event, cursor) {
      if (!isEnter(event) || !cursor) return false;
      if (begin(cursor)) finish();
      return true;
    },
    draw(canvas, unit) {
      if (!place) return;
      for (const [color, width] of [["#000", 3], ["#fff", 1.5]]) {
        [canvas.strokeStyle, canvas.lineWidth] = [color, width * unit];
        canvas.beginPath();
        canvas.arc(place[0], place[1], context.brushSize() / 2, 0, 2 * Math.PI);
        canvas.stroke();
      }
    },
  };
}
