"""Detect small objects in large images: run the detector on overlapping tiles and merge the boxes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import supervision as sv
from numpy.typing import NDArray

from grounded_sam.checks import check_bool, check_int
from grounded_sam.errors import ConfigError
from grounded_sam.structures.detections import make_detections, merge_detections, select_rows
from grounded_sam.structures.frame import Frame
from grounded_sam.structures.vocabulary import Vocabulary

#: A box this close to the border of its tile, as a fraction of the tile's side, counts as cut by it.
BORDER = 0.03
#: IoU from which boxes of two tiles are the same object.
SAME_OBJECT_IOU = 0.5
#: Share of a cut box that another box has to cover to be the same object.
COVERED = 0.7


@dataclass(frozen=True)
class Tiles:
    """How large images are tiled; the config section `tiles`.

    Attributes:
        size: Side of the square tiles in pixels; None disables tiling. Images that fit into one tile are not cut.
        overlap: Overlap of neighboring tiles as a fraction of their side, 0 to below 1. Objects smaller than the
            overlap are whole in at least one tile.
        whole: Whether to run on the whole image too, for objects larger than a tile.

    Raises:
        ConfigError: If a value is out of range.

    >>> Tiles(size=100, overlap=0.5).boxes((100, 200)).tolist()
    [[0, 0, 100, 100], [50, 0, 150, 100], [100, 0, 200, 100]]
    """

    size: int | None = None
    overlap: float = 0.25
    whole: bool = True

    def __post_init__(self) -> None:
        check_int("tiles.size", self.size, 32, optional=True)
        if isinstance(self.overlap, bool) or not isinstance(self.overlap, int | float) or not 0 <= self.overlap < 1:
            raise ConfigError(f"tiles.overlap must be a number >= 0 and < 1, got {self.overlap!r}")
        check_bool("tiles.whole", self.whole)

    def boxes(self, size_hw: tuple[int, int]) -> NDArray[np.int64]:
        """Return the tiles of an image as xyxy, `(n, 4)`.

        All have the same size; the last of a row or column is moved inwards.
        """
        assert self.size is not None
        height, width = size_hw
        tiles = [
            (x, y, min(x + self.size, width), min(y + self.size, height))
            for y in self._starts(height)
            for x in self._starts(width)
        ]
        return np.array(tiles, np.int64)

    def _starts(self, side: int) -> list[int]:
        """Return where tiles start along a side of the image."""
        assert self.size is not None
        if side <= self.size:
            return [0]
        step = max(1, round(self.size * (1 - self.overlap)))
        return [*range(0, side - self.size, step), side - self.size]

    def detect(
        self, frame: Frame, detect: Callable[[list[Frame]], list[sv.Detections]], vocabulary: Vocabulary
    ) -> sv.Detections:
        """Detect in the tiles of a frame and merge.

        Args:
            frame: The frame.
            detect: Detector that applies thresholds, since merging takes time quadratic in the number of boxes.
            vocabulary: Classes that `class_id` refers to.

        Returns:
            One detection per object, in pixels of the frame.

        Raises:
            ConfigError: If the detector gives points.
        """
        height, width = frame.size_hw
        if self.size is None or max(height, width) <= self.size:
            return detect([frame])[0]
        image = frame.image
        parts, tiles = [], []
        presence: dict[str, float] = {}  # of each class in the tile that most probably shows it
        for tile in [*self.boxes((height, width)), *([np.array([0, 0, width, height])] if self.whole else [])]:
            x1, y1, x2, y2 = tile.tolist()
            is_whole = (x2 - x1, y2 - y1) == (width, height)
            crop = Frame(pixels=np.ascontiguousarray(image[y1:y2, x1:x2]), index=frame.index, name=frame.name)
            detections = detect([frame if is_whole else crop])[0]
            if "points" in detections.data:
                raise ConfigError("tiles.size needs a detector of boxes, but this one gives points; remove tiles.size")
            detections.xyxy = detections.xyxy + np.array([x1, y1, x1, y1], np.float32)
            detections.mask = None  # made on the whole image, so that objects that a tile cuts get whole masks
            for name, value in detections.metadata.pop("presence", {}).items():
                presence[name] = max(presence.get(name, 0.0), value)
            parts.append(detections)
            tiles += [tile] * len(detections)
        merged = merge_tiles(
            merge_detections(parts, vocabulary), np.array(tiles).reshape(-1, 4), vocabulary, (height, width)
        )
        if presence:
            merged.metadata["presence"] = presence
        return merged


def merge_tiles(
    detections: sv.Detections, tiles: NDArray[np.int64], vocabulary: Vocabulary, size_hw: tuple[int, int]
) -> sv.Detections:
    """Merge detections of overlapping tiles to one per object, within each class.

    Boxes that the border of their tile cuts are fragments. Whole boxes that overlap are one object, represented by the
    most confident. A fragment that a whole box covers is dropped; fragments that meet across a border become the box
    around them.

    Args:
        detections: In pixels of the image.
        tiles: Tile of each detection, xyxy, `(n, 4)`.
        vocabulary: Classes that `class_id` refers to.
        size_hw: Height and width of the image.
    """
    if not len(detections):
        return detections
    assert detections.confidence is not None and detections.class_id is not None
    image_box = np.array([0, 0, size_hw[1], size_hw[0]])
    margin = BORDER * (tiles[:, 2:] - tiles[:, :2]).max(1, keepdims=True)
    cut = (np.abs(detections.xyxy - tiles) <= margin) & (tiles != image_box)  # left, top, right, bottom
    is_fragment = cut.any(1)
    whole = np.flatnonzero(~is_fragment)
    table = np.column_stack([detections.xyxy[whole], detections.confidence[whole], detections.class_id[whole]])
    whole = whole[sv.box_non_max_suppression(table, iou_threshold=SAME_OBJECT_IOU)] if len(whole) else whole
    fragments = [int(i) for i in np.flatnonzero(is_fragment) if not _is_covered(detections, int(i), whole)]
    boxes, rows = [detections.xyxy[whole]], [whole]
    for group in _group_fragments(detections, cut, fragments):
        xyxy = detections.xyxy[group]
        boxes.append(np.concatenate([xyxy[:, :2].min(0), xyxy[:, 2:].max(0)])[None])
        rows.append(np.array([max(group, key=lambda i: detections.confidence[i])]))  # type: ignore[index]
    chosen = select_rows(detections, np.concatenate(rows))
    assert chosen.confidence is not None and chosen.class_id is not None
    merged = make_detections(np.concatenate(boxes), chosen.confidence, chosen.class_id, vocabulary, size_hw)
    everything = np.arange(len(merged))
    kept = [i for i in range(len(merged)) if i < len(whole) or not _is_covered(merged, i, everything)]
    merged = select_rows(merged, kept)
    table = np.column_stack([merged.xyxy, merged.confidence, merged.class_id])  # type: ignore[list-item]
    return select_rows(merged, sv.box_non_max_suppression(table, iou_threshold=SAME_OBJECT_IOU))


def _is_covered(detections: sv.Detections, i: int, others: NDArray[np.intp]) -> bool:
    """Return whether a larger box of the same class covers most of box `i`."""
    assert detections.class_id is not None
    area = np.asarray(detections.box_area)
    if len(others):
        others = others[(detections.class_id[others] == detections.class_id[i]) & (area[others] > area[i])]
    box, boxes = detections.xyxy[i], detections.xyxy[others]
    sides = np.minimum(box[2:], boxes[:, 2:]) - np.maximum(box[:2], boxes[:, :2])
    return bool((sides.clip(0).prod(1) >= COVERED * area[i]).any())


def _group_fragments(detections: sv.Detections, cut: NDArray[np.bool_], rows: list[int]) -> list[list[int]]:
    """Group fragments of one object: same class, cut on facing sides, touching, and aligned along the cut."""
    assert detections.class_id is not None
    groups = {i: [i] for i in rows}
    for a in rows:
        for b in rows:
            if b <= a or detections.class_id[a] != detections.class_id[b] or groups[a] is groups[b]:
                continue
            if _continues(detections.xyxy[a], detections.xyxy[b], cut[a], cut[b]):
                together = groups[a] + groups[b]
                for i in together:
                    groups[i] = together
    return [list(members) for members in {id(members): members for members in groups.values()}.values()]


def _continues(
    box_a: NDArray[np.float32], box_b: NDArray[np.float32], cut_a: NDArray[np.bool_], cut_b: NDArray[np.bool_]
) -> bool:
    """Return whether two cut boxes are parts of one object on two sides of a border."""
    if (np.minimum(box_a[2:], box_b[2:]) < np.maximum(box_a[:2], box_b[:2])).any():
        return False
    for axis in (0, 1):
        facing = (cut_a[axis + 2] and cut_b[axis]) or (cut_a[axis] and cut_b[axis + 2])
        other = 1 - axis
        shared = min(box_a[other + 2], box_b[other + 2]) - max(box_a[other], box_b[other])
        extent = max(box_a[other + 2], box_b[other + 2]) - min(box_a[other], box_b[other])
        if facing and shared >= SAME_OBJECT_IOU * extent:
            return True
    return False
