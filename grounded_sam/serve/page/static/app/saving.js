// Files to save, and the same run as a command and as Python.

import { toRle } from "./rle.js";

const round = (value) => Math.round(value * 1000) / 1000;

/** Return objects as a COCO file. */
export function toCoco(picture, objects, classes) {
  const names = [...new Set([...classes, ...objects.map((object) => object.class)])];
  return {
    images: [{ id: 1, file_name: picture.name, width: picture.width, height: picture.height }],
    annotations: objects.map((object, i) => {
      const [x1, y1, x2, y2] = object.box;
      return {
        id: i + 1,
        image_id: 1,
        category_id: names.indexOf(object.class) + 1,
        bbox: [round(x1), round(y1), round(x2 - x1), round(y2 - y1)],
        area: object.area,
        iscrowd: 0,
        segmentation: object.isChanged || !object.mask ? toRle(object.shape) : object.mask,
        score: object.score,
      };
    }),
    categories: names.map((name, i) => ({ id: i + 1, name })),
  };
}

const blobOf = (canvas) => new Promise((done) => canvas.toBlob(done, "image/png"));

function canvasOf(width, height) {
  const canvas = document.createElement("canvas");
  [canvas.width, canvas.height] = [width, height];
  return canvas;
}

/** Return the image with its masks as PNG, in full size. */
export function drawnPng(viewer) {
  const canvas = canvasOf(viewer.width, viewer.height);
  const context = canvas.getContext("2d");
  context.drawImage(viewer.image, 0, 0, viewer.width, viewer.height);
  context.drawImage(viewer.layer, 0, 0, viewer.layer.width * viewer.step, viewer.layer.height * viewer.step);
  return blobOf(canvas);
}

/** Return the pixels of objects as PNG, transparent around them, and no larger than they are. */
export function cutOutPng(image, objects, width, height) {
  const boxes = objects.map((object) => object.shape.box);
  const [x1, y1] = [0, 1].map((i) => Math.min(...boxes.map((box) => box[i])));
  const [x2, y2] = [2, 3].map((i) => Math.max(...boxes.map((box) => box[i])));
  const canvas = canvasOf(x2 - x1, y2 - y1);
  const context = canvas.getContext("2d");
  for (const { shape } of objects) {
    for (let i = 0; i < shape.spans.length; i += 3) {
      context.rect(shape.spans[i + 1] - x1, shape.spans[i] - y1, shape.spans[i + 2] - shape.spans[i + 1], 1);
    }
  }
  context.clip();
  context.drawImage(image, -x1, -y1, width, height);
  return blobOf(canvas);
}

/** Return the settings that are not as the server was started with. */
export function differing(settings, initial) {
  return Object.fromEntries(
    Object.entries(settings).filter(
      ([key, value]) => key in initial && JSON.stringify(value) !== JSON.stringify(initial[key]),
    ),
  );
}

/** Write a value as Hydra reads it. */
function toHydra(value) {
  if (value === null) return "null";
  if (Array.isArray(value)) return `[${value.map(toHydra).join(", ")}]`;
  if (typeof value === "object") {
    const keyOf = (key) => key.replace(/[\\()[\]{}:=,"']/g, "\\$&");
    return `{${Object.entries(value).map(([key, item]) => `${keyOf(key)}: ${toHydra(item)}`).join(", ")}}`;
  }
  const isPlain = typeof value !== "string" || /^[\w./:@+-]*[A-Za-z][\w./@+-]*( [\w./@+-]+)*$/.test(value);
  const isOther = typeof value === "string" && /^(true|false|null|nan|inf|yes|no|on|off|[\d_.]+e[+-]?\d+)$/i.test(value);
  return isPlain && !isOther ? String(value) : `"${String(value).replaceAll("\\", "\\\\").replaceAll('"', '\\"')}"`;
}

function toShell(word) {
  return /^[\w./=:@%+-]+$/.test(word) ? word : `'${word.replaceAll("'", `'\\''`)}'`;
}

/** Write a value as Python. */
function toPython(value) {
  if (value === null) return "None";
  if (typeof value === "boolean") return value ? "True" : "False";
  if (Array.isArray(value)) return `[${value.map(toPython).join(", ")}]`;
  if (typeof value === "object") {
    return `{${Object.entries(value).map(([key, item]) => `${toPython(key)}: ${toPython(item)}`).join(", ")}}`;
  }
  return JSON.stringify(value);
}

/** Return the command that finds the same. */
export function toCommand(name, words, settings, overrides) {
  const parts = ["grounded-sam", ...overrides, `input=${toHydra(name)}`];
  if (words.text !== undefined) parts.push(`text=${toHydra(words.text)}`);
  if (words.negatives?.length) parts.push(`negative=${toHydra(words.negatives)}`);
  for (const [key, value] of Object.entries(settings)) parts.push(`select.${key}=${toHydra(value)}`);
  return parts.map(toShell).join(" ");
}

/** Return the Python code that finds the same. */
export function toPythonCode(name, words, settings, overrides) {
  const isPreset = (word) => /^preset=\w+$/.test(word);
  const presets = overrides.filter(isPreset).map((word) => word.slice(7));
  const others = overrides.filter((word) => !isPreset(word));
  if (words.negatives?.length) others.push(`negative=${toHydra(words.negatives)}`);
  const given = [...others.map(toPython), ...presets.map((word) => `preset=${toPython(word)}`)];
  const options = Object.entries(settings).map(([key, value]) => `${key}=${toPython(value)}`);
  const call = [toPython(name), ...(words.text === undefined ? [] : [toPython(words.text)]), ...options];
  return `from grounded_sam import load\n\nmodel = load(${given.join(", ")})\ndetections = model.segment(${call.join(", ")})`;
}
