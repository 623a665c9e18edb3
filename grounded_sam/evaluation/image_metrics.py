"""What was found in images against their labels."""

from __future__ import annotations

import contextlib
import io
import json
from collections.abc import Sequence
from dataclasses import asdict
from importlib.util import find_spec
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
import supervision as sv
from numpy.typing import NDArray

from grounded_sam.errors import ConfigError
from grounded_sam.evaluation.mistakes import WorstImages, check_classes, metric_value, precision_recall
from grounded_sam.evaluation.thresholds import BestThreshold, best_threshold, write_ontology
from grounded_sam.files import atomic_write
from grounded_sam.formats.coco import CocoFile, encoded_segmentation, to_xyxy
from grounded_sam.structures.detections import select_rows
from grounded_sam.structures.frame import Frame
from grounded_sam.structures.results import FrameResult
from grounded_sam.structures.vocabulary import Vocabulary

#: COCO's twelve, in the order of `COCOeval.stats`.
STATS = (
    "AP", "AP50", "AP75", "AP_small", "AP_medium", "AP_large",
    "AR1", "AR10", "AR100", "AR_small", "AR_medium", "AR_large",
)  # fmt: skip


class ImageMetrics:
    """`metrics.json`, a table at the end, and under `errors/` the images with the most mistakes.

    Average precision and recall are COCO's (Lin et al. 2014), of boxes and, where truth and results have
    them, of masks, by faster-coco-eval; -1 where there is nothing to measure. Precision, recall and F1 are of the
    detections as they stand, at the thresholds of the run: each image's are matched to its labels, the most
    confident first, within their class, at an IoU of `iou` of masks or else of boxes. The confusion matrix
    matches across classes. Classes are matched by name; labels of classes that are not asked for are left out.

    From the same matches come the best thresholds of single classes, see `thresholds`: they are in
    `metrics.json`, and as an ontology in `classes.yaml`, to be given as `text`. Only detections that the run let
    through are there to choose from, so it should have a low `select.score`.

    Args:
        output: folder of the run.
        vocabulary: of the run.
        truth: labels of the images, which are matched by their names, or else by the last part of them.
        iou: at which a detection and a label are one.
        metric: what `value()` gives, by its place in `metrics.json`; None for `segm.AP`, or without masks `bbox.AP`.
        errors: images drawn under `errors/`.
        precision: what the thresholds are to reach, with as much recall as there is; None for the best F1.

    Raises:
        ConfigError: if the truth has not the classes that are asked for; without faster-coco-eval.
    """

    def __init__(
        self,
        output: Path,
        vocabulary: Vocabulary,
        truth: CocoFile,
        iou: float = 0.5,
        metric: str | None = None,
        errors: int = 24,
        precision: float | None = None,
    ) -> None:
        if find_spec("faster_coco_eval") is None:
            raise ConfigError("sink=metrics needs faster-coco-eval: pip install 'grounded_sam[metrics]'")
        self.precision = precision
        # Of each class: number of the image, confidence and whether it is right; and labels by image.
        self._scored: list[list[tuple[int, float, bool]]] = [[] for _ in vocabulary.classes]
        self._labels: list[list[int]] = [[] for _ in vocabulary.classes]
        self.output, self.vocabulary, self.iou, self.metric = Path(output), vocabulary, float(iou), metric
        self.truth = truth
        theirs = truth.vocabulary
        check_classes(vocabulary, theirs, truth.path)
        ids = dict(zip(theirs.classes, theirs.category_ids, strict=True))
        #: Category id in the truth of each class of the run.
        self.ids = [ids[name] for name in vocabulary.classes]
        self.not_asked = [name for name in theirs.classes if name not in vocabulary.classes]
        self._by_end: dict[str, list[dict[str, Any]]] = {}
        for image in truth.images:
            for end in _ends(image["file_name"]):
                self._by_end.setdefault(end, []).append(image)
        self._of: dict[Any, str] = {}  # by id of an image, what was measured against it
        self._worst = WorstImages(errors)
        self._seen: list[Any] = []
        self._found: list[dict[str, Any]] = []
        self.unlabelled: list[str] = []
        n = len(vocabulary)
        self.counts = np.zeros((n, 3), np.int64)  # by class: matched, missed, false
        self.confusion = np.zeros((n + 1, n + 1), np.int64)  # truth x found, the last for none
        self.mistakes: list[dict[str, Any]] = []
        self.values: dict[str, Any] = {}

    def __enter__(self) -> ImageMetrics:
        return self

    def write(self, result: FrameResult) -> None:
        frame, found = result.frame, result.packed
        image = self._find(frame)
        if image is None:
            self.unlabelled.append(frame.name)
            return
        if (image["height"], image["width"]) != frame.size_hw:
            raise ConfigError(
                f"{frame.name} has {frame.size_hw[1]}x{frame.size_hw[0]} px, but {image['width']}x{image['height']} px "
                f"in {self.truth.path}"
            )
        if self._of.setdefault(image["id"], frame.name) != frame.name:
            raise ConfigError(
                f"{self._of[image['id']]} and {frame.name} would both be measured against {image['file_name']} in "
                f"{self.truth.path}; its names do not tell them apart"
            )
        self._seen.append(image["id"])
        masks = list(found.data["rle"]) if "rle" in found.data else None
        for i in range(len(found)):
            assert found.class_id is not None and found.confidence is not None
            # Thousandths of a pixel, as files have them: 32 bits alone would move some IoUs across a threshold.
            x1, y1, x2, y2 = (round(v, 3) for v in found.xyxy[i].astype(float).tolist())
            one: dict[str, Any] = {"image_id": image["id"], "category_id": self.ids[int(found.class_id[i])]}
            one |= {"bbox": [x1, y1, round(x2 - x1, 3), round(y2 - y1, 3)], "score": float(found.confidence[i])}
            if masks is not None:
                one["segmentation"] = masks[i]
            self._found.append(one)
        self._compare(result, image, masks)

    def _find(self, frame: Frame) -> dict[str, Any] | None:
        """The labelled image whose path shares the longest end with a frame's; None if none or several do."""
        exact = [image for image in self._by_end.get(frame.name, ()) if image["file_name"] == frame.name]
        if len(exact) == 1:
            return exact[0]
        path = frame.name if frame.file is None or frame.video is not None else frame.file.absolute().as_posix()
        for end in _ends(path):
            if found := self._by_end.get(end):
                return found[0] if len(found) == 1 else None
        return None

    def _compare(self, result: FrameResult, image: dict[str, Any], masks: list[Any] | None) -> None:
        """Match an image's detections with its labels, count, and keep the worst for the pictures."""
        found, labels = result.packed, self.truth.packed(image)
        place = {name: i for i, name in enumerate(self.vocabulary.classes)}
        if self.not_asked:
            labels = select_rows(labels, np.array([str(n) in place for n in labels.data["class_name"]], bool))
        theirs = np.array([place[str(name)] for name in labels.data["class_name"]], np.int64)
        crowd = np.asarray(labels.data.get("ignore", np.zeros(len(labels), bool)), bool)
        overlap = _overlap(found, labels, masks)
        ours = np.asarray(found.class_id if found.class_id is not None else np.empty(0), np.int64)
        assert found.confidence is not None
        order = np.argsort(-found.confidence, kind="stable")
        free, matched = ~crowd, np.full(len(found), -1)
        for i in order:
            fits = np.where(free & (theirs == ours[i]), overlap[i], 0.0)
            if len(fits) and fits.max() >= self.iou:
                matched[i] = fits.argmax()
                free[matched[i]] = False
        # A detection that lies in a crowd is neither right nor wrong.
        inside = _overlap(found, labels, masks, crowd)  # of a crowd, the share of the detection that is in it
        excused = np.array(
            [(inside[i] * crowd * (theirs == ours[i])).max(initial=0) >= self.iou for i in range(len(found))], bool
        )
        false = np.flatnonzero((matched < 0) & ~excused)
        missed = np.flatnonzero(free)
        for class_id, labels_ in enumerate(self._labels):
            labels_.append(int(((theirs == class_id) & ~crowd).sum()))
        for i in np.flatnonzero(~excused | (matched >= 0)).tolist():
            at = (len(self._seen) - 1, float(found.confidence[i]), bool(matched[i] >= 0))
            self._scored[ours[i]].append(at)
        for column, classes in enumerate((ours[matched >= 0], theirs[missed], ours[false])):
            self.counts[:, column] += np.bincount(classes, minlength=len(self.counts))
        self._confuse(overlap[:, ~crowd], theirs[~crowd], ours, excused)
        for kind, rows, part in (("missed", missed, labels), ("false", false, found)):
            for i in rows.tolist():
                assert part.confidence is not None
                name = str(part.data["class_name"][i])
                box = [round(float(v), 2) for v in part.xyxy[i]]
                about = {"file": result.frame.name, "kind": kind, "class": name, "xyxy": box}
                self.mistakes.append(about | ({} if kind == "missed" else {"score": float(part.confidence[i])}))
        if self._worst.most and (len(missed) or len(false)):
            self._worst.offer(result, select_rows(labels, missed), select_rows(found, false))

    def _confuse(
        self,
        overlap: NDArray[np.float64],
        theirs: NDArray[np.int64],
        ours: NDArray[np.int64],
        excused: NDArray[np.bool_],
    ) -> None:
        """Count which class was found where which was labelled, the best overlaps first."""
        pairs = np.argwhere(overlap >= self.iou)
        free_found, free_labels = ~excused, np.ones(len(theirs), bool)
        for i, j in pairs[np.argsort(-overlap[pairs[:, 0], pairs[:, 1]], kind="stable")]:
            if free_found[i] and free_labels[j]:
                free_found[i] = free_labels[j] = False
                self.confusion[theirs[j], ours[i]] += 1
        n = len(self.counts)
        self.confusion[:n, n] += np.bincount(theirs[free_labels], minlength=n)
        self.confusion[n, :n] += np.bincount(ours[free_found], minlength=n)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if not self._seen:
            if kind is None and self.unlabelled:
                labelled = ", ".join(image["file_name"] for image in self.truth.images[:3])
                raise ConfigError(
                    f"none of {len(self.unlabelled)} images has labels in {self.truth.path}; it has {labelled}, ...; "
                    f"looked at were {', '.join(self.unlabelled[:3])}, ..."
                )
            return
        kinds = ["bbox"]
        if self.truth.masks and all("segmentation" in one for one in self._found):
            kinds.append("segm")
        precise = {kind_: self._coco(kind_) for kind_ in kinds}
        whole = precision_recall(*self.counts.sum(0).tolist())
        names = self.vocabulary.classes
        best = self._best()
        self.values = {
            "images": len(self._seen),
            **{kind_: values for kind_, (values, _) in precise.items()},
            "at_threshold": {"iou": self.iou, **whole},
            "classes": {
                name: {
                    **{kind_: per_class[i] for kind_, (_, per_class) in precise.items()},
                    **precision_recall(*self.counts[i].tolist()),
                }
                for i, name in enumerate(names)
            },
            "thresholds": {name: None if one is None else asdict(one) for name, one in zip(names, best, strict=True)},
            "confusion": {"rows_truth_columns_found": [*names, "none"], "counts": self.confusion.tolist()},
            "mistakes": self.mistakes,
            "not_asked_for": self.not_asked,
            "without_labels": self.unlabelled,
            "labels_left_out": [asdict(note) for note in self.truth.notes],
        }
        with atomic_write(self.output / "metrics.json") as beside:
            beside.write_text(json.dumps(self.values, ensure_ascii=False, indent=1), encoding="utf-8")
        goal = "F1 is highest" if self.precision is None else f"precision is at least {self.precision:g}"
        note = f"Least confidence of each class where its {goal} on {len(self._seen)} labelled images."
        write_ontology(self.output / "classes.yaml", self.vocabulary, best, note)
        self._worst.write(self.output / "errors")

    def _best(self) -> list[BestThreshold | None]:
        best = []
        for scored, labels in zip(self._scored, self._labels, strict=True):
            image, score, right = (np.array(column) for column in zip(*scored, strict=True)) if scored else ([], [], [])
            columns = np.array(image, np.int64), np.array(score, np.float64), np.array(right, bool)
            best.append(best_threshold(*columns, np.array(labels, np.int64), self.precision))
        return best

    def _coco(self, kind: str) -> tuple[dict[str, float], list[dict[str, float]]]:
        """COCO's twelve numbers, recall without regard to classes, and AP and AP50 of each class."""
        from faster_coco_eval import COCO, COCOeval_faster

        chosen = set(self.ids)
        place = {image["id"]: i for i, image in enumerate(self.truth.images)}
        # Ids may be words, which the evaluation does not take; numbers stay, since it goes in their order.
        number = {key: key if all(isinstance(k, int) for k in place) else i for key, i in place.items()}
        labels: list[dict[str, Any]] = []
        for image_id in self._seen:
            image = self.truth.images[place[image_id]]
            for a in self.truth.annotations(image_id):
                if a["category_id"] in chosen:
                    box = a.get("bbox") or _box(a["segmentation"], (image["height"], image["width"]))
                    one = {"iscrowd": 0, "area": _area(box), **a, "bbox": box, "id": len(labels) + 1}
                    labels.append(one | {"image_id": number[image_id]})
        seen = set(self._seen)
        dataset = {
            "images": [image | {"id": number[image["id"]]} for image in self.truth.images if image["id"] in seen],
            "categories": [
                {"id": number} | {"name": name} for number, name in zip(self.ids, self.vocabulary.classes, strict=True)
            ],
        }
        if not self._found:
            none = dict.fromkeys((*STATS, "AR100_any_class"), 0.0 if labels else -1.0)
            return none, [{"AP": none["AP"], "AP50": none["AP50"]} for _ in self.ids]
        with contextlib.redirect_stdout(io.StringIO()):
            # With both, the area of a mask would be taken for that of its box; and masks of boxes would be encoded.
            drop = {"bbox": "segmentation", "segm": "bbox"}[kind]
            if kind == "bbox":
                labels = [{k: v for k, v in one.items() if k != drop} for one in labels]
            truth = COCO({**dataset, "annotations": labels})
            found = [one | {"image_id": number[one["image_id"]]} for one in self._found]
            results = truth.loadRes([{k: v for k, v in one.items() if k != drop} for one in found])
            run = COCOeval_faster(truth, results, kind)
            run.params.catIds = list(self.ids)
            run.evaluate()
            run.accumulate()
            run.summarize()
            any_class = COCOeval_faster(truth, results, kind)
            any_class.params.useCats = 0
            any_class.params.areaRng, any_class.params.areaRngLbl = any_class.params.areaRng[:1], ["all"]
            any_class.params.maxDets = [100]
            any_class.evaluate()
            any_class.accumulate()
        values = dict(zip(STATS, (float(v) for v in run.stats[:12]), strict=True))
        recall = any_class.eval["recall"]  # IoU, class, area, number
        values["AR100_any_class"] = float(recall[recall > -1].mean()) if (recall > -1).any() else -1.0
        precision = run.eval["precision"]  # IoU, recall, class, area, number
        per_class = []
        for i in range(len(self.ids)):
            at = [precision[:, :, i, 0, -1], precision[0, :, i, 0, -1]]
            ap, ap50 = (float(p[p > -1].mean()) if (p > -1).any() else -1.0 for p in at)
            per_class.append({"AP": ap, "AP50": ap50})
        return values, per_class

    def value(self) -> float:
        """The chosen metric, for a sweep.

        Raises:
            ConfigError: if there is no such metric.
        """
        path = self.metric or ("segm.AP" if "segm" in self.values else "bbox.AP")
        known = [f"{kind}.{key}" for kind in ("bbox", "segm") if kind in self.values for key in self.values[kind]]
        known += [f"at_threshold.{key}" for key in ("precision", "recall", "f1")]
        return metric_value(self.values, path, f"{', '.join(known)}, and classes.NAME.*")

    def summary(self) -> str:
        from rich.console import Console
        from rich.table import Table

        if not self.values:
            return "nothing to measure"
        table = Table(title=f"{len(self._seen)} images against {self.truth.path}", title_justify="left")
        kinds = [kind for kind in ("bbox", "segm") if kind in self.values]
        table.add_column("class")
        for name in [f"{kind} {key}" for kind in kinds for key in ("AP", "AP50")] + [
            "precision",
            "recall",
            "F1",
            "labels",
        ]:
            table.add_column(name, justify="right")
        rows = [("all", self.values, self.values["at_threshold"])]
        rows += [(name, about, about) for name, about in self.values["classes"].items()]
        for name, precise, counted in rows:
            numbers = [precise[kind][key] for kind in kinds for key in ("AP", "AP50")]
            numbers += [counted[key] for key in ("precision", "recall", "f1")]
            table.add_row(name, *(f"{n:.3f}" for n in numbers), str(counted["matched"] + counted["missed"]))
        out = io.StringIO()
        Console(file=out, width=110, markup=False).print(table)
        left = [f"{len(self.unlabelled)} images without labels"] if self.unlabelled else []
        left += [f"{len(self.not_asked)} classes of the truth not asked for"] if self.not_asked else []
        left += [f"{len(self.truth.notes)} labels that are not sound"] if self.truth.notes else []
        note = f" ({', '.join(left)} are left out)" if left else ""
        lines = [out.getvalue().rstrip(), f"  measured in {self.output / 'metrics.json'}{note}"]
        return "\n".join([*lines, f"  best thresholds by class in {self.output / 'classes.yaml'}"])


def _area(box: Sequence[float]) -> float:
    """The area of a label that does not say its own, as COCO does: of its box."""
    x1, y1, x2, y2 = to_xyxy(box)
    return (x2 - x1) * (y2 - y1)


def _box(segmentation: Any, size_hw: tuple[int, int]) -> list[float]:
    """The box around a segmentation, for labels without one."""
    from pycocotools import mask as coco_mask

    return list(coco_mask.toBbox(encoded_segmentation(segmentation, size_hw)).tolist())


def _overlap(
    found: sv.Detections, labels: sv.Detections, masks: list[Any] | None, crowd: NDArray[np.bool_] | None = None
) -> NDArray[np.float64]:
    """IoU of each detection with each label, of masks if both have them, `(n, m)`; with crowds as COCO has it."""
    if not len(found) or not len(labels):
        return np.zeros((len(found), len(labels)))
    from pycocotools import mask as coco_mask

    crowds = [0] * len(labels) if crowd is None else crowd.astype(int).tolist()
    if masks is not None and "rle" in labels.data:
        return np.asarray(coco_mask.iou(masks, list(labels.data["rle"]), crowds), np.float64)
    if crowd is None:
        return np.asarray(sv.box_iou_batch(found.xyxy, labels.xyxy), np.float64)
    sides = [np.column_stack([b[:, :2], b[:, 2:] - b[:, :2]]).astype(float) for b in (found.xyxy, labels.xyxy)]
    return np.asarray(coco_mask.iou(*sides, crowds), np.float64)


def _ends(path: str) -> list[str]:
    """A path and all that it ends in, the longest first: `a/b/c.png`, `b/c.png`, `c.png`."""
    parts = path.split("/")
    return ["/".join(parts[i:]) for i in range(len(parts))]
