"""Detections that know their image and their classes, so that they can draw, describe and export themselves."""

from __future__ import annotations

import io
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import supervision as sv
from numpy.typing import NDArray

from grounded_sam.errors import GroundedSamError, count_of
from grounded_sam.files import atomic_write, home_path
from grounded_sam.media.draw import draw_detections
from grounded_sam.structures.detections import coco_annotation
from grounded_sam.structures.frame import Frame
from grounded_sam.structures.masks import pack_masks
from grounded_sam.structures.vocabulary import Vocabulary

if TYPE_CHECKING:
    import pandas as pd

#: Longest side of the image that a notebook shows, in pixels.
MAX_REPR_SIDE = 1024


class ImageDetections(sv.Detections):
    """`supervision.Detections` of one image, with the image and the vocabulary.

    It can be used wherever `supervision.Detections` can. Selections of rows, such as `detections[:3]` and
    `detections.with_nms()`, keep the image, and merging detections of one image does too. A notebook shows it as an
    image.

    Attributes:
        frame: The image; None where detections of several images were merged.
        vocabulary: Classes that `class_id` refers to; None likewise.

    >>> image = np.zeros((40, 60, 3), np.uint8)
    >>> boxes = sv.Detections(np.array([[5, 5, 25, 25]]), confidence=np.ones(1), class_id=np.zeros(1, int))
    >>> boxes.data["class_name"] = np.array(["car"])
    >>> ImageDetections.of(boxes, Frame(pixels=image, name="street.jpg"), Vocabulary.parse(["car"]))
    ImageDetections(street.jpg, 60x40 px: 1 car)
    """

    frame: Frame | None = None
    vocabulary: Vocabulary | None = None

    @classmethod
    def of(cls, detections: sv.Detections, frame: Frame | None, vocabulary: Vocabulary | None) -> ImageDetections:
        """Make detections of an image that share the arrays of `detections`.

        Args:
            detections: Detections in the form that `structures.detections` describes.
            frame: Their image.
            vocabulary: Classes that `class_id` refers to.
        """
        made = cls(
            xyxy=detections.xyxy,
            mask=detections.mask,
            confidence=detections.confidence,
            class_id=detections.class_id,
            tracker_id=detections.tracker_id,
            data=detections.data,
            metadata=detections.metadata,
        )
        made.frame, made.vocabulary = frame, vocabulary
        return made

    def select(self, index: Any) -> ImageDetections:
        """Select detections by index, slice, indices or boolean mask."""
        return self.of(super().select(index), self.frame, self.vocabulary)

    def __getitem__(self, index: Any) -> Any:
        """Select detections as `select` does, or return the column of `data` with this name."""
        item = super().__getitem__(index)
        if isinstance(item, sv.Detections) and not isinstance(item, ImageDetections):  # in older supervision
            return self.of(item, self.frame, self.vocabulary)
        return item

    @classmethod
    def merge(cls, detections_list: list[sv.Detections]) -> ImageDetections:
        """Concatenate detections; the image is kept if it is the same for all of them."""
        merged = super().merge(detections_list)
        first = detections_list[0] if detections_list else None
        if isinstance(first, ImageDetections) and all(first._is_of_the_same_image(part) for part in detections_list):
            return cls.of(merged, first.frame, first.vocabulary)
        return cls.of(merged, None, None)

    def _is_of_the_same_image(self, other: sv.Detections) -> bool:
        if not isinstance(other, ImageDetections):
            return False
        return other.frame is self.frame and other.vocabulary == self.vocabulary

    def __repr__(self) -> str:
        counts = Counter(map(str, self.data.get("class_name", [])))
        found = ", ".join(f"{count} {name}" for name, count in counts.most_common())
        found = found or (count_of(len(self), "object") if len(self) else "nothing found")
        if self.frame is None:
            return f"ImageDetections({found})"
        height, width = self.frame.size_hw
        return f"ImageDetections({self.frame.name}, {width}x{height} px: {found})"

    def plot(self, **options: Any) -> NDArray[np.uint8]:
        """Draw the detections over the image.

        Args:
            options: Options of `media.draw.draw_detections`, such as `masks`, `boxes`, `labels` and `opacity`.

        Returns:
            RGB, `(H, W, 3) uint8`.

        Raises:
            GroundedSamError: If there is no image, since detections of several images were merged.
            ImageError: If the file of the image cannot be read any more.
        """
        if self.frame is None:
            raise GroundedSamError("these detections belong to no single image, so they cannot be drawn")
        if self.vocabulary is not None:
            color_by = "class" if self.vocabulary.has_own_colors else None
            options = {"palette": self.vocabulary.palette(), "color_by": color_by, **options}
        return draw_detections(self.frame.image, self, **options)

    def show(self, **options: Any) -> None:
        """Show the drawn detections in a window, or below the cell of a notebook; options as for `plot`."""
        from PIL import Image

        Image.fromarray(self.plot(**options)).show()

    def save(self, path: str | Path, **options: Any) -> Path:
        """Write the drawn detections to an image file.

        Args:
            path: File to write; its suffix decides the format.
            options: As for `plot`.

        Returns:
            The path.

        Raises:
            GroundedSamError: If no format has this suffix.
        """
        from PIL import Image

        path = home_path(path)
        if (kind := Image.registered_extensions().get(path.suffix.lower())) not in Image.SAVE:
            raise GroundedSamError(f"expected a file name that ends with .png or .jpg, got {path.name!r}")
        drawn = Image.fromarray(self.plot(**options))
        with atomic_write(path) as part:
            drawn.save(part, format=kind)
        return path

    def _repr_png_(self) -> bytes | None:
        """Return a PNG for notebooks; None where there is no image."""
        from PIL import Image

        if self.frame is None:
            return None
        picture = Image.fromarray(self.plot())
        picture.thumbnail((MAX_REPR_SIDE, MAX_REPR_SIDE))
        buffer = io.BytesIO()
        picture.save(buffer, format="PNG")
        return buffer.getvalue()

    def to_pandas(self) -> pd.DataFrame:
        """Convert to a table with one row per detection.

        Returns:
            The columns `class_name`, `confidence`, `x_min`, `y_min`, `x_max`, `y_max` (pixels), `area` (pixels of the
            mask, or of the box), `class_id`, `tracker_id` in videos, and all columns of `data` with one value per
            detection, such as `mask_score`.

        Raises:
            ImportError: If pandas is not installed.
        """
        import pandas as pd

        table = {"class_name": self.data.get("class_name"), "confidence": self.confidence}
        table |= dict(zip(("x_min", "y_min", "x_max", "y_max"), self.xyxy.T, strict=True))
        table |= {"area": self.area if len(self) else np.empty(0), "class_id": self.class_id}
        table |= {"tracker_id": self.tracker_id}
        columns = {name: np.asarray(values) for name, values in {**table, **self.data}.items() if values is not None}
        return pd.DataFrame({name: values for name, values in columns.items() if values.shape == (len(self),)})

    def to_coco(self) -> dict[str, Any]:
        """Convert to a COCO dictionary with one image, which `json.dump` writes and pycocotools reads.

        Returns:
            `images`, `annotations` and `categories`; the category ids are those of the vocabulary.

        Raises:
            GroundedSamError: If there is no image, since detections of several images were merged.
        """
        if self.frame is None or self.vocabulary is None:
            raise GroundedSamError("these detections belong to no single image, so they make no COCO file")
        height, width = self.frame.size_hw
        packed = pack_masks(self)
        ids = self.vocabulary.category_ids
        return {
            "images": [{"id": 1, "file_name": self.frame.name, "width": width, "height": height}],
            "annotations": [{**coco_annotation(packed, i, ids), "id": i + 1, "image_id": 1} for i in range(len(self))],
            "categories": self.vocabulary.categories(),
        }
