"""The HTML page of a report, with thumbnails inside."""

from __future__ import annotations

import base64
import io
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import supervision as sv
from numpy.typing import NDArray

from grounded_sam.errors import ImageError, count_of
from grounded_sam.media.draw import draw_detections
from grounded_sam.pages.rendering import render_html
from grounded_sam.sinks.samples import RandomSample
from grounded_sam.structures.results import FrameResult, Skipped
from grounded_sam.structures.vocabulary import Vocabulary

#: Bins of the score histograms.
BINS = 20
#: Longer side of a thumbnail, in pixels.
THUMBNAIL_SIDE = 240
#: Longest lists on the page.
MAX_GROUPS, MAX_SKIPPED = 500, 2000


@dataclass(frozen=True)
class Thumbnail:
    """An image on the page.

    Attributes:
        url: JPEG as a data URL; empty if the pixels could not be read.
        caption: Text below it.
    """

    url: str
    caption: str


@dataclass
class ClassStatistics:
    """What the page shows of one class.

    Attributes:
        sample: Thumbnails of some of its objects.
        num_objects: Objects in all images.
        num_images: Images with at least one.
        histogram: `(BINS,) int64`, objects by score from 0 to 1.
    """

    sample: RandomSample[Thumbnail]
    num_objects: int = 0
    num_images: int = 0
    histogram: NDArray[np.int64] = field(default_factory=lambda: np.zeros(BINS, np.int64))

    def add(self, score: float) -> None:
        """Count an object."""
        self.num_objects += 1
        self.histogram[min(int(score * BINS), BINS - 1)] += 1


@dataclass(kw_only=True)
class ReportContent:
    """What the page shows.

    Attributes:
        vocabulary: Classes of the run.
        classes: Statistics of each class.
        num_video_frames: How many of the images are frames of videos.
        objects_per_image: Number of images by their number of objects.
        uncertain: Objects with the lowest scores.
        crowded: Images with the most objects.
        empty: Some of the images without objects.
        duplicates: Names of near-duplicate images, in groups.
        skipped: Files that could not be used.
    """

    vocabulary: Vocabulary
    classes: Sequence[ClassStatistics]
    num_video_frames: int
    objects_per_image: Counter[int]
    uncertain: Sequence[Thumbnail]
    crowded: Sequence[Thumbnail]
    empty: Sequence[Thumbnail]
    duplicates: Sequence[Sequence[str]]
    skipped: Sequence[Skipped]


def make_thumbnail(
    result: FrameResult, detections: sv.Detections, xyxy: tuple[int, int, int, int], palette: Sequence[str]
) -> str:
    """Draw detections over a part of their image.

    Args:
        result: Result of the image.
        detections: The detections to draw.
        xyxy: Part of the image, in pixels.
        palette: A color `#rrggbb` for each class.

    Returns:
        JPEG as a data URL; empty if the pixels cannot be read, as when the file of a stored result is gone.
    """
    import cv2
    from PIL import Image

    left, top, right, bottom = xyxy
    try:
        image = result.frame.image[top:bottom, left:right]
    except ImageError:
        return ""
    scale = min(1.0, THUMBNAIL_SIDE / max(image.shape[:2]))
    width, height = max(1, round(image.shape[1] * scale)), max(1, round(image.shape[0] * scale))
    image = cv2.resize(image, (width, height), interpolation=cv2.INTER_AREA)
    masks = None
    if detections.mask is not None and len(detections):
        crops = (np.asarray(mask[top:bottom, left:right], np.uint8) for mask in detections.mask)
        masks = np.array([cv2.resize(crop, (width, height), interpolation=cv2.INTER_NEAREST) for crop in crops], bool)
    boxes = (detections.xyxy - (left, top, left, top)) * scale
    scaled = sv.Detections(
        xyxy=np.clip(boxes, 0, (width, height, width, height)).astype(np.float32),
        mask=masks,
        confidence=detections.confidence,
        class_id=detections.class_id,
        data={"class_name": detections.data.get("class_name", np.empty(0, str))},
    )
    drawn = draw_detections(np.asarray(image, np.uint8), scaled, labels=False, color_by="class", palette=palette)
    jpeg = io.BytesIO()
    Image.fromarray(drawn).save(jpeg, format="JPEG", quality=80)
    return f"data:image/jpeg;base64,{base64.b64encode(jpeg.getvalue()).decode()}"


def render_page(content: ReportContent) -> str:
    """Return the page, one HTML file without links to others."""
    max_objects = max(content.objects_per_image, default=0)
    per_image = np.array([content.objects_per_image[n] for n in range(min(max_objects, 59) + 1)], np.int64)
    return render_html(
        "labels.html",
        totals=_totals(content),
        classes=_class_rows(content),
        per_image=_histogram(per_image, "#888", 8),
        max_objects=max_objects,
        uncertain=[thumbnail for thumbnail in content.uncertain if thumbnail.url],
        crowded=content.crowded,
        empty=content.empty,
        num_empty=content.objects_per_image[0],
        duplicates=content.duplicates[:MAX_GROUPS],
        num_duplicates=len(content.duplicates),
        skipped=content.skipped[:MAX_SKIPPED],
        num_skipped=len(content.skipped),
    )


def _totals(content: ReportContent) -> str:
    """Return the sentence with the totals."""
    num_objects = sum(statistics.num_objects for statistics in content.classes)
    num_frames = content.num_video_frames
    return (
        f"{count_of(num_objects, 'object')} of {count_of(len(content.classes), 'class', 'classes')} in "
        f"{count_of(content.objects_per_image.total(), 'image')}"
        f"{f' ({num_frames:,} of them video frames)' if num_frames else ''}; "
        f"{count_of(content.objects_per_image[0], 'image')} without objects, "
        f"{count_of(len(content.skipped), 'file')} skipped, "
        f"{count_of(len(content.duplicates), 'group')} of near-duplicates."
    )


def _class_rows(content: ReportContent) -> list[dict[str, Any]]:
    """Return what the page shows of each class."""
    vocabulary = content.vocabulary
    return [
        {
            "name": name,
            "category_id": category_id,
            "color": color,
            "num_objects": statistics.num_objects,
            "num_images": statistics.num_images,
            "scores": _histogram(statistics.histogram, color),
            "sample": statistics.sample.items,
        }
        for name, category_id, color, statistics in zip(
            vocabulary.classes, vocabulary.category_ids, vocabulary.palette(), content.classes, strict=True
        )
    ]


def _histogram(counts: NDArray[np.int64], color: str, bar_width: int = 12) -> dict[str, Any]:
    """Return the bars of a histogram, in pixels, 40 px high."""
    highest = max(int(counts.max(initial=0)), 1)
    bars = [{"x": i * bar_width, "height": 40 * n / highest, "count": n} for i, n in enumerate(counts.tolist())]
    return {"bars": bars, "bar_width": bar_width, "width": len(counts) * bar_width, "color": color}
