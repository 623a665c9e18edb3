"""Small things in large pictures: look at overlapping tiles, put the boxes together again."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import supervision as sv
from numpy.typing import NDArray

from grounded_sam.errors import ConfigError
from grounded_sam.structures.detections import make_detections, merge_detections, select_rows
from grounded_sam.structures.frame import Frame
from grounded_sam.structures.vocabulary import Vocabulary

#: Share of a tile's side within which of its edge a box counts as cut by it; boxes of cut things are not exact.
EDGE = 0.03
#: IoU at which boxes of two tiles are one object.
SAME = 0.5
#: Share of a piece that a box has to cover to be the object that it is a piece of.
COVERED = 0.7


@dataclass(frozen=True)
class Tiles:
    """How pictures are cut, as it stands under `tiles.` in the config.

    Attributes:
        size: side of the square tiles in pixels; None for no tiles. Pictures that fit into one are not cut.
        overlap: share of a tile that it has in common with the next, 0 to below 1; what is smaller than that is
            whole in at least one tile.
        whole: look at the whole picture too, for what is larger than a tile.

    Raises:
        ConfigError: for a value out of its range.
    """

    size: int | None = None
    overlap: float = 0.25
    whole: bool = True

    def __post_init__(self) -> None:
        if self.size is not None and (isinstance(self.size, bool) or not isinstance(self.size, int) or self.size < 32):
            raise ConfigError(f"tiles.size must be null or a whole number of pixels from 32, got {self.size!r}")
        if isinstance(self.overlap, bool) or not 0 <= self.overlap < 1:
            raise ConfigError(f"tiles.overlap must be a number from 0 to below 1, got {self.overlap!r}")
        if not isinstance(self.whole, bool):
            raise ConfigError(f"tiles.whole must be true or false, got {self.whole!r}")

    def boxes(self, size_hw: tuple[int, int]) -> NDArray[np.int64]:
        """The tiles of a picture, `(n, 4)` corners; all of one size, the last ones moved inwards."""
        assert self.size is not None
        columns, rows = (self._starts(side) for side in (size_hw[1], size_hw[0]))
        corners = [
            (x, y, min(x + self.size, size_hw[1]), min(y + self.size, size_hw[0])) for y in rows for x in columns
        ]
        return np.array(corners, np.int64)

    def _starts(self, side: int) -> list[int]:
        assert self.size is not None
        if side <= self.size:
            return [0]
        step = max(1, round(self.size * (1 - self.overlap)))
        return [*range(0, side - self.size, step), side - self.size]

    def detect(
        self, frame: Frame, look: Callable[[list[Frame]], list[sv.Detections]], vocabulary: Vocabulary
    ) -> sv.Detections:
        """What `look` finds in the tiles of a frame, in pixels of the frame, each object once.

        Args:
            look: a detector that has selected already: what is below any threshold would only cost time here.
        """
        height, width = frame.size_hw
        if self.size is None or max(height, width) <= self.size:
            return look([frame])[0]
        image = frame.image
        parts, homes = [], []
        for home in self.boxes((height, width)):
            x1, y1, x2, y2 = home.tolist()
            tile = Frame(np.ascontiguousarray(image[y1:y2, x1:x2]), frame.index, frame.name)
            found = look([tile])[0]
            found.xyxy = found.xyxy + np.array([x1, y1, x1, y1], np.float32)
            found.mask = None  # made on the whole picture, so that what is cut here comes out whole
            parts.append(found)
            homes += [home] * len(found)
        if self.whole:
            found = look([frame])[0]
            found.mask = None
            parts.append(found)
            homes += [np.array([0, 0, width, height])] * len(found)
        found = merge_detections(parts, vocabulary)
        return joined(found, np.array(homes).reshape(-1, 4), vocabulary, (height, width))


def joined(
    found: sv.Detections, homes: NDArray[np.int64], vocabulary: Vocabulary, size_hw: tuple[int, int]
) -> sv.Detections:
    """Detections of overlapping tiles as one per object, within each class.

    Boxes that the edge of their tile cuts are pieces. Whole boxes that overlap are one object, the surest; a piece
    that a whole box covers goes; pieces that meet across an edge are joined to the box around them.

    Args:
        found: in pixels of the picture.
        homes: of each its tile, `(n, 4)`.
    """
    if not len(found):
        return found
    assert found.confidence is not None and found.class_id is not None
    edges = np.array([0, 0, size_hw[1], size_hw[0]])
    reach = EDGE * (homes[:, 2:] - homes[:, :2]).max(1, keepdims=True)
    cut = (np.abs(found.xyxy - homes) <= reach) & (homes != edges)  # left, top, right, bottom
    piece = cut.any(1)
    whole = np.flatnonzero(~piece)
    table = np.column_stack([found.xyxy[whole], found.confidence[whole], found.class_id[whole]])
    whole = whole[sv.box_non_max_suppression(table, iou_threshold=SAME)] if len(whole) else whole
    rest = [int(i) for i in np.flatnonzero(piece) if not _covered(found, i, whole)]
    groups = _groups(found, cut, rest)
    boxes, rows = [found.xyxy[whole]], [whole]
    for group in groups:
        xyxy = found.xyxy[group]
        boxes.append(np.concatenate([xyxy[:, :2].min(0), xyxy[:, 2:].max(0)])[None])
        rows.append(np.array([max(group, key=lambda i: found.confidence[i])]))  # type: ignore[index]
    chosen = select_rows(found, np.concatenate(rows))
    assert chosen.confidence is not None and chosen.class_id is not None
    out = make_detections(np.concatenate(boxes), chosen.confidence, chosen.class_id, vocabulary, size_hw)
    every = np.arange(len(out))
    out = select_rows(out, [i for i in every if i < len(whole) or not _covered(out, i, every)])
    table = np.column_stack([out.xyxy, out.confidence, out.class_id])  # type: ignore[list-item]
    return select_rows(out, sv.box_non_max_suppression(table, iou_threshold=SAME))


def _covered(found: sv.Detections, i: Any, by: NDArray[Any]) -> bool:
    """Whether a larger one of some others, of the same class, has most of a box."""
    assert found.class_id is not None
    area = np.asarray(found.box_area)
    others = by[(found.class_id[by] == found.class_id[i]) & (area[by] > area[i])] if len(by) else by
    box, boxes = found.xyxy[i], found.xyxy[others]
    sides = np.minimum(box[2:], boxes[:, 2:]) - np.maximum(box[:2], boxes[:, :2])
    return bool((sides.clip(0).prod(1) >= COVERED * area[i]).any())


def _groups(found: sv.Detections, cut: NDArray[np.bool_], rows: list[int]) -> list[list[int]]:
    """Pieces that are one object: of one class, cut on sides that face each other, touching, alike along the cut."""
    assert found.class_id is not None
    group = {i: [i] for i in rows}
    for a in rows:
        for b in rows:
            if b <= a or found.class_id[a] != found.class_id[b] or group[a] is group[b]:
                continue
            one, other = found.xyxy[a], found.xyxy[b]
            if (np.minimum(one[2:], other[2:]) < np.maximum(one[:2], other[:2])).any():
                continue
            for axis in (0, 1):
                faces = (cut[a, axis + 2] and cut[b, axis]) or (cut[a, axis] and cut[b, axis + 2])
                across = 1 - axis
                inner = min(one[across + 2], other[across + 2]) - max(one[across], other[across])
                outer = max(one[across + 2], other[across + 2]) - min(one[across], other[across])
                if faces and inner >= SAME * outer:
                    together = group[a] + group[b]
                    for i in together:
                        group[i] = together
                    break
    return [list(members) for members in {id(members): members for members in group.values()}.values()]
