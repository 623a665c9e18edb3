// Labels of objects in a canvas, placed so that none covers another where there is room.

const HEIGHT = 16; // in CSS pixels

/**
 * Draw labels of the same size at any zoom: above their boxes, else below or inside.
 * @param unit Pixels of the image for each CSS pixel.
 * @param labels `{ text, box, color }`, the most important ones first.
 */
export function drawLabels(context, unit, labels) {
  context.font = `${12 * unit}px system-ui, sans-serif`;
  const sizes = labels.map(({ text }) => [context.measureText(text).width + 8 * unit, HEIGHT * unit]);
  placeLabels(labels.map(({ box }) => box), sizes).forEach(([x, y], i) => {
    const { text, color } = labels[i];
    context.fillStyle = color;
    context.fillRect(x, y, ...sizes[i]);
    context.fillStyle = isLight(color) ? "#000" : "#fff";
    context.fillText(text, x + 4 * unit, y + 12 * unit);
  });
}

/** Return left and top of a label for each box; each is where it covers the least of the labels before it. */
export function placeLabels(boxes, sizes) {
  const placed = [];
  boxes.forEach(([x1, y1, x2, y2], i) => {
    const [width, height] = sizes[i];
    const corners = [y1 - height, y2, y1, y2 - height].flatMap((y) => [[x1, y], [x2 - width, y]]);
    const inside = corners.map(([x, y]) => [x, Math.max(0, y)]);
    const covered = inside.map((corner) => placed.reduce((sum, other) => sum + overlap(corner, sizes[i], other), 0));
    placed.push([...inside[covered.indexOf(Math.min(...covered))], width, height]);
  });
  return placed.map(([x, y]) => [x, y]);
}

function overlap([x, y], [width, height], [left, top, otherWidth, otherHeight]) {
  const common = Math.min(x + width, left + otherWidth) - Math.max(x, left);
  return Math.max(0, common) * Math.max(0, Math.min(y + height, top + otherHeight) - Math.max(y, top));
}

function isLight(color) {
  const value = parseInt(color.slice(1), 16);
  return 0.3 * (value >> 16) + 0.59 * ((value >> 8) & 255) + 0.11 * (value & 255) > 140;
}
