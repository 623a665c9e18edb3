"""Metrics of tracks in videos against their labels."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from types import TracebackType
from typing import Any, Literal

import numpy as np
import supervision as sv
from numpy.typing import NDArray
from scipy.optimize import linear_sum_assignment

from grounded_sam.errors import ConfigError, count_of
from grounded_sam.evaluation.frame_matching import FrameMatcher
from grounded_sam.evaluation.mistakes import WorstImages
from grounded_sam.evaluation.phrase_metrics import RANKING, check_has_pairs, phrase_table
from grounded_sam.evaluation.values import (
    LOWER_IS_BETTER,
    check_classes,
    metric_value,
    precision_recall,
    render_table,
)
from grounded_sam.evaluation.video_phrases import VideoPhrases
from grounded_sam.evaluation.video_scores import VideoScores, has_trackeval, mean_scores, trackeval_metrics
from grounded_sam.files import atomic_write_text
from grounded_sam.formats.video_masks import FrameKey, LabelledVideo, LabelledVideos, Mask
from grounded_sam.output.claim import check_output
from grounded_sam.output.paths import OutputPath, output_path
from grounded_sam.structures.detections import select_rows
from grounded_sam.structures.masks import masks_to_xyxy
from grounded_sam.structures.results import FrameResult
from grounded_sam.structures.vocabulary import Vocabulary

#: Rules of J&F, see `VideoScores.by_object`.
RULES = ("davis", "davis_all_frames", "sav")


class VideoMetrics:
    """Write `metrics.json` and, under `errors/`, the frames with the most mistakes; print a table.

    J, F and their mean are computed by three rules, which differ in the frames that count: `davis` (semi-supervised:
    without the first and last frame), `davis_all_frames` (unsupervised) and `sav`; see `VideoScores.by_object`. With
    trackeval installed, so are HOTA, MOTA, IDF1 and identity switches. Precision, recall and F1 are of masks frame by
    frame. Labels with classes are matched with tracks of the same class name; labels of classes that the run did not
    request are left out. Labels with classes also give the phrase metrics, see `video_phrases.VideoPhrases`; HOTA is
    then the phrase-HOTA of SA-Co, since only tracks and objects of one class match. Frames without labels are not
    measured; labeled frames that were not processed are counted.

    Args:
        output: Output folder of the run.
        vocabulary: Classes of the run.
        ground_truth: Labels of the videos, which are matched by name; for frames see `FrameMatcher`.
        iou: Lowest IoU at which a track matches an object in a frame, above 0.
        metric: Metric that `value` returns, as a path into `metrics.json`; None for `davis_all_frames.JF`.
        errors: Number of frames drawn under `errors/`.
        frame_offset: What to add to the number of a frame for that of its labels; None to find out.
        objects: Which track belongs to which object: `best`, `ids` or `one`; see `VideoScores`.

    Attributes:
        values: Content of `metrics.json`, at the end of the run.

    Raises:
        ConfigError: If the labels lack a class of the run.
    """

    def __init__(
        self,
        output: OutputPath,
        vocabulary: Vocabulary,
        ground_truth: LabelledVideos,
        iou: float = 0.5,
        metric: str | None = None,
        errors: int = 24,
        objects: Literal["best", "ids", "one"] = "best",
        frame_offset: int | None = None,
    ) -> None:
        if ground_truth.vocabulary is not None:
            check_classes(vocabulary, ground_truth.vocabulary, ground_truth.path)
        self.output, self.vocabulary, self.ground_truth = output_path(output), vocabulary, ground_truth
        self.iou, self.metric, self.objects = iou, metric, objects
        self.values: dict[str, Any] = {}
        self._frame_offset = frame_offset
        self._matchers: dict[str, FrameMatcher] = {}  # by video
        self._scores: dict[str, VideoScores] = {}  # by video
        self._remaining: dict[str, dict[FrameKey, None]] = {}  # by video, labeled frames not processed yet
        self._without_labels: list[str] = []
        self._counts = np.zeros(3, np.int64)  # matched, missed, false
        # Without classes there are no phrases, and merged masks have no class.
        has_phrases = ground_truth.vocabulary is not None and objects != "one"
        self._phrases = VideoPhrases(vocabulary) if has_phrases else None
        self._unlisted: set[tuple[str, int]] = set()  # tracks of classes that the labels of their video do not list
        self._worst = WorstImages(errors)

    def __enter__(self) -> VideoMetrics:
        check_output(self.output / "metrics.json")
        return self

    def write(self, result: FrameResult) -> None:
        """Measure a frame.

        Raises:
            ConfigError: If it has no tracks or masks, its size differs from that of its labels, or it is unclear which
                labels are its own.
        """
        frame, detections = result.frame, result.detections
        video = None if frame.video is None else self.ground_truth.find(frame.video)
        if video is None:
            name = frame.name if frame.video is None else frame.video
            if name not in self._without_labels[-1:]:
                self._without_labels.append(name)
            return
        if len(detections) and (detections.tracker_id is None or detections.mask is None):
            raise ConfigError("sink=metrics of a video needs tracks with masks; choose a tracker and a segmenter")
        scores = self._scores.setdefault(video.name, VideoScores(self.objects, video.classes))
        remaining = self._remaining.setdefault(video.name, dict.fromkeys(video.frames))
        if video.name not in self._matchers:
            self._matchers[video.name] = FrameMatcher(video, self.ground_truth.path, self._frame_offset)
        key = self._matchers[video.name].find(frame)
        if key is None or key not in remaining:
            return
        del remaining[key]
        if frame.size_hw != video.size_hw:
            raise ConfigError(
                f"{frame.name} has {frame.size_hw[1]}x{frame.size_hw[0]} px, but {video.size_hw[1]}x"
                f"{video.size_hw[0]} px in {self.ground_truth.path}"
            )
        objects = {n: mask for n, mask in video.read(key).items() if self._is_requested(video, n)}
        rows: dict[int, int] = {}  # of tracks that are visible, by id
        tracks: dict[int, Mask] = {}
        if detections.tracker_id is not None and detections.mask is not None:
            rows = {int(k): i for i, k in enumerate(detections.tracker_id) if detections.mask[i].any()}
            if video.asked is not None:
                unlisted = {k for k, i in rows.items() if str(detections.data["class_name"][i]) not in video.asked}
                self._unlisted |= {(video.name, k) for k in unlisted}
                rows = {k: i for k, i in rows.items() if k not in unlisted}
            tracks = {k: np.asarray(detections.mask[i], bool) for k, i in rows.items()}
        track_classes = {k: str(detections.data["class_name"][i]) for k, i in rows.items()}
        iou = scores.add(objects, tracks, track_classes)
        if self._phrases is not None:
            self._phrases.add(video, objects, tracks, track_classes, iou)
        self._count(result, video, objects, list(rows.values()), iou)

    def _is_requested(self, video: LabelledVideo, number: int) -> bool:
        """Return whether the run requested the class of an object; True without classes."""
        return video.classes is None or video.classes[number] in self.vocabulary.classes

    def _count(
        self,
        result: FrameResult,
        video: LabelledVideo,
        objects: Mapping[int, Mask],
        rows: Sequence[int],
        iou: NDArray[np.float64],
    ) -> None:
        """Count the mistakes of a frame, and offer it to the images with the most mistakes.

        Args:
            result: Result of the frame.
            video: Labels of its video.
            objects: Masks of the labels by object id.
            rows: Rows of the visible tracks in the detections.
            iou: IoU of each object with each track; with `objects=one`, of the merged masks.
        """
        valid = np.where(iou >= self.iou, iou, 0.0)
        pairs = [(i, j) for i, j in zip(*linear_sum_assignment(-valid), strict=True) if valid[i, j] > 0]
        missed = sorted(set(range(iou.shape[0])) - {i for i, _ in pairs})
        false = sorted(set(range(iou.shape[1])) - {j for _, j in pairs})
        self._counts += len(pairs), len(missed), len(false)
        if not self._worst.max_images or (not missed and not false):
            return
        masks = list(objects.values())
        if self.objects == "one":
            masks, rows = ([np.logical_or.reduce(masks)] if masks else []), rows[:1]
        names = [(video.classes or {}).get(n, f"object {n}") for n in objects]
        missed_masks = np.array([masks[i] for i in missed], bool).reshape(-1, *result.frame.size_hw)
        missed_labels = sv.Detections(
            xyxy=masks_to_xyxy(missed_masks),
            mask=missed_masks,
            class_id=np.zeros(len(missed), int),
            data={"class_name": np.array([names[i] for i in missed], dtype=str)},
        )
        self._worst.offer(result, missed_labels, select_rows(result.detections, [rows[i] for i in false]))

    def own_folder(self) -> OutputPath:
        """Return the folder of the images with mistakes."""
        return self.output / "errors"

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        measured = {name: scores for name, scores in self._scores.items() if len(scores)}
        if not measured:
            if kind is None and (self._without_labels or self._scores):
                processed = [*self._without_labels, *self._scores]
                raise ConfigError(
                    f"no frame has labels in {self.ground_truth.path}; it has the videos "
                    f"{', '.join(list(self.ground_truth.videos)[:3])}, ...; the run processed "
                    f"{', '.join(processed[:3])}, ... (use source=video to read a folder of frames as a video)"
                )
            return
        if self.objects == "ids":
            _check_ids(measured, self.ground_truth.path)
        self.values = self._collect_values(measured)
        self.values["metric"] = self._metric_path()
        atomic_write_text(self.output / "metrics.json", json.dumps(self.values, ensure_ascii=False, indent=1))
        self._worst.write(self.output / "errors")

    def _collect_values(self, measured: Mapping[str, VideoScores]) -> dict[str, Any]:
        """Compute the content of `metrics.json` from the scores by video."""
        objects_by_video = {name: scores.by_object() for name, scores in measured.items()}
        all_objects = [scores for objects in objects_by_video.values() for scores in objects.values()]
        tracking: dict[str, Any] = {}
        tracking_by_video: dict[str, dict[str, Any]] = {}
        if has_trackeval():
            frames = {name: scores.for_trackeval() for name, scores in measured.items()}
            tracking, tracking_by_video = trackeval_metrics(frames)
        return {
            "videos": len(measured),
            "frames": sum(map(len, measured.values())),
            "objects": len(all_objects),
            "which_track": self.objects,
            **mean_scores(all_objects),
            "tracking": tracking,
            "at_threshold": {"iou": self.iou, **precision_recall(*self._counts.tolist())},
            **self._phrase_values(),
            "by_video": {
                name: {
                    "frames": len(measured[name]),
                    **mean_scores(list(objects.values())),
                    "tracking": tracking_by_video.get(name, {}),
                    "objects": objects,
                    "not_processed": len(self._remaining[name]),
                }
                for name, objects in objects_by_video.items()
            },
            "without_labels": self._without_labels,
            "videos_not_processed": [name for name in self.ground_truth.videos if name not in measured],
        }

    def _phrase_values(self) -> dict[str, Any]:
        """Return the metrics of phrases, overall and by class; none without classes."""
        if self._phrases is None:
            return {}
        classes = {name: {"phrases": values} for name, values in self._phrases.by_class().items()}
        return {"phrases": self._phrases.values(), "classes": classes, "tracks_left_out": len(self._unlisted)}

    def _metric_path(self) -> str:
        return self.metric or "davis_all_frames.JF"

    def value(self) -> float:
        """Return the metric that a sweep maximizes.

        Raises:
            ConfigError: If the chosen metric does not exist, or a lower one is better.
        """
        choices = [f"{rule}.JF" for rule in RULES]
        choices += [f"tracking.{key}" for key in self.values.get("tracking", {}) if key not in LOWER_IS_BETTER]
        choices.append("at_threshold.f1")
        if "phrases" in self.values:
            choices += [f"phrases.{key}" for key in RANKING]
            check_has_pairs(self._metric_path(), self.values)
        return metric_value(self.values, self._metric_path(), f"{', '.join(choices)}, and by_video.NAME.*")

    def summary(self) -> str:
        """Return a table of the metrics by video, what was left out, and the file."""
        if not self.values:
            return "nothing to measure"
        tracking = [key for key in ("HOTA", "IDF1", "IDSW") if key in self.values["tracking"]]
        columns = ["video", "objects", "J", "F", "J&F davis", "J&F all frames", "J&F sav", *tracking]
        rows = []
        for name, values in [("all", self.values), *self.values["by_video"].items()]:
            count = values["objects"] if isinstance(values["objects"], int) else len(values["objects"])
            scores = [values["davis"]["J_mean"], values["davis"]["F_mean"], *(values[rule]["JF"] for rule in RULES)]
            cells = [*(f"{score:.3f}" for score in scores), *(f"{values['tracking'][key]:.4g}" for key in tracking)]
            rows.append([name, str(count), *cells])
        title = f"{count_of(self.values['frames'], 'frame')} against {self.ground_truth.path}"
        notes = _notes(self.values)
        note = f" ({'; '.join(notes)})" if notes else ""
        tables = [render_table(title, columns, rows, width=120)]
        if self._phrases is not None:
            tables.append(phrase_table(self.values))
        tables_text = "\n".join(tables)
        return f"{tables_text}\n  metrics in {self.output / 'metrics.json'}{note}"


def _check_ids(measured: Mapping[str, VideoScores], path: OutputPath) -> None:
    """Check that some track has the id of an object.

    Raises:
        ConfigError: If none has, since ids then cannot match tracks to objects.
    """
    objects = sorted({n for scores in measured.values() for n in scores.object_ids()})
    tracks = sorted({k for scores in measured.values() for k in scores.track_ids()})
    if objects and tracks and not set(objects) & set(tracks):
        raise ConfigError(
            f"sink.metrics.objects=ids: no track has the id of an object; objects of {path} are "
            f"{', '.join(map(str, objects[:5]))}, tracks {', '.join(map(str, tracks[:5]))}; choose best to assign "
            "tracks by overlap, or one to measure all masks of a frame together"
        )


def _notes(values: Mapping[str, Any]) -> list[str]:
    """Return what was not measured, for the summary."""
    notes = []
    if frames := sum(video["not_processed"] for video in values["by_video"].values()):
        notes.append(f"not processed: {count_of(frames, 'labeled frame')}")
    if values["videos_not_processed"]:
        notes.append(f"not processed: {count_of(len(values['videos_not_processed']), 'labeled video')}")
    if unlisted := values.get("tracks_left_out"):
        one, several = (f"{word} of classes that are not labeled in their video" for word in ("track", "tracks"))
        notes.append(f"left out: {count_of(unlisted, one, several)}")
    if values["without_labels"]:
        notes.append(f"{count_of(len(values['without_labels']), 'video or image', 'videos or images')} without labels")
    if not values["tracking"]:
        notes.append("install trackeval for HOTA, IDF1 and identity switches")
    return notes
