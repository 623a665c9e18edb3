"""Write results into a store, and look up those that are in it."""

from __future__ import annotations

import json
import os
import uuid
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import supervision as sv

from grounded_sam.errors import ConfigError, count_of
from grounded_sam.formats.store import StoreReader, renamed
from grounded_sam.formats.store_index import file_state
from grounded_sam.formats.store_manifest import sequence_of
from grounded_sam.formats.store_objects import (
    Row,
    detections_from_rows,
    in_vocabulary,
    merge_decisions,
    object_ids,
    object_rows,
)
from grounded_sam.formats.store_parts import PartBuffer
from grounded_sam.formats.store_runs import StoreRun, file_digest, oldest_first
from grounded_sam.formats.store_schema import SCHEMA
from grounded_sam.formats.store_share import KnownFile, KnownFiles, StoreShare, state_columns, stored_path
from grounded_sam.media.images import MAX_PIXELS
from grounded_sam.output.paths import OutputPath
from grounded_sam.remote import Location
from grounded_sam.structures.frame import Frame
from grounded_sam.structures.items import FileContent
from grounded_sam.structures.masks import replace_masks
from grounded_sam.structures.results import FrameResult, Skipped
from grounded_sam.structures.vocabulary import Vocabulary


class StoreWriter:
    """Write results as rows of part files; see `formats.store` for the format.

    A part is written when it has enough images or is old enough. It appears in the store when it is complete, so an
    interruption of any kind loses at most the part in memory. Several processes may write into one folder, see
    `store_share.StoreShare`.

    Args:
        folder: Folder of the store; created with the first part.
        vocabulary: Classes of the run.
        settings: All settings that decide the results; see `store_runs.fingerprint`.
        part_images: Number of images per part.
        part_seconds: Age in seconds at which a part is written even if it has fewer.
        resume: `same` refuses a store that was made with other settings; `extend` adds to it; `replace` also processes
            again what was stored with other settings. What people decided stays in each case.
        max_pixels: Stored images that are larger are refused.
        share: Of another process, which opened the store; see `join`.

    Attributes:
        images: Number of images and frames written so far.
        objects: Number of detections written so far.
        decisions: Number of decided objects by status, in images that were processed again.

    Raises:
        ConfigError: If the store was made with other settings, is damaged, or its folder is a link.
    """

    def __init__(
        self,
        folder: OutputPath,
        vocabulary: Vocabulary,
        settings: Mapping[str, Any],
        part_images: int = 512,
        part_seconds: float = 60.0,
        *,
        resume: Literal["same", "extend", "replace"] = "same",
        max_pixels: int = MAX_PIXELS,
        share: StoreShare | None = None,
    ) -> None:
        _check_no_link(folder)
        self.folder, self.vocabulary, self.images, self.objects = folder, vocabulary, 0, 0
        self._run = StoreRun.current(settings, vocabulary) if share is None else share.run
        self._replaces, self._is_opened, classes = resume == "replace", share is None, vocabulary.classes
        self._reader = StoreReader(folder, max_pixels, classes=classes, set_aside=True, is_read=self._is_opened)
        if share is None:
            if resume == "same":
                _check_settings(self._run, self._reader)
            has_classes = len(self._reader) and any(folder.glob("_run-*.json"))  # a damaged one may have been deleted
            known = vocabulary.merged_with(self._reader.vocabulary) if has_classes else vocabulary
            sequence = max(map(sequence_of, self._reader.parts), default=0)
            place = folder.absolute() if isinstance(folder, Path) else folder
            share = StoreShare(place, self._run, vocabulary, known, sequence, part_images, part_seconds, max_pixels)
        self._share, self._classes, self._files = share, share.classes, KnownFiles()
        self._parts = PartBuffer(folder, self._run, share.sequence, share.part_images, share.part_seconds)
        self._searched = _SearchedClasses(self._run, vocabulary)
        self._noted: dict[str, dict[str, Any]] = {}  # rows of skipped files of this run, by name
        self._video_row: dict[str, Any] | None = None  # of the video that is being written
        self.decisions: Counter[str] = Counter()

    def share(self) -> StoreShare:
        """Return what other processes need to write into the store for this run; see the class."""
        return self._share

    @classmethod
    def join(cls, share: StoreShare) -> StoreWriter:
        """Return a writer into a store that another process has opened; it reads nothing."""
        return cls(share.folder, share.vocabulary, {}, max_pixels=share.max_pixels, share=share)

    def known(self, name: str, files: Sequence[Path | Location], is_video: bool = False) -> KnownFile | None:
        """Return what is stored of a file that `lookup` did not find, for `expect`; None for nothing."""
        return self._files.known(self._reader.rows, name, files, is_video)

    def has_name(self, name: str, files: Sequence[Path | Location]) -> bool:
        """Return whether the store has an image or video of this name or path, with whatever content."""
        return self._reader.has_name(name, stored_path(files[0]))

    def expect(self, known: KnownFile) -> None:
        """Take over what the process that opened the store knows of a file that is about to be written."""
        self._files.expect(known)

    def output_classes(self) -> Vocabulary:
        """Return the classes of the run, followed by those stored before."""
        return self._classes

    def lookup(
        self,
        name: str,
        files: Sequence[Path | Location],
        content: FileContent | None = None,
        *,
        may_read: bool = True,
    ) -> Iterable[FrameResult] | None:
        """Return the stored results of an image or of a complete video; see `structures.protocols.Lookup`.

        A file of the same path, size and time of change is not read, nor is an object of the same address, size and
        tag; others are compared by digest. The results have the class ids of `output_classes`.
        """
        path = stored_path(files[0]) if len(files) == 1 else None
        key = digest = None
        try:
            columns = state_columns(files[0], content)  # before the content is read: a change is noticed later
            if path is not None and content is None:
                key = self._reader.find_unchanged(name, path, file_state(*columns.values()))
            if key is None or (may_read and self._is_replaced(key)):
                if content is None and not may_read:
                    return None
                digest = file_digest(files) if content is None else content.digest
                key = None if digest is None else self._reader.find(name, digest, path)
        except OSError:  # reported when the file is decoded
            return None
        if key is None or self._is_replaced(key):
            if digest is None:
                return None
            moved_from = {} if key is None or len(files) > 1 else {"path": self._reader.path_of(key)}  # stays one image
            self._files.note(name, {"digest": digest, **columns, **moved_from})
            return None
        self._searched.note(self._reader.run_of(key), name)
        return self._reader.read(key, self._classes, files)

    def _is_replaced(self, key: str) -> bool:
        """Return whether a stored result is to be computed again, because it is of a run with other settings."""
        run = self._reader.run_of(key)
        return self._replaces and (run is None or run.fingerprint != self._run.fingerprint)

    def not_searched(self) -> list[Skipped]:
        """Return, by class of this run, the stored files in which it was not looked for."""
        return self._searched.notes()

    def lost_parts(self) -> list[Skipped]:
        """Return a note for each part of the store that is missing or damaged; images in it are processed again."""
        return self._reader.lost_parts(rerun=True)

    def note(self, name: str) -> Skipped | None:
        """Return the problem that an earlier run recorded for a file, such as a truncated video; None without one."""
        return self._reader.skipped.get(name)

    def named(self, frame: Frame) -> Frame:
        """Return a frame under a name that no other file of the store has; see `StoreReader.named`."""
        if self._is_opened:
            return self._reader.named(frame, self._files.path(frame))
        return renamed(frame, self._files.unique_name(frame))

    def reviewed(self, result: FrameResult) -> FrameResult:
        """Return a result under its name in the store, with ids of its objects and with what people decided about them.

        Args:
            result: A result that is not stored yet.

        Returns:
            A result whose detections have `data["object_id"]` and `data["status"]`, without those that are the same as
            a rejected one; `predicted` is what to write into the store.
        """
        frame = self.named(result.frame)
        predicted = FrameResult(frame=result.frame, detections=_with_ids(result.raw, frame))
        digest = self._files.columns(result.frame).get("digest")
        decisions = self._reader.rows.decisions_on(result.frame, self._files.path(result.frame), digest)
        decisions += self._files.decisions(result.frame)
        if not decisions and frame is result.frame:
            return predicted
        if not decisions:
            return FrameResult(frame=frame, detections=predicted.raw, predicted=predicted)
        self.decisions.update(row["status"] for row in decisions if row["status"] != "predicted")
        rows = merge_decisions(_object_rows(predicted), decisions, self._run.fingerprint, frame.size_hw)
        known, tracked = in_vocabulary(rows, self._classes), frame.video is not None
        merged = detections_from_rows(known, frame.size_hw, self._classes, tracked=tracked)
        return FrameResult(frame=frame, detections=merged, predicted=predicted)

    def write(self, result: FrameResult) -> None:
        """Write one result.

        Raises:
            ConfigError: If a part cannot be written, such as on a full disk.
        """
        result = result.predicted or result
        if "object_id" not in result.raw.data:
            reviewed = self.reviewed(result)
            result = reviewed.predicted or reviewed
        frame, detections = result.frame, result.packed
        if self._video_row is not None and self._video_row["video"] != frame.video:
            self._end_video()
        columns = self._frame_columns(frame)
        rows = [{"kind": "image", **columns, **_image_columns(frame, detections)}]
        rows += [{"kind": "object", **columns, **row} for row in object_rows(detections)]
        if frame.name in self._noted:  # used in part; a note before the image would be taken for one of an earlier run
            rows.append(self._noted[frame.name])
        self.images += 1
        self.objects += len(detections)
        self._parts.add(rows, images=1)

    def _frame_columns(self, frame: Frame) -> dict[str, Any]:
        """Return the columns that an image row and its object rows have in common."""
        height, width = frame.size_hw
        columns: dict[str, Any] = {"file": frame.name, "path": self._files.path(frame)}
        columns |= {"fingerprint": self._run.fingerprint, "width": width, "height": height, "time_s": frame.time_s}
        columns |= self._files.columns(frame)
        if frame.video is None:
            self._files.forget(frame.name)
            return columns
        if self._video_row is None:
            self._video_row = {**columns, "kind": "video", "file": frame.video, "video": frame.video, "time_s": None}
            self._video_row |= {"take": uuid.uuid4().hex, "frame": 0}
        self._video_row["frame"] += 1
        return {**columns, "video": frame.video, "frame": frame.index, "take": self._video_row["take"]}

    def skip(self, skipped: Skipped) -> None:
        """Record a file that could not be used, unless it is recorded already; later runs try it again."""
        if self.note(skipped.file) == skipped:
            return
        row = {"kind": "skipped", "file": skipped.file, "reason": skipped.reason, "fingerprint": self._run.fingerprint}
        self._noted[skipped.file] = {**row, **self._files.noted(skipped.file)}
        self._parts.add([self._noted[skipped.file]])

    def leave_incomplete(self, video: str) -> None:
        """Take back that a video, whose last frame is written, will be complete: a later run processes it again."""
        if self._video_row is not None and self._video_row["video"] == video:
            self._video_row = None

    def close(self, complete: bool) -> None:
        """Write what is still in memory.

        Args:
            complete: Whether the last video was processed to its end; otherwise a later run processes it again.

        Raises:
            ConfigError: If it cannot be written.
        """
        if self._parts.has_failed:
            return
        if complete:
            self._end_video()
        self.flush()
        if complete and self._is_opened:
            rows = self._reader.rows
            self._parts.finish({*rows.missing_parts, *rows.damaged_parts} - rows.known_lost)

    def _end_video(self) -> None:
        """Write that a video is complete, at once: processing it may have taken hours."""
        if self._video_row is not None:
            self._files.forget(self._video_row["video"])
            self._parts.add([self._video_row])
            self._video_row = None
            self.flush()

    def flush(self) -> None:
        """Write the rows in memory as a part.

        Raises:
            ConfigError: If they cannot be written.
        """
        self._parts.flush()


def _check_no_link(folder: OutputPath) -> None:
    """Check that the folder of a store is not a link."""
    if isinstance(folder, Path) and folder.is_symlink():
        raise ConfigError(
            f"{folder} is a link to {os.readlink(folder)}, and nothing is written through links inside an output; "
            "remove the link, or choose another output"
        )


def _check_settings(current: StoreRun, reader: StoreReader) -> None:
    """Check that no result in a store is of a run with other settings."""
    in_use = reader.rows.runs_in_use()
    runs = [run for key, run in reader.rows.runs.items() if key in in_use or not in_use]
    others = [run for run in oldest_first(runs) if run.fingerprint != current.fingerprint]
    if others:
        changes = others[-1].changes(current)
        raise ConfigError(
            f"{reader.folder} was made with other settings ({'; '.join(changes[:5]) or 'by another version'}); "
            "choose another output, resume=extend to keep its results and add to them, or resume=replace to process "
            "all again and keep what people decided"
        )


def _image_columns(frame: Frame, detections: sv.Detections) -> dict[str, Any]:
    """Return the columns that only the row of an image has."""
    presence = detections.metadata.get("presence")
    return {
        "objects": len(detections),
        "record": json.dumps(dict(frame.record)) if frame.record else None,
        "presence": None if presence is None else json.dumps(presence),
    }


class _SearchedClasses:
    """Note which classes of a run were not looked for in what other runs stored.

    Args:
        run: The run.
        vocabulary: Its classes.
    """

    def __init__(self, run: StoreRun, vocabulary: Vocabulary) -> None:
        self._run, self._vocabulary = run, vocabulary
        self._lacking: dict[str, list[str]] = {}  # classes that a run did not look for, by its fingerprint
        self._unsearched: dict[str, list[str]] = {}  # names of stored files, by class

    def note(self, run: StoreRun | None, name: str) -> None:
        """Note the classes that were not looked for in an image or video that a run stored."""
        if run is None or run.fingerprint == self._run.fingerprint:
            return
        if run.fingerprint not in self._lacking:
            self._lacking[run.fingerprint] = run.lacks(self._vocabulary)
        for class_name in self._lacking[run.fingerprint]:
            self._unsearched.setdefault(class_name, []).append(name)

    def notes(self) -> list[Skipped]:
        """Return a note for each class."""
        return [_unsearched_note(class_name, names) for class_name, names in self._unsearched.items()]


def _unsearched_note(class_name: str, names: list[str]) -> Skipped:
    """Return a note that a class was not looked for in some stored files."""
    more = f" and {len(names) - 3:,} more" if len(names) > 3 else ""
    return Skipped(
        "store",
        f"{class_name!r} was not looked for in {count_of(len(names), 'stored file')} ({', '.join(names[:3])}{more}), "
        "whose results are of an earlier run with other classes; to look for it in all of them, run with another "
        "output",
    )


def _with_ids(detections: sv.Detections, frame: Frame) -> sv.Detections:
    """Return the detections of a frame with the ids of their objects."""
    names = detections.data.get("class_name", [])
    tracks = [None] * len(detections) if detections.tracker_id is None else detections.tracker_id.tolist()
    objects = list(zip(map(str, names), detections.xyxy.tolist(), tracks, strict=True))
    ids = np.array(object_ids(frame.video or frame.name, frame.name, objects), dtype=str)
    masks = None if detections.mask is None else np.asarray(detections.mask, bool)
    data = {**detections.data, "object_id": ids, "status": np.full(len(ids), "predicted")}
    return replace_masks(detections, masks, data)


def _object_rows(result: FrameResult) -> list[Row]:
    """Return the object rows of a result, with all columns."""
    return [{**dict.fromkeys(SCHEMA.names), **row} for row in object_rows(result.packed)]
