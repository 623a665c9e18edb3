"""What was followed through videos against their labels."""

from __future__ import annotations

import io
import json
from pathlib import Path
from types import TracebackType
from typing import Any, Literal

import numpy as np
import supervision as sv
from scipy.optimize import linear_sum_assignment

from grounded_sam.errors import ConfigError
from grounded_sam.evaluation.mistakes import LESS_IS_BETTER, WorstImages, check_classes, metric_value, precision_recall
from grounded_sam.evaluation.video_scores import VideoScores, has_trackeval, mean_scores, trackeval_metrics
from grounded_sam.files import atomic_write
from grounded_sam.formats.video_masks import LabelledVideo, LabelledVideos, Mask, frame_key
from grounded_sam.structures.detections import select_rows
from grounded_sam.structures.masks import masks_to_xyxy
from grounded_sam.structures.results import FrameResult
from grounded_sam.structures.vocabulary import Vocabulary


class VideoMetrics:
    """`metrics.json`, a table at the end, and under `errors/` the frames with the most mistakes.

    J, F and their mean by three rules, which differ in the frames that count, see `VideoScores.by_object`: `davis`
    (semi-supervised: neither the first nor the last), `davis_all_frames` (unsupervised) and `sav`. By trackeval,
    where it is installed: HOTA, MOTA, IDF1, identity switches. Precision, recall and F1 are of masks frame by frame.
    Labels that have classes are matched within them, by name; labels of classes that are not asked for are left out.
    Frames without labels are not measured, labelled ones that were not looked at are counted.

    Args:
        output: folder of the run.
        vocabulary: of the run.
        truth: labels of the videos, which are matched by their names; frames by the number at the end of theirs.
        iou: at which a track and an object are one in a frame.
        metric: what `value()` gives, by its place in `metrics.json`; None for `davis_all_frames.JF`.
        errors: frames drawn under `errors/`.
        objects: which track is which object; see `VideoScores`.

    Raises:
        ConfigError: if the truth has not the classes that are asked for.
    """

    def __init__(
        self,
        output: Path,
        vocabulary: Vocabulary,
        truth: LabelledVideos,
        iou: float = 0.5,
        metric: str | None = None,
        errors: int = 24,
        objects: Literal["best", "ids", "one"] = "best",
    ) -> None:
        self.output, self.truth, self.iou = Path(output), truth, iou
        self.vocabulary, self.metric, self.objects = vocabulary, metric, objects
        if truth.vocabulary is not None:
            check_classes(vocabulary, truth.vocabulary, truth.path)
        self._scores: dict[str, VideoScores] = {}
        self._labelled: dict[str, dict[int | str, None]] = {}  # of each video the labelled frames to come
        self._worst = WorstImages(errors)
        self._counts = np.zeros(3, np.int64)  # matched, missed, false
        self.unlabelled: list[str] = []
        self.values: dict[str, Any] = {}

    def __enter__(self) -> VideoMetrics:
        return self

    def write(self, result: FrameResult) -> None:
        frame, found = result.frame, result.detections
        video = None if frame.video is None else self.truth.find(frame.video)
        if video is None:
            name = frame.name if frame.video is None else frame.video
            if name not in self.unlabelled[-1:]:
                self.unlabelled.append(name)
            return
        if len(found) and (found.tracker_id is None or found.mask is None):
            raise ConfigError("sink=metrics of a video needs tracks with masks; choose a tracker and a segmenter")
        scores = self._scores.setdefault(video.name, VideoScores(self.objects, video.classes))
        left = self._labelled.setdefault(video.name, dict.fromkeys(video.frames))
        key = frame_key(frame.name)
        if key not in left:
            return
        del left[key]
        if frame.size_hw != video.size_hw:
            raise ConfigError(
                f"{frame.name} has {frame.size_hw[1]}x{frame.size_hw[0]} px, but {video.size_hw[1]}x"
                f"{video.size_hw[0]} px in {self.truth.path}"
            )
        truth = {n: mask for n, mask in video.read(key).items() if self._asked(video, n)}
        ids = [] if found.tracker_id is None else [int(i) for i in found.tracker_id]
        rows = {i: row for row, i in enumerate(ids) if found.mask is not None and found.mask[row].any()}
        names = {i: str(found.data["class_name"][row]) for i, row in rows.items()}
        masks = {i: np.asarray(found.mask[row], bool) for i, row in rows.items() if found.mask is not None}
        self._compare(result, truth, list(rows.values()), scores.add(truth, masks, names), video)

    def _asked(self, video: LabelledVideo, number: int) -> bool:
        return video.classes is None or video.classes[number] in self.vocabulary.classes

    def _compare(
        self, result: FrameResult, truth: dict[int, Mask], rows: list[int], overlap: Any, video: LabelledVideo
    ) -> None:
        """Count the mistakes of a frame, and keep it if it has many."""
        fits = np.where(overlap >= self.iou, overlap, 0.0)
        at = [(i, j) for i, j in zip(*linear_sum_assignment(-fits), strict=True) if fits[i, j] > 0]
        missed = sorted(set(range(overlap.shape[0])) - {i for i, _ in at})
        false = sorted(set(range(overlap.shape[1])) - {j for _, j in at})
        self._counts += len(at), len(missed), len(false)
        if not self._worst.most or (not missed and not false):
            return
        masks = [truth[n] for n in truth]
        if self.objects == "one":
            masks, rows = ([np.logical_or.reduce(masks)] if masks else []), rows[:1]
        stack = np.array([masks[i] for i in missed], bool).reshape(-1, *result.frame.size_hw)
        names = [(video.classes or {}).get(n, f"object {n}") for n in truth]
        shown = sv.Detections(
            xyxy=masks_to_xyxy(stack),
            mask=stack,
            class_id=np.zeros(len(stack), int),
            data={"class_name": np.array([names[i] for i in missed], dtype=str)},
        )
        self._worst.offer(result, shown, select_rows(result.detections, [rows[i] for i in false]))

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        measured = {name: scores for name, scores in self._scores.items() if len(scores)}
        if not measured:
            if kind is None and (self.unlabelled or self._scores):
                looked = [*self.unlabelled, *self._scores]
                raise ConfigError(
                    f"no frame has labels in {self.truth.path}; it has the videos "
                    f"{', '.join(list(self.truth.videos)[:3])}, ...; looked at were {', '.join(looked[:3])}, ... "
                    "(a folder of frames is a video with source=video)"
                )
            return
        single = {name: scores.by_object() for name, scores in measured.items()}
        if self.objects == "ids":
            self._check_numbers(measured)
        whole: dict[str, Any] = {}
        tracks: dict[str, dict[str, Any]] = {}
        if has_trackeval():
            whole, tracks = trackeval_metrics({name: scores.for_trackeval() for name, scores in measured.items()})
        every = [one for objects in single.values() for one in objects.values()]
        self.values = {
            "videos": len(measured),
            "frames": sum(map(len, measured.values())),
            "objects": len(every),
            "which_track": self.objects,
            **mean_scores(every),
            "tracking": whole,
            "at_threshold": {"iou": self.iou, **precision_recall(*self._counts.tolist())},
            "by_video": {
                name: {
                    "frames": len(measured[name]),
                    **mean_scores(list(objects.values())),
                    "tracking": tracks.get(name, {}),
                    "objects": objects,
                    "not_looked_at": len(self._labelled[name]),
                }
                for name, objects in single.items()
            },
            "without_labels": self.unlabelled,
            "videos_not_looked_at": [name for name in self.truth.videos if name not in measured],
        }
        with atomic_write(self.output / "metrics.json") as beside:
            beside.write_text(json.dumps(self.values, ensure_ascii=False, indent=1), encoding="utf-8")
        self._worst.write(self.output / "errors")

    def _check_numbers(self, measured: dict[str, VideoScores]) -> None:
        """Raises ConfigError if tracks and objects have numbers, and not one in common: then those say nothing."""
        objects, tracks = (sorted({n for scores in measured.values() for n in scores.numbers(i)}) for i in (0, 1))
        if objects and tracks and not set(objects) & set(tracks):
            raise ConfigError(
                f"sink.metrics.objects=ids: no track has the number of an object; objects of {self.truth.path} are "
                f"{', '.join(map(str, objects[:5]))}, tracks {', '.join(map(str, tracks[:5]))}; best goes by overlap, "
                "one takes all of a frame together"
            )

    def value(self) -> float:
        """The chosen metric, for a sweep.

        Raises:
            ConfigError: if there is no such metric.
        """
        known = [f"{rule}.JF" for rule in ("davis", "davis_all_frames", "sav")]
        known += [f"tracking.{key}" for key in self.values.get("tracking", {}) if key not in LESS_IS_BETTER]
        known.append("at_threshold.f1")
        path = self.metric or "davis_all_frames.JF"
        return metric_value(self.values, path, f"{', '.join(known)}, and by_video.NAME.*")

    def summary(self) -> str:
        from rich.console import Console
        from rich.table import Table

        if not self.values:
            return "nothing to measure"
        title = f"{self.values['frames']} frames against {self.truth.path}"
        table = Table(title=title, title_justify="left")
        table.add_column("video")
        columns = ["objects", "J", "F", "J&F davis", "J&F all frames", "J&F sav"]
        tracked = [key for key in ("HOTA", "IDF1", "IDSW") if key in self.values["tracking"]]
        for name in [*columns, *tracked]:
            table.add_column(name, justify="right")
        for name, row in [("all", self.values), *self.values["by_video"].items()]:
            count = row["objects"] if isinstance(row["objects"], int) else len(row["objects"])
            numbers = [row["davis"]["J_mean"], row["davis"]["F_mean"]]
            numbers += [row[rule]["JF"] for rule in ("davis", "davis_all_frames", "sav")]
            more = [row["tracking"][key] for key in tracked]
            table.add_row(name, str(count), *(f"{n:.3f}" for n in numbers), *(f"{n:.4g}" for n in more))
        out = io.StringIO()
        Console(file=out, width=120, markup=False).print(table)
        away = sum(row["not_looked_at"] for row in self.values["by_video"].values())
        notes = [f"{away} labelled frames were not looked at"] if away else []
        if self.unlabelled:
            notes.append(f"{len(self.unlabelled)} videos or pictures without labels")
        if self.values["videos_not_looked_at"]:
            notes.append(f"{len(self.values['videos_not_looked_at'])} labelled videos were not looked at")
        if not self.values["tracking"]:
            notes.append("for HOTA, IDF1 and switches install trackeval")
        note = f" ({'; '.join(notes)})" if notes else ""
        return f"{out.getvalue().rstrip()}\n  measured in {self.output / 'metrics.json'}{note}"
