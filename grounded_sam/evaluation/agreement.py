"""How far the jobs of a sweep agree, where there is no ground truth to measure them with."""

from __future__ import annotations

import zlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path

import numpy as np
import supervision as sv

from grounded_sam.errors import ConfigError
from grounded_sam.evaluation.comparison import pair_detections
from grounded_sam.formats.coco import CocoFile
from grounded_sam.formats.store import StoreReader, find_store
from grounded_sam.media.images import MAX_PIXELS

#: Height and width of an image, and its detections with masks as RLE.
SizedDetections = tuple[tuple[int, int], sv.Detections]
#: Most comparisons of two jobs in one image; of more images, some are chosen at random.
MAX_COMPARISONS = 50_000


def keeps_detections(folder: Path) -> bool:
    """Return whether a job kept its detections, in a store or a COCO file.

    Args:
        folder: Folder of the job.
    """
    return any((folder / "store").glob("_run-*.json")) or (folder / "annotations.json").is_file()


def read_results(folder: Path, max_pixels: int = MAX_PIXELS) -> Iterator[tuple[str, SizedDetections]]:
    """Read what a job found in each image or frame, from its store or else its COCO file.

    Args:
        folder: Folder of the job.
        max_pixels: Larger images are refused.

    Yields:
        Name, size (height, width) and detections with masks as RLE of each image.

    Raises:
        ConfigError: If it has neither, or they are damaged.
    """
    if not keeps_detections(folder):
        raise ConfigError(
            f"{folder} has no detections; run the sweep with sink=[metrics,coco], or with a store in sink"
        )
    if any((folder / "store").glob("_run-*.json")):
        reader = StoreReader(find_store(folder), max_pixels)
        for key in list(reader.keys()):
            for result in reader.read(key, reader.vocabulary):
                yield result.frame.name, (result.frame.size_hw, result.packed)
        return
    labels = CocoFile(folder / "annotations.json", allow_mixed=True, max_pixels=max_pixels)
    for image in labels.images:
        yield str(image["file_name"]), ((image["height"], image["width"]), labels.packed_labels(image))


def agreement(a: Mapping[str, sv.Detections], b: Mapping[str, sv.Detections], min_iou: float = 0.5) -> float | None:
    """Return the share of their objects that two jobs have in common.

    That is twice the number of pairs of the same class and an IoU of at least `min_iou`, divided by the number of
    objects of both: the F1 of either job, if the other one were the ground truth.

    Args:
        a: Detections of one job by the name of their image; with `data["class_name"]`, masks as RLE or none.
        b: Detections of the other one. Only images of both count.
        min_iou: Lowest IoU of a pair, above 0; of masks if both jobs have them, else of boxes.

    Returns:
        0 to 1; 1 if neither has an object, None if they have no image in common.

    >>> box = sv.Detections(np.array([[0, 0, 9, 9]]), data={"class_name": np.array(["car"])})
    >>> two = sv.Detections(np.array([[0, 0, 9, 9], [20, 0, 29, 9]]), data={"class_name": np.array(["car", "car"])})
    >>> round(agreement({"1.jpg": box}, {"1.jpg": two}), 3)
    0.667
    """
    common = [name for name in a if name in b]
    if not common:
        return None
    matched = sum(len(pair_detections(a[name], b[name], min_iou).matched) for name in common)
    total = sum(len(a[name]) + len(b[name]) for name in common)
    return 2 * matched / total if total else 1.0


@dataclass(frozen=True)
class JobAgreement:
    """How far the jobs of a sweep agree.

    Attributes:
        values: Agreement of each pair of jobs, 0 to 1, both ways round; None where they have no image in common.
        notes: Sentences on what was left out.
    """

    values: Mapping[tuple[str, str], float | None]
    notes: Sequence[str]

    def mean(self, job: str) -> float | None:
        """Return the mean agreement of a job with the others; None if there is none."""
        values = [value for (a, _), value in self.values.items() if a == job and value is not None]
        return float(np.mean(values)) if values else None


def compare_jobs(
    folder: Path, inputs: Mapping[str, str], num_images: int, max_pixels: int = MAX_PIXELS
) -> JobAgreement:
    """Compare what the jobs of a sweep found.

    Args:
        folder: Folder of the sweep.
        inputs: What each job processed, by its folder there; only jobs with the same input are compared.
        num_images: Largest number of images of a job.
        max_pixels: Larger images are refused.
    """
    kept = [name for name in inputs if keeps_detections(folder / name)]
    notes = []
    if missing := [name for name in inputs if name not in kept]:
        shown = ", ".join(missing[:5]) + (f" and {len(missing) - 5:,} more" if len(missing) > 5 else "")
        jobs = "job" if len(missing) == 1 else "jobs"
        notes.append(f"no agreement of {jobs} {shown}, which kept no detections: add coco or store to sink")
    pairs = [(a, b) for a, b in combinations(kept, 2) if inputs[a] == inputs[b]]
    one_in = -(-num_images * len(pairs) // MAX_COMPARISONS)
    if one_in > 1:
        notes.append(f"the agreement is that of one in {one_in:,} images, chosen at random")
    found: dict[str, dict[str, sv.Detections]] = {}
    for name in dict.fromkeys(name for pair in pairs for name in pair):
        try:
            found[name] = {
                image: detections
                for image, (_, detections) in read_results(folder / name, max_pixels)
                if one_in < 2 or zlib.crc32(image.encode("utf-8", "surrogatepass")) % one_in == 0
            }
        except ConfigError as error:
            notes.append(f"no agreement of job {name}: {error}")
    values: dict[tuple[str, str], float | None] = {}
    for a, b in pairs:
        if a in found and b in found:
            values[a, b] = values[b, a] = agreement(found[a], found[b])
    return JobAgreement(values, notes)
