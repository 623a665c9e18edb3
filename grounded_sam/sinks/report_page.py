"""The HTML page of a report, with thumbnails inside."""

from __future__ import annotations

import base64
import html
import io
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import supervision as sv
from numpy.typing import NDArray

from grounded_sam.errors import ImageError, count_of
from grounded_sam.media.draw import draw_detections
from grounded_sam.sinks.samples import RandomSample
from grounded_sam.structures.results import FrameResult, Skipped
from grounded_sam.structures.vocabulary import Vocabulary

#: Bins of the score histograms.
BINS = 20
#: Longer side of a thumbnail, in pixels.
THUMBNAIL_SIDE = 240
#: Longest lists on the page.
MAX_GROUPS, MAX_SKIPPED = 500, 2000
STYLE = (
    "<style>body{font:14px/1.4 system-ui,sans-serif;margin:2em auto;max-width:1400px;padding:0 1em;color:#222}"
    "h2{margin-top:2em;border-bottom:1px solid #ccc}table{border-collapse:collapse}"
    "td,th{padding:.2em .8em;text-align:left;border-bottom:1px solid #eee}td.n{text-align:right}"
    ".sheet{display:flex;flex-wrap:wrap;gap:8px}figure{margin:0;width:150px}"
    "figure img{width:150px;height:150px;object-fit:contain;background:#f4f4f4}"
    "figcaption{font-size:11px;color:#555;overflow-wrap:anywhere}"
    ".dot{display:inline-block;width:.8em;height:.8em;border-radius:50%;margin-right:.4em}"
    "ul{columns:2}svg{vertical-align:middle}</style>"
)


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
    empty = content.objects_per_image[0]
    max_objects = max(content.objects_per_image, default=0)
    per_image = np.array([content.objects_per_image[n] for n in range(min(max_objects, 59) + 1)], np.int64)
    parts = [
        f"<!doctype html><meta charset='utf-8'><title>Labels</title>{STYLE}",
        f"<h1>Labels</h1><p>{_totals(content)} All files to review: <code>review.csv</code>.</p>",
        _class_table(content),
        f"<h2>Objects per image</h2>{_histogram(per_image, '#888', 8)}<p>from 0 to {max_objects}</p>",
    ]
    for name, statistics in zip(content.vocabulary.classes, content.classes, strict=True):
        parts.append(f"<h2>{html.escape(name)}</h2>{_contact_sheet(statistics.sample.items)}")
    parts.append(f"<h2>Least certain</h2>{_contact_sheet([t for t in content.uncertain if t.url])}")
    parts.append(f"<h2>Most crowded</h2>{_contact_sheet(content.crowded)}")
    parts.append(f"<h2>Without objects ({empty:,})</h2>{_contact_sheet(content.empty)}")
    if content.duplicates:
        items = "".join(f"<li>{html.escape(', '.join(group))}</li>" for group in content.duplicates[:MAX_GROUPS])
        parts.append(f"<h2>Near-duplicates ({len(content.duplicates):,} groups)</h2><ul>{items}</ul>")
    if content.skipped:
        rows = "".join(
            f"<tr><td>{html.escape(skipped.file)}<td>{html.escape(skipped.reason)}</tr>"
            for skipped in content.skipped[:MAX_SKIPPED]
        )
        parts.append(f"<h2>Skipped ({len(content.skipped):,})</h2><table>{rows}</table>")
    return "\n".join(parts) + "\n"


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


def _class_table(content: ReportContent) -> str:
    """Return a table with the statistics of each class."""
    rows = []
    vocabulary = content.vocabulary
    for name, category_id, color, statistics in zip(
        vocabulary.classes, vocabulary.category_ids, vocabulary.palette(), content.classes, strict=True
    ):
        rows.append(
            f"<tr><td><span class='dot' style='background:{html.escape(color)}'></span>{html.escape(name)}"
            f"<td class='n'>{html.escape(str(category_id))}<td class='n'>{statistics.num_objects:,}"
            f"<td class='n'>{statistics.num_images:,}<td>{_histogram(statistics.histogram, color)}</tr>"
        )
    header = "<tr><th>class<th>id<th>objects<th>images<th>scores from 0 to 1</tr>"
    return "\n".join([f"<h2>Classes</h2><table>{header}", *rows, "</table>"])


def _histogram(counts: NDArray[np.int64], color: str, bar_width: int = 12) -> str:
    """Return a histogram as SVG."""
    highest = max(int(counts.max(initial=0)), 1)
    bars = "".join(
        f"<rect x='{i * bar_width}' y='{40 - 40 * n / highest:.1f}' width='{bar_width - 1}' "
        f"height='{40 * n / highest:.1f}' fill='{html.escape(color)}'><title>{n}</title></rect>"
        for i, n in enumerate(counts.tolist())
    )
    width = len(counts) * bar_width
    return f"<svg width='{width}' height='41'><path d='M0 40.5H{width}' stroke='#ccc'/>{bars}</svg>"


def _contact_sheet(thumbnails: Sequence[Thumbnail]) -> str:
    if not thumbnails:
        return "<p>none</p>"
    figures = (
        f"<figure><img src='{html.escape(thumbnail.url)}' loading='lazy' alt=''>"
        f"<figcaption>{html.escape(thumbnail.caption)}</figcaption></figure>"
        for thumbnail in thumbnails
    )
    return f"<div class='sheet'>{''.join(figures)}</div>"
