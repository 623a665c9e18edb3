// Masks: compressed COCO RLE to spans of rows, and back. A mask is
//   { width, height, area, box: [x1, y1, x2, y2], spans: Int32Array }
// where spans holds y, x1, x2 (exclusive) of every stretch of a row, from top to bottom and left to right.

/** Return the run lengths of compressed COCO counts, background first, column by column. */
export function decodeCounts(counts) {
  const runs = [];
  for (let p = 0; p < counts.length; ) {
    let value = 0;
    let shift = 0;
    let more = true;
    while (more) {
      const bits = counts.charCodeAt(p++) - 48;
      value |= (bits & 31) << shift;
      shift += 5;
      more = (bits & 32) !== 0;
      if (!more && bits & 16 && shift < 32) value |= -1 << shift;
    }
    if (runs.length > 2) value += runs[runs.length - 2];
    runs.push(value);
  }
  return runs;
}

/** Return run lengths as compressed COCO counts. */
export function encodeCounts(runs) {
  let text = "";
  for (let i = 0; i < runs.length; i++) {
    let value = i > 2 ? runs[i] - runs[i - 2] : runs[i];
    let more = true;
    while (more) {
      let bits = value & 31;
      value >>= 5;
      more = bits & 16 ? value !== -1 : value !== 0;
      if (more) bits |= 32;
      text += String.fromCharCode(bits + 48);
    }
  }
  return text;
}

/** Return the mask of compressed COCO RLE: { size: [height, width], counts }. */
export function fromRle(rle) {
  const [height, width] = rle.size;
  const runs = decodeCounts(rle.counts);
  let [left, right, top, bottom] = [width, 0, height, 0];
  for (let i = 0, start = 0; i < runs.length; start += runs[i++]) {
    if (i % 2 === 0 || runs[i] === 0) continue;
    const last = start + runs[i] - 1;
    const [first, final] = [Math.floor(start / height), Math.floor(last / height)];
    left = Math.min(left, first);
    right = Math.max(right, final + 1);
    const oneColumn = first === final;
    top = Math.min(top, oneColumn ? start - first * height : 0);
    bottom = Math.max(bottom, oneColumn ? last - first * height + 1 : height);
  }
  if (right <= left) return emptyMask(width, height);
  const [boxWidth, boxHeight] = [right - left, bottom - top];
  const bytes = new Uint8Array(boxWidth * boxHeight);
  for (let i = 0, start = 0; i < runs.length; start += runs[i++]) {
    if (i % 2 === 0) continue;
    let x = Math.floor(start / height);
    let y = start - x * height;
    let at = (y - top) * boxWidth + x - left;
    for (let n = runs[i]; n > 0; n--) {
      bytes[at] = 1;
      if (++y === height) {
        y = 0;
        x++;
        at = -top * boxWidth + x - left;
      } else at += boxWidth;
    }
  }
  return spansOf(bytes, boxWidth, boxHeight, left, top, width, height);
}

/** Return a mask without any pixel. */
export function emptyMask(width, height) {
  return { width, height, area: 0, box: [0, 0, 0, 0], spans: new Int32Array(0) };
}

/** Return the mask of bytes, row by row, of a whole image. */
export function fromBytes(bytes, width, height) {
  return spansOf(bytes, width, height, 0, 0, width, height);
}

/** Return the mask of a box. */
export function fromBox([x1, y1, x2, y2], width, height) {
  const clip = (value, limit) => Math.min(Math.max(Math.round(value), 0), limit);
  const [left, right, top, bottom] = [clip(x1, width), clip(x2, width), clip(y1, height), clip(y2, height)];
  if (right <= left || bottom <= top) return emptyMask(width, height);
  const spans = new Int32Array(3 * (bottom - top));
  for (let i = 0; i < bottom - top; i++) spans.set([top + i, left, right], 3 * i);
  return { width, height, area: (right - left) * (bottom - top), box: [left, top, right, bottom], spans };
}

function spansOf(bytes, boxWidth, boxHeight, left, top, width, height) {
  const spans = [];
  let area = 0;
  let [x1, y1, x2, y2] = [width, height, 0, 0];
  for (let y = 0; y < boxHeight; y++) {
    const end = (y + 1) * boxWidth;
    let at = bytes.indexOf(1, y * boxWidth);
    while (at >= 0 && at < end) {
      let stop = bytes.indexOf(0, at);
      if (stop < 0 || stop > end) stop = end;
      const [from, to] = [at - y * boxWidth + left, stop - y * boxWidth + left];
      spans.push(y + top, from, to);
      area += to - from;
      x1 = Math.min(x1, from);
      x2 = Math.max(x2, to);
      y1 = Math.min(y1, y + top);
      y2 = y + top + 1;
      at = stop < end ? bytes.indexOf(1, stop) : -1;
    }
  }
  if (!area) return emptyMask(width, height);
  return { width, height, area, box: [x1, y1, x2, y2], spans: Int32Array.from(spans) };
}

/** Return a mask as bytes of 0 and 1, row by row, of the whole image. */
export function toBytes(mask) {
  const bytes = new Uint8Array(mask.width * mask.height);
  const { spans, width } = mask;
  for (let i = 0; i < spans.length; i += 3) bytes.fill(1, spans[i] * width + spans[i + 1], spans[i] * width + spans[i + 2]);
  return bytes;
}

/** Return a mask as compressed COCO RLE. */
export function toRle(mask) {
  const { width, height } = mask;
  const bytes = toBytes(mask);
  const runs = [];
  let value = 0;
  let run = 0;
  for (let x = 0; x < width; x++) {
    for (let y = 0, at = x; y < height; y++, at += width) {
      if (bytes[at] === value) run++;
      else {
        runs.push(run);
        run = 1;
        value = 1 - value;
      }
    }
  }
  runs.push(run);
  return { size: [height, width], counts: encodeCounts(runs) };
}

/** Return whether a pixel is in a mask. */
export function contains(mask, x, y) {
  const [column, row] = [Math.floor(x), Math.floor(y)];
  const [x1, y1, x2, y2] = mask.box;
  if (column < x1 || column >= x2 || row < y1 || row >= y2) return false;
  const { spans } = mask;
  let [low, high] = [0, spans.length / 3];
  while (low < high) {
    const middle = (low + high) >> 1;
    if (spans[3 * middle] < row) low = middle + 1;
    else high = middle;
  }
  for (let i = 3 * low; i < spans.length && spans[i] === row; i += 3) {
    if (column >= spans[i + 1] && column < spans[i + 2]) return true;
  }
  return false;
}

/** Return the number of pixels that two masks share. */
export function intersection(a, b) {
  if (a.box[0] >= b.box[2] || b.box[0] >= a.box[2] || a.box[1] >= b.box[3] || b.box[1] >= a.box[3]) return 0;
  const [p, q] = [a.spans, b.spans];
  let [i, j, shared] = [0, 0, 0];
  while (i < p.length && j < q.length) {
    if (p[i] !== q[j]) {
      if (p[i] < q[j]) i += 3;
      else j += 3;
      continue;
    }
    const overlap = Math.min(p[i + 2], q[j + 2]) - Math.max(p[i + 1], q[j + 1]);
    if (overlap > 0) shared += overlap;
    if (p[i + 2] < q[j + 2]) i += 3;
    else j += 3;
  }
  return shared;
}

/** Return the IoU of two masks, 0 to 1. */
export function maskIou(a, b) {
  const shared = intersection(a, b);
  const union = a.area + b.area - shared;
  return union ? shared / union : 0;
}

/** Fill a mask into pixels (a Uint32Array, `stride` to a row) that show every `step`-th pixel of the image. */
export function paint(pixels, stride, mask, color, step = 1) {
  const { spans } = mask;
  for (let i = 0; i < spans.length; i += 3) {
    if (spans[i] % step) continue;
    const row = (spans[i] / step) * stride;
    pixels.fill(color, row + Math.ceil(spans[i + 1] / step), row + Math.ceil(spans[i + 2] / step));
  }
}

/** Return the outline of a mask as a path in pixels of the image; it is kept with the mask. */
export function outline(mask) {
  if (mask.path) return mask.path;
  const path = new Path2D();
  const { spans } = mask;
  let above = [];
  let row = -2;
  const edge = (y, first, second) => {
    // Where exactly one of two rows has pixels, there is an edge between them.
    const cuts = [...first, ...second].sort((a, b) => a - b);
    for (let k = 0; k + 1 < cuts.length; k += 2) {
      if (cuts[k] === cuts[k + 1]) continue;
      path.moveTo(cuts[k], y);
      path.lineTo(cuts[k + 1], y);
    }
  };
  for (let i = 0; i < spans.length; ) {
    const y = spans[i];
    const here = [];
    for (; i < spans.length && spans[i] === y; i += 3) {
      here.push(spans[i + 1], spans[i + 2]);
      for (const x of [spans[i + 1], spans[i + 2]]) {
        path.moveTo(x, y);
        path.lineTo(x, y + 1);
      }
    }
    if (y !== row + 1) {
      edge(row + 1, above, []);
      above = [];
    }
    edge(y, above, here);
    [above, row] = [here, y];
  }
  edge(row + 1, above, []);
  mask.path = path;
  return path;
}
