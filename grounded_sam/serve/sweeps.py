"""Compare the jobs of sweeps: the table, and which objects of two jobs are the same."""

from __future__ import annotations

import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import supervision as sv

from grounded_sam.errors import GroundedSamError
from grounded_sam.evaluation.agreement import keeps_detections, read_results
from grounded_sam.evaluation.comparison import pair_detections
from grounded_sam.evaluation.sweep_table import Job, SweepTable, compare_unmeasured, make_table, read_jobs
from grounded_sam.serve.objects import MaskForm, object_entries
from grounded_sam.serve.problems import RequestError, public_message
from grounded_sam.serve.roots import Roots
from grounded_sam.serve.store_pictures import PAGE
from grounded_sam.serve.stores import named_folders
from grounded_sam.serve.sweep_pictures import job_picture


@dataclass(frozen=True, eq=False)
class ComparedPicture:
    """The detections of two jobs in one image.

    Attributes:
        name: Its name.
        size_hw: Height and width in pixels.
        a: Detections of the first job, masks as RLE.
        b: Detections of the second job.
    """

    name: str
    size_hw: tuple[int, int]
    a: sv.Detections
    b: sv.Detections


class Sweeps:
    """The sweeps of a server by name.

    Args:
        folders: Their folders by name.
        roots: What the server may read.
        max_pixels: Larger images are refused.

    Raises:
        ConfigError: If a folder is not in one of the roots.
    """

    def __init__(self, folders: Mapping[str, str], roots: Roots, max_pixels: int) -> None:
        self.folders = named_folders("sweeps", folders, roots)
        self._roots, self._max_pixels = roots, max_pixels
        self._tables: dict[str, tuple[Any, SweepTable]] = {}
        self._lock = threading.Lock()

    def folder(self, name: str) -> Path:
        """Return the folder of a sweep.

        Raises:
            RequestError: If the server has no such sweep (404).
        """
        if name not in self.folders:
            known = ", ".join(self.folders) or "none; see serve.sweeps"
            raise RequestError(404, f"no sweep {name[:80]!r}; the sweeps are {known}")
        return self.folders[name]

    def table(self, name: str) -> dict[str, Any]:
        """Return the table of a sweep: `metric`, `columns`, `rows` and `notes`.

        Raises:
            RequestError: If there is no such sweep (404).
            ConfigError: If its folder has no job.
        """
        folder = self.folder(name)
        jobs = read_jobs(folder)
        files = [folder / job.name / "run.json" for job in jobs]
        state = [(str(path), path.stat().st_mtime_ns) for path in files if path.is_file()]
        with self._lock:  # one request compares, the others wait for it
            if name not in self._tables or self._tables[name][0] != state:
                self._tables[name] = state, self._make_table(folder, jobs)
            table = self._tables[name][1]
        folders = [folder, *self._roots.folders]
        rows = [{c: public_text(row.get(c), folders) for c in table.columns} for row in table.rows]
        return {
            "metric": table.metric,
            "columns": table.columns,
            "rows": rows,
            "notes": [public_text(note, folders) for note in table.notes],
        }

    def _make_table(self, folder: Path, jobs: Sequence[Job]) -> SweepTable:
        """Make the table of a sweep; the detections of jobs outside of the roots are not read."""
        inside = [job for job in jobs if self._roots.contains(folder / job.name)]
        found = compare_unmeasured(folder, inside, self._max_pixels) if inside else None
        table = make_table(jobs, found)
        if found is not None and len(inside) < len(jobs):
            note = "no agreement of jobs outside of the folders that this server may read (serve.roots)"
            return replace(table, notes=[*table.notes, note])
        return table

    def compare(self, name: str, a: str, b: str, min_iou: float, masks: MaskForm, cursor: int) -> dict[str, Any]:
        """Return a page of the images of two jobs, most different first.

        Args:
            name: Name of the sweep.
            a: Name of a job, as in the table.
            b: Name of another job.
            min_iou: Lowest IoU of two objects that are the same.
            masks: Form of the masks.
            cursor: Number of images to pass over.

        Returns:
            `total`, `matched`, `only_a` and `only_b` (numbers of objects), `pictures` and `next`.

        Raises:
            RequestError: If there is no such sweep or job (404), or a job kept no detections (409).
        """
        jobs = [self._job(name, job) for job in (a, b)]
        results = [dict(read_results(job, self._max_pixels)) for job in jobs]
        names = dict.fromkeys([*results[0], *results[1]])
        compared = []
        for picture in names:
            in_a, in_b = (side.get(picture) for side in results)
            size_hw, _ = in_a or in_b or ((0, 0), None)
            a_side, b_side = (sv.Detections.empty() if side is None else side[1] for side in (in_a, in_b))
            item = ComparedPicture(picture, size_hw, a_side, b_side)
            compared.append((item, pair_detections(a_side, b_side, min_iou)))
        compared.sort(key=lambda item: -item[1].num_different)
        page = compared[cursor : cursor + PAGE]
        pictures = []
        for item, pairs in page:
            a_entries, b_entries = (_entries(side, masks) for side in (item.a, item.b))
            pictures.append(
                {
                    "name": item.name,
                    "width": item.size_hw[1],
                    "height": item.size_hw[0],
                    "matched": [
                        {"a": a_entries[i], "b": b_entries[j], "iou": round(iou, 6)} for i, j, iou in pairs.matched
                    ],
                    "only_a": [a_entries[i] for i in pairs.only_a],
                    "only_b": [b_entries[i] for i in pairs.only_b],
                }
            )
        return {
            "total": len(compared),
            "matched": sum(len(pairs.matched) for _, pairs in compared),
            "only_a": sum(len(pairs.only_a) for _, pairs in compared),
            "only_b": sum(len(pairs.only_b) for _, pairs in compared),
            "pictures": pictures,
            "next": None if cursor + PAGE >= len(compared) else cursor + PAGE,
        }

    def picture(self, name: str, job: str, picture: str, max_side: int | None) -> bytes:
        """Return an image of a job as JPEG, see `sweep_pictures.job_picture`.

        Args:
            name: Name of the sweep.
            job: Name of a job, as in the table.
            image: Name of the image, as in a comparison.
            max_side: Longest side in pixels; None for no limit.

        Raises:
            RequestError: If there is no such sweep, job or image (404), or it is outside of the roots (403).
        """
        return job_picture(self._job(name, job), picture, self._roots, self._max_pixels, max_side)

    def _job(self, name: str, job: str) -> Path:
        """Return the folder of a job.

        Raises:
            RequestError: If there is no such job (404), or it is outside of the roots (403).
        """
        folder = self.folder(name)
        known = [entry.name for entry in read_jobs(folder)]
        if job not in known:
            raise RequestError(404, f"sweep {name} has no job {job[:80]!r}; the jobs are {', '.join(known[:50])}")
        path = folder / job
        if not self._roots.contains(path):
            raise RequestError(403, "the job is outside of the folders that this server may read (serve.roots)")
        if not keeps_detections(path):
            raise RequestError(
                409, f"job {job} kept no detections; run the sweep with sink=[metrics,coco], or with a store in sink"
            )
        return path


def _entries(detections: sv.Detections, masks: MaskForm) -> list[dict[str, Any]]:
    """Return the entries of detections; none of an empty set, which may lack columns."""
    return object_entries(detections, range(len(detections)), masks) if len(detections) else []


def public_text(value: Any, folders: list[Path]) -> Any:
    """Return a cell of a table without paths of this machine; other values than texts stay as they are."""
    return public_message(GroundedSamError(value), folders) if isinstance(value, str) and value else value
