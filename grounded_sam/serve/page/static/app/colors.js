// Colors of classes, as the command draws them.

let palette = { named: {}, default: ["#a351fb"] };
const own = new Map();

/** Set the palette of the server. */
export function setPalette(given) {
  palette = given;
}

/** Set the colors of classes that the words define. */
export function setColors(classes, colors) {
  classes.forEach((name, i) => own.set(name, colors[i]));
}

/** Return the color of a class, `#rrggbb`. */
export function colorOf(name, index = 0) {
  if (own.has(name)) return own.get(name);
  return colorIn(name) || palette.default[index % palette.default.length];
}

function colorIn(name) {
  return name.toLowerCase().split(/[^a-z]+/).map((word) => palette.named[word]).find(Boolean);
}

/** Return the color of a track: the one in the name of its class if all classes have one, else one of its own. */
export function colorOfTrack(id, name, classes) {
  if ([name, ...classes].every(colorIn)) return colorIn(name);
  return palette.default[(Math.abs(id) * 8) % palette.default.length];
}

/** Return a color as a pixel of an ImageData that is seen as Uint32Array. */
export function pixelOf(color, opacity) {
  const value = parseInt(color.slice(1), 16);
  const [red, green, blue] = [value >> 16, (value >> 8) & 255, value & 255];
  return ((Math.round(opacity * 255) << 24) | (blue << 16) | (green << 8) | red) >>> 0;
}
