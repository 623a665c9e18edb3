"""Average precision and recall as COCO defines them (Lin et al. 2014), computed by faster-coco-eval."""

from __future__ import annotations

import contextlib
import io
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import supervision as sv
from numpy.typing import NDArray

from grounded_sam.formats.coco import CocoFile
from grounded_sam.formats.segmentations import segmentation_box
from grounded_sam.structures.vocabulary import Vocabulary

#: COCO's twelve numbers, in the order of `COCOeval.stats`.
STATS = (
    "AP", "AP50", "AP75", "AP_small", "AP_medium", "AP_large",
    "AR1", "AR10", "AR100", "AR_small", "AR_medium", "AR_large",
)  # fmt: skip
#: AR100 without regard to classes.
ANY_CLASS = "AR100_any_class"
Kind = Literal["bbox", "segm"]


@dataclass(frozen=True)
class CocoScores:
    """Scores of boxes or masks, 0 to 1; -1 where there is nothing to measure.

    Attributes:
        overall: COCO's twelve numbers, and `AR100_any_class`.
        by_class: `AP` and `AP50` of each class.
    """

    overall: dict[str, float]
    by_class: list[dict[str, float]]


class CocoEvaluator:
    """Collect detections, and evaluate them against the labels of the same images.

    Args:
        ground_truth: Labels.
        vocabulary: Classes of the run, all of which the labels have.
    """

    def __init__(self, ground_truth: CocoFile, vocabulary: Vocabulary) -> None:
        self.ground_truth, self.vocabulary = ground_truth, vocabulary
        labeled = ground_truth.vocabulary
        id_of = dict(zip(labeled.classes, labeled.category_ids, strict=True))
        self.category_ids = [id_of[name] for name in vocabulary.classes]
        self._image_ids: list[Any] = []
        self._results: list[dict[str, Any]] = []
        # faster-coco-eval does not accept strings as ids; numbers are kept, since it evaluates in their order.
        ids = [image["id"] for image in ground_truth.images]
        are_numbers = all(isinstance(image_id, int) for image_id in ids)
        self._numbers = {image_id: image_id if are_numbers else i for i, image_id in enumerate(ids)}

    def __len__(self) -> int:
        """Return the number of images so far."""
        return len(self._image_ids)

    def add(self, image: Mapping[str, Any], detections: sv.Detections) -> None:
        """Add the detections of an image.

        Args:
            image: Entry of the image in the ground truth.
            detections: Its detections, masks as RLE (see `structures.masks.pack_masks`).
        """
        self._image_ids.append(image["id"])
        for i in range(len(detections)):
            assert detections.class_id is not None and detections.confidence is not None
            # Rounded as in files: 32 bits would move some IoUs across a threshold.
            x1, y1, x2, y2 = (round(v, 3) for v in detections.xyxy[i].astype(float).tolist())
            entry = {
                "image_id": self._numbers[image["id"]],
                "category_id": self.category_ids[int(detections.class_id[i])],
                "bbox": [x1, y1, round(x2 - x1, 3), round(y2 - y1, 3)],
                "score": float(detections.confidence[i]),
            }
            if "rle" in detections.data:
                entry["segmentation"] = detections.data["rle"][i]
            self._results.append(entry)

    def kinds(self) -> list[Kind]:
        """Return what can be evaluated: `bbox`, and `segm` where labels and detections have masks."""
        has_masks = self.ground_truth.has_masks and all("segmentation" in entry for entry in self._results)
        return ["bbox", "segm"] if has_masks else ["bbox"]

    def evaluate(self, kind: Kind) -> CocoScores:
        """Evaluate the detections so far.

        Args:
            kind: Boxes or masks.
        """
        labels = self._labels()
        if not self._results:
            overall = dict.fromkeys((*STATS, ANY_CLASS), 0.0 if labels else -1.0)
            return CocoScores(overall, [{key: overall[key] for key in ("AP", "AP50")} for _ in self.category_ids])
        results = self._results
        if kind == "bbox":  # otherwise masks of boxes would be encoded
            labels, results = _without(labels, "segmentation"), _without(results, "segmentation")
        else:  # otherwise the area of a box would be taken for that of its mask
            results = _without(results, "bbox")
        return self._evaluate(labels, results, kind)

    def _labels(self) -> list[dict[str, Any]]:
        """Return the annotations of the images so far, of classes of the run that are labeled completely."""
        index_of = {number: i for i, number in enumerate(self.ground_truth.vocabulary.category_ids)}
        category_ids = set(self.category_ids)
        sizes = {image["id"]: (image["height"], image["width"]) for image in self.ground_truth.images}
        labels: list[dict[str, Any]] = []
        for image_id in self._image_ids:
            for annotation in self.ground_truth.annotations(image_id):
                number = annotation["category_id"]
                if number not in category_ids or not self.ground_truth.known[image_id].measures(index_of[number]):
                    continue
                box = annotation.get("bbox") or segmentation_box(annotation["segmentation"], sizes[image_id])
                defaults = {"iscrowd": 0, "area": box[2] * box[3]}
                ids = {"id": len(labels) + 1, "image_id": self._numbers[image_id]}
                labels.append({**defaults, **annotation, "bbox": box, **ids})
        return labels

    def _evaluate(self, labels: list[dict[str, Any]], results: list[dict[str, Any]], kind: Kind) -> CocoScores:
        """Run faster-coco-eval, without its console output."""
        from faster_coco_eval import COCO, COCOeval_faster

        image_ids = set(self._image_ids)
        images = [image for image in self.ground_truth.images if image["id"] in image_ids]
        dataset = {
            "images": [{**image, "id": self._numbers[image["id"]]} for image in images],
            "categories": [
                {"id": number, "name": name}
                for number, name in zip(self.category_ids, self.vocabulary.classes, strict=True)
            ],
            "annotations": labels,
        }
        with contextlib.redirect_stdout(io.StringIO()):
            ground_truth = COCO(dataset)
            detections = ground_truth.loadRes(results)
            evaluation = COCOeval_faster(ground_truth, detections, kind)
            evaluation.params.catIds = list(self.category_ids)
            evaluation.evaluate()
            evaluation.accumulate()
            evaluation.summarize()
            any_class = COCOeval_faster(ground_truth, detections, kind)
            any_class.params.useCats = 0
            any_class.params.areaRng, any_class.params.areaRngLbl = any_class.params.areaRng[:1], ["all"]
            any_class.params.maxDets = [100]
            any_class.evaluate()
            any_class.accumulate()
        overall = dict(zip(STATS, (float(v) for v in evaluation.stats[:12]), strict=True))
        overall[ANY_CLASS] = _mean_defined(any_class.eval["recall"])
        precision = evaluation.eval["precision"]  # IoU, recall, class, area, number of detections
        by_class = [
            {"AP": _mean_defined(precision[:, :, i, 0, -1]), "AP50": _mean_defined(precision[0, :, i, 0, -1])}
            for i in range(len(self.category_ids))
        ]
        return CocoScores(overall, by_class)


def _without(entries: list[dict[str, Any]], key: str) -> list[dict[str, Any]]:
    """Copy entries without a key."""
    return [{k: v for k, v in entry.items() if k != key} for entry in entries]


def _mean_defined(values: NDArray[np.float64]) -> float:
    """Return the mean of the values other than -1, which marks undefined ones; -1 if there are none."""
    return float(values[values > -1].mean()) if (values > -1).any() else -1.0
