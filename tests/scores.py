"""Scores of tracked clips against their truth, by trackeval and by the definition of DAVIS."""

from __future__ import annotations

import math
from typing import Any

import cv2
import numpy as np
import supervision as sv
from scipy.optimize import linear_sum_assignment


class Sequence:
    """Truth and results of one clip, as RLE frame by frame."""

    def __init__(self, things: list[Any]) -> None:
        self.things = things
        self.size = next(m.shape for thing in things for m in thing.masks if m is not None)
        self.found: list[dict[int, dict]] = []

    def add(self, found: sv.Detections) -> None:
        ids = [] if found.tracker_id is None else found.tracker_id.tolist()
        self.found.append({i: encode(mask) for i, mask in zip(ids, found.mask if len(ids) else [], strict=True)})

    def truth(self, frame: int) -> dict[int, dict]:
        masks = {n: thing.masks[frame] for n, thing in enumerate(self.things)}
        return {n: encode(mask) for n, mask in masks.items() if mask is not None}


def encode(mask: np.ndarray) -> dict:
    from pycocotools import mask as coco_mask

    return coco_mask.encode(np.asfortranarray(mask, dtype=np.uint8))


def decode(rle: dict) -> np.ndarray:
    from pycocotools import mask as coco_mask

    return coco_mask.decode(rle).astype(bool)


def trackeval_scores(sequence: Sequence) -> dict[str, float]:
    """HOTA (mean over thresholds), IDF1, identity switches and J&F, as trackeval computes them."""
    from pycocotools import mask as coco_mask
    from trackeval import _timing
    from trackeval.metrics import CLEAR, HOTA, Identity, JAndF

    _timing.DO_TIMING = False
    frames = len(sequence.found)
    truth = [sequence.truth(t) for t in range(frames)]
    numbers = {i: n for n, i in enumerate(sorted({i for found in sequence.found for i in found}))}
    data: dict[str, Any] = {
        "num_timesteps": frames,
        "num_gt_ids": len(sequence.things),
        "num_tracker_ids": len(numbers),
        "num_gt_dets": sum(map(len, truth)),
        "num_tracker_dets": sum(map(len, sequence.found)),
        "gt_ids": [np.array(list(t), int) for t in truth],
        "tracker_ids": [np.array([numbers[i] for i in found], int) for found in sequence.found],
        "gt_dets": [list(t.values()) for t in truth],
        "tracker_dets": [list(found.values()) for found in sequence.found],
    }
    data["similarity_scores"] = [
        np.array(coco_mask.iou(a, b, [0] * len(b))).reshape(len(a), len(b))
        for a, b in zip(data["gt_dets"], data["tracker_dets"], strict=True)
    ]
    quiet = {"PRINT_CONFIG": False}
    out = {
        "HOTA": float(np.mean(HOTA().eval_sequence(data)["HOTA"])),
        "IDF1": float(Identity(quiet).eval_sequence(data)["IDF1"]),
        "IDSW": float(CLEAR(quiet).eval_sequence(data)["IDSW"]),
    }
    out["J&F"] = float(JAndF().eval_sequence(data)["J&F"])
    return out


def region(a: np.ndarray, b: np.ndarray) -> float:
    """J: IoU, 1 where both are empty (`db_eval_iou` of davis2017-evaluation)."""
    union = (a | b).sum()
    return 1.0 if union == 0 else float((a & b).sum() / union)


def boundary(a: np.ndarray, b: np.ndarray) -> float:
    """F: harmonic mean of the shares of each contour near the other (`f_measure` of davis2017-evaluation)."""

    def edge(mask: np.ndarray) -> np.ndarray:
        right, below, both = (np.zeros_like(mask) for _ in range(3))
        right[:, :-1], below[:-1], both[:-1, :-1] = mask[:, 1:], mask[1:], mask[1:, 1:]
        out = (mask ^ right) | (mask ^ below) | (mask ^ both)
        out[-1] = mask[-1] ^ right[-1]
        out[:, -1] = mask[:, -1] ^ below[:, -1]
        out[-1, -1] = False
        return out

    reach = math.ceil(0.008 * math.hypot(*a.shape))
    grid = np.mgrid[-reach : reach + 1, -reach : reach + 1]
    disk = ((grid**2).sum(0) <= reach**2).astype(np.uint8)
    edges = [edge(a), edge(b)]
    near = [cv2.dilate(e.astype(np.uint8), disk).astype(bool) for e in edges]
    total = [e.sum() for e in edges]
    if total[0] == 0 or total[1] == 0:
        return float(total[0] == total[1])
    shares = [(edges[0] & near[1]).sum() / total[0], (edges[1] & near[0]).sum() / total[1]]
    return 0.0 if sum(shares) == 0 else float(2 * shares[0] * shares[1] / sum(shares))


def davis_j_and_f(sequence: Sequence) -> float:
    """J&F of the unsupervised protocol: tracks assigned to objects by J&F, objects without one count 0."""
    frames, ids = len(sequence.found), sorted({i for found in sequence.found for i in found})
    nothing = np.zeros(sequence.size, bool)
    results = [[decode(f[i]) if i in f else nothing for f in sequence.found] for i in ids]
    table = np.zeros((len(sequence.things), len(ids)))
    for n, thing in enumerate(sequence.things):
        truth = [nothing if m is None else m for m in thing.masks[:frames]]
        for k, result in enumerate(results):
            j = np.mean([region(a, b) for a, b in zip(truth, result, strict=True)])
            f = np.mean([boundary(a, b) for a, b in zip(truth, result, strict=True)])
            table[n, k] = (j + f) / 2
    rows, columns = linear_sum_assignment(-table)
    return float(table[rows, columns].sum() / len(sequence.things))
