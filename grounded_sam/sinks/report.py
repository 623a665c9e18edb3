"""Report for reviewing labels: an HTML page, and a list of images and objects to review.

The report of a sweep is in `cli.report`.
"""

from __future__ import annotations

import csv
import random
from collections import Counter
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from types import TracebackType
from typing import Any, ClassVar

from grounded_sam.checks import check_bool, check_int
from grounded_sam.errors import ImageError, count_of
from grounded_sam.files import PendingFile, PendingUpload, atomic_write_text, pending_text
from grounded_sam.formats.review_list import REVIEW_COLUMNS, escape_cell
from grounded_sam.output.claim import check_output
from grounded_sam.output.paths import OutputPath, output_path
from grounded_sam.sinks.near_duplicates import NearDuplicates
from grounded_sam.sinks.report_page import ClassStatistics, ReportContent, Thumbnail, make_thumbnail, render_page
from grounded_sam.sinks.samples import Highest, RandomSample
from grounded_sam.structures.detections import select_rows
from grounded_sam.structures.results import FrameResult, Skipped
from grounded_sam.structures.vocabulary import Vocabulary


@dataclass(frozen=True)
class _UncertainObject:
    """An object for `review.csv`.

    Attributes:
        file: Name of its image.
        index: Its index among the detections of the image.
        class_name: Its class.
        score: Confidence.
        mask_score: Predicted IoU of its mask; None without a segmenter.
        object_id: Its id in the store; empty without a store.
        status: Whether somebody decided about it, see `formats.store_schema.STATUSES`.
    """

    file: str
    index: int
    class_name: str
    score: float
    mask_score: float | None
    object_id: str
    status: str

    @classmethod
    def from_result(cls, result: FrameResult, i: int) -> _UncertainObject:
        """Describe one detection of an image."""
        detections = result.detections
        assert detections.confidence is not None
        mask_scores = detections.data.get("mask_score")
        return cls(
            file=result.frame.name,
            index=i,
            class_name=str(detections.data["class_name"][i]),
            score=round(float(detections.confidence[i]), 4),
            mask_score=None if mask_scores is None else round(float(mask_scores[i]), 4),
            **{
                name: str(detections.data[name][i]) if name in detections.data else ""
                for name in ("object_id", "status")
            },
        )


@dataclass(frozen=True)
class _CrowdedImage:
    """An image with many objects."""

    file: str
    num_objects: int
    thumbnail: Thumbnail


class ReportSink:
    """Write `report.html`, a page in a single file, and `review.csv`.

    The page has counts, a histogram of scores and a contact sheet per class (a random sample of its objects), the least
    certain objects, the most crowded images, images without objects, near-duplicate images, and files that were
    skipped. `review.csv` lists the same by file and reason, including all empty, skipped and near-duplicate ones. A
    text there that a spreadsheet would take for a formula, or that begins with an apostrophe, gets an apostrophe in
    front. Masks are not kept in memory.

    Args:
        output: Output folder of the run.
        vocabulary: Classes of the run.
        samples: Number of objects in a contact sheet, and of entries in each other list of the page.
        review: Number of least certain objects in `review.csv`.
        duplicates: Whether to compare the images, see `near_duplicates.NearDuplicates`; video frames are not compared.

    Raises:
        ConfigError: If a setting is out of range.
    """

    takes_address: ClassVar[bool] = True

    def __init__(
        self, output: OutputPath, vocabulary: Vocabulary, samples: int = 24, review: int = 200, duplicates: bool = True
    ) -> None:
        check_int("sink.report.samples", samples, 0)
        check_int("sink.report.review", review, 0)
        check_bool("sink.report.duplicates", duplicates)
        self.folder, self.vocabulary, self.duplicates = output_path(output), vocabulary, duplicates
        self._palette = vocabulary.palette()
        rng = random.Random(0)
        self._classes = [ClassStatistics(RandomSample(samples, rng)) for _ in vocabulary.classes]
        self._objects_per_image: Counter[int] = Counter()
        self._num_video_frames = 0
        self._skipped: list[Skipped] = []
        self._uncertain: Highest[_UncertainObject] = Highest(review)
        self._uncertain_thumbnails: Highest[Thumbnail] = Highest(min(samples, review))
        self._crowded: Highest[_CrowdedImage] = Highest(samples)
        self._empty: RandomSample[Thumbnail] = RandomSample(samples, rng)
        self._near_duplicates = NearDuplicates()
        self._review: PendingFile | PendingUpload | None = None

    def __enter__(self) -> ReportSink:
        for name in ("report.html", "review.csv"):
            check_output(self.folder / name)
        return self

    def write(self, result: FrameResult) -> None:
        """Count the objects of an image, and draw those that the page may show."""
        frame, detections = result.frame, result.detections
        self._objects_per_image[len(detections)] += 1
        self._num_video_frames += frame.video is not None
        if self.duplicates and frame.video is None:
            with suppress(ImageError):  # a stored result, whose file is gone
                self._near_duplicates.add(frame.name, frame.image)
        if not len(detections):
            self._write_row(frame.name, "empty")
            self._empty.offer(partial(self._draw_image, result, frame.name))
            return
        assert detections.class_id is not None
        for class_id in set(detections.class_id.tolist()):
            self._classes[class_id].num_images += 1
        for i in range(len(detections)):
            self._add_object(result, i)
        self._crowded.offer(len(detections), partial(self._crowded_image, result))

    def _add_object(self, result: FrameResult, i: int) -> None:
        """Count a detection, and offer it to the lists."""
        detections = result.detections
        assert detections.class_id is not None and detections.confidence is not None
        score, statistics = float(detections.confidence[i]), self._classes[int(detections.class_id[i])]
        statistics.add(score)
        statistics.sample.offer(partial(self._draw_object, result, i, f"{result.frame.name} · {score:.2f}"))
        self._uncertain.offer(-score, partial(_UncertainObject.from_result, result, i))
        self._uncertain_thumbnails.offer(-score, partial(self._draw_uncertain, result, i))

    def skip(self, skipped: Skipped) -> None:
        """Record a file that could not be used."""
        self._skipped.append(skipped)
        self._write_row(skipped.file, "skipped", detail=skipped.reason)

    def _draw_object(self, result: FrameResult, i: int, caption: str) -> Thumbnail:
        """Draw a detection with its surroundings."""
        height, width = result.frame.size_hw
        x1, y1, x2, y2 = result.detections.xyxy[i].tolist()
        margin = 0.3 * max(x2 - x1, y2 - y1) + 8
        left, top = max(0, int(x1 - margin)), max(0, int(y1 - margin))
        right, bottom = min(width, int(x2 + margin) + 1), min(height, int(y2 + margin) + 1)
        detection = select_rows(result.detections, [i])
        return Thumbnail(make_thumbnail(result, detection, (left, top, right, bottom), self._palette), caption)

    def _draw_uncertain(self, result: FrameResult, i: int) -> Thumbnail:
        """Draw a detection for the list of the least certain ones."""
        record = _UncertainObject.from_result(result, i)
        return self._draw_object(result, i, f"{record.file} · {record.class_name} · {record.score:.2f}")

    def _draw_image(self, result: FrameResult, caption: str) -> Thumbnail:
        """Draw all detections of an image."""
        height, width = result.frame.size_hw
        return Thumbnail(make_thumbnail(result, result.detections, (0, 0, width, height), self._palette), caption)

    def _crowded_image(self, result: FrameResult) -> _CrowdedImage:
        """Draw an image for the list of the most crowded ones."""
        name, num_objects = result.frame.name, len(result.detections)
        return _CrowdedImage(name, num_objects, self._draw_image(result, f"{name} · {count_of(num_objects, 'object')}"))

    def _write_row(self, file: str, reason: str, **columns: Any) -> None:
        """Write a row of `review.csv`; before the first one the header."""
        self._open_review()
        self._rows.writerow(
            {key: escape_cell(value) for key, value in {"file": file, "reason": reason, **columns}.items()}
        )

    def _open_review(self) -> PendingFile | PendingUpload:
        """Open `review.csv`, unless it is open."""
        if self._review is None:
            self._review = pending_text(self.folder / "review.csv")
            self._rows = csv.DictWriter(self._review.text, REVIEW_COLUMNS)
            self._rows.writeheader()
        return self._review

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if not self._objects_per_image and not self._skipped:
            return
        duplicates = self._near_duplicates.groups()
        for number, group in enumerate(duplicates, 1):
            for name in group:
                self._write_row(name, "alike", detail=f"group {number}")
        for image in self._crowded.items():
            self._write_row(image.file, "crowded", detail=count_of(image.num_objects, "object"))
        for item in self._uncertain.items():
            columns: dict[str, Any] = {"object": item.index, "class": item.class_name, "score": item.score}
            columns |= {"mask_score": item.mask_score, "object_id": item.object_id, "status": item.status}
            self._write_row(item.file, "uncertain", **columns)
        self._open_review().commit()
        content = ReportContent(
            vocabulary=self.vocabulary,
            classes=self._classes,
            num_video_frames=self._num_video_frames,
            objects_per_image=self._objects_per_image,
            uncertain=self._uncertain_thumbnails.items(),
            crowded=[image.thumbnail for image in self._crowded.items()],
            empty=self._empty.items,
            duplicates=duplicates,
            skipped=self._skipped,
        )
        atomic_write_text(self.folder / "report.html", render_page(content))

    def summary(self) -> str:
        """Return the paths of the page and of the list."""
        return f"Report: {self.folder / 'report.html'}; review list: {self.folder / 'review.csv'}"
