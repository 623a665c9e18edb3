// Which candidates are kept: the same steps, in the same order, as grounded_sam/pipeline/select.py.
// Scores and overlaps are compared as float32, as they are there.

import { maskIou } from "./rle.js";

const { fround } = Math;

/** Return the lowest score of each class, as float32: that of the settings, of the words, or `score`. */
export function thresholds(settings, classes, ownScore = {}) {
  const own = { ...ownScore, ...(settings.class_score || {}) };
  return new Map(classes.map((name) => [name, fround(own[name] ?? settings.score)]));
}

/** Return the IoU of two boxes, or with `smaller` their intersection over the smaller one. */
export function boxOverlap(a, b, smaller = false) {
  const width = Math.max(0, Math.min(a[2], b[2]) - Math.max(a[0], b[0]));
  const height = Math.max(0, Math.min(a[3], b[3]) - Math.max(a[1], b[1]));
  const shared = width * height;
  const [first, second] = [(a[2] - a[0]) * (a[3] - a[1]), (b[2] - b[0]) * (b[3] - b[1])];
  const whole = smaller ? Math.min(first, second) : first + second - shared;
  return whole > 0 ? fround(shared / whole) : 0;
}

/** Keep each object that no kept, more confident one of its class overlaps by more than a limit. */
function suppress(objects, limit, anyClass, overlap) {
  const kept = [];
  for (const object of objects) {
    const hidden = kept.some(
      (other) => (anyClass || other.class === object.class) && overlap(other, object) > limit,
    );
    if (!hidden) kept.push(object);
  }
  return kept;
}

function pass(objects, settings, low, scoreOf) {
  let rows = objects.filter((object) => fround(scoreOf(object)) >= low.get(object.class));
  rows.sort((a, b) => fround(scoreOf(b)) - fround(scoreOf(a)) || a.id - b.id);
  const boxes = (smaller) => (a, b) => boxOverlap(a.box, b.box, smaller);
  if (settings.nms !== null) {
    const byMask = settings.nms_by === "mask";
    const overlap = byMask ? (a, b) => maskIou(a.shape, b.shape) : boxes(false);
    rows = suppress(rows, byMask ? settings.nms : fround(settings.nms), settings.class_agnostic, overlap);
  }
  if (settings.max_ios !== null) {
    rows = suppress(rows, fround(Math.max(0, settings.max_ios - 1e-6)), settings.class_agnostic, boxes(true));
  }
  if (settings.min_area > 0 || settings.max_area !== null) {
    rows = rows.filter((o) => o.area >= settings.min_area && o.area <= (settings.max_area ?? Infinity));
  }
  return settings.top_k === null ? rows : rows.slice(0, settings.top_k);
}

/** Return the part of the settings that boxes alone decide, before there are masks. */
function beforeMasks(settings, refined) {
  const byMask = settings.nms_by === "mask" || refined;
  const needsArea = settings.min_area > 1 || settings.max_area !== null;
  return {
    ...settings,
    nms: byMask ? null : settings.nms,
    max_ios: byMask ? null : settings.max_ios,
    top_k: byMask || needsArea ? null : settings.top_k,
    min_area: 0,
    max_area: null,
  };
}

/**
 * Return the candidates that settings select, most confident first.
 *
 * @param objects Candidates: id, class, score, box, area, and `shape` (a mask) for nms_by=mask.
 * @param settings All settings of `select`.
 * @param prediction Its `classes`, `class_score` (thresholds of the words), and `has_masks`.
 */
export function select(objects, settings, prediction) {
  const low = thresholds(settings, prediction.classes, prediction.class_score);
  const isVerified = (object) => !(object.verify_score < settings.verify); // also where either is missing
  let rows = settings.verify === null ? [...objects] : objects.filter(isVerified);
  if (rows.some((object) => object.detector_score !== undefined)) {
    rows = pass(rows, beforeMasks(settings, true), low, (object) => object.detector_score);
    rows.sort((a, b) => a.id - b.id);
  } else if (prediction.has_masks) {
    rows = pass(rows, beforeMasks(settings, false), low, (object) => object.score);
  }
  return pass(rows, settings, low, (object) => object.score);
}

/** Return the highest overlap of each object with a more confident one of its class, 0 to 1. */
export function overlaps(objects, anyClass) {
  const sorted = [...objects].sort((a, b) => b.score - a.score || a.id - b.id);
  return sorted.map((object, i) =>
    sorted.slice(0, i).reduce(
      (most, other) =>
        anyClass || other.class === object.class ? Math.max(most, boxOverlap(other.box, object.box)) : most,
      0,
    ),
  );
}
