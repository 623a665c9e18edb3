"""Results as Parquet part files, which later runs go on from."""

from __future__ import annotations

import datetime
import json
import os
import time
import uuid
from collections.abc import Iterable
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from types import TracebackType
from typing import Any, Literal

import pyarrow as pa
import pyarrow.parquet as pq
import supervision as sv

from grounded_sam.errors import ConfigError
from grounded_sam.files import atomic_write
from grounded_sam.formats.store import (
    SCHEMA,
    VERSION,
    StoreReader,
    essential_settings,
    file_digest,
    fingerprint,
    read_runs,
)
from grounded_sam.structures.masks import mask_area
from grounded_sam.structures.results import FrameResult, Skipped
from grounded_sam.structures.vocabulary import Vocabulary


class StoreSink:
    """Rows as `grounded_sam.formats.store` describes them, under `store/`.

    A part is written when it has enough images or is old enough, beside its place, and renamed into it; an
    interruption of any kind loses at most the part in memory. Run again into the same folder, what is stored
    and has not changed is not computed again: other sinks get it from the store. A video counts once it has
    been gone through whole, since memory cannot be taken up in its middle. Several processes may write
    into one folder.

    Args:
        output: folder of the run.
        vocabulary: of the run.
        settings: all that decides what is found, see `store.fingerprint`.
        resume: `same` refuses a store that other settings made; `extend` keeps what is there and adds to it.
        part_images: images of a part.
        part_seconds: age at which a part is written, even if it is small.

    Raises:
        ConfigError: if the store was made with other settings.
    """

    def __init__(
        self,
        output: Path,
        vocabulary: Vocabulary,
        settings: dict[str, Any] | None = None,
        resume: Literal["same", "extend"] = "same",
        part_images: int = 512,
        part_seconds: float = 60.0,
    ) -> None:
        if resume not in ("same", "extend"):
            raise ConfigError(f"resume must be same or extend, got {resume!r}")
        if isinstance(part_images, bool) or not isinstance(part_images, int) or part_images < 1:
            raise ConfigError(f"sink.store.part_images must be a whole number from 1, got {part_images!r}")
        if isinstance(part_seconds, bool) or not isinstance(part_seconds, int | float) or part_seconds < 0:
            raise ConfigError(f"sink.store.part_seconds must be a number from 0, got {part_seconds!r}")
        self.folder, self.vocabulary = Path(output) / "store", vocabulary
        self.settings = settings or {}
        self.fingerprint = fingerprint(self.settings, vocabulary)
        self.part_images, self.part_seconds = part_images, part_seconds
        self.replay = True  # whether anyone wants to have what is stored
        self._check(resume)
        self._reader = StoreReader(self.folder)
        #: The classes of the run, and after them those that are stored beside.
        self.classes = vocabulary.joined(self._reader.vocabulary) if len(self._reader) else vocabulary
        self._digests: dict[str, str] = {}
        #: What was wrong with files that are stored all the same.
        self.noted: list[Skipped] = []
        self._rows: list[dict[str, Any]] = []
        self._held, self._since, self._failed = 0, time.monotonic(), False
        self._video: dict[str, Any] | None = None  # the row of the one on its way
        self.images = self.objects = self.before = 0

    def _check(self, resume: str) -> None:
        others = [run for run in read_runs(self.folder) if run["fingerprint"] != self.fingerprint]
        if others and resume == "same":
            changes = _changes(
                others[-1], {"settings": essential_settings(self.settings), "vocabulary": asdict(self.vocabulary)}
            )
            raise ConfigError(
                f"{self.folder} was made with other settings ({'; '.join(changes[:5]) or 'of another version'}); "
                "choose another output, or resume=extend to keep what is there and add to it"
            )

    def __enter__(self) -> StoreSink:
        return self

    def stored(self, name: str, files: list[Path]) -> Iterable[FrameResult] | None:
        """What is stored of a picture or a whole video of this content; None if nothing is."""
        try:
            digest = file_digest(files)
        except OSError:  # it will be told of when it is read
            return None
        known = self._reader.known(name, files, digest, self.classes)
        if known is None:
            self._digests[name] = digest
            return None
        self.before += 1
        if name in self._reader.skipped:  # as of a cut video
            self.noted.append(self._reader.skipped[name])
        return known if self.replay else ()

    def write(self, result: FrameResult) -> None:
        if result.stored:
            return
        frame, found = result.frame, result.packed
        if self._video is not None and self._video["video"] != frame.video:
            self._end_video()
        name = frame.name if frame.video is None else frame.video
        digest = self._digests.pop(name, None) if frame.video is None else self._digests.get(name)
        height, width = frame.size_hw
        path = None if frame.file is None else os.fsencode(frame.file.absolute()).decode("utf-8", "backslashreplace")
        common: dict[str, Any] = {"file": frame.name, "path": path, "digest": digest, "fingerprint": self.fingerprint}
        common |= {"width": width, "height": height, "time_s": frame.time_s}
        if frame.video is not None:
            if self._video is None:
                self._video = {**common, "kind": "video", "file": name, "take": uuid.uuid4().hex, "frame": 0}
                self._video |= {"video": name, "time_s": None}
            self._video["frame"] += 1
            common |= {"video": name, "frame": frame.index, "take": self._video["take"]}
        self._rows.append({"kind": "image", **common, "objects": len(found)})
        self._rows += [{"kind": "object", **common, **_object(found, i)} for i in range(len(found))]
        self.images += 1
        self.objects += len(found)
        self._held += 1
        if self._held >= self.part_images or time.monotonic() - self._since >= self.part_seconds:
            self._flush()

    def skip(self, skipped: Skipped) -> None:
        """Note a file that could not be used, unless that is noted already; a later run tries it again."""
        if self._reader.skipped.get(skipped.file) == skipped:
            return
        row = {"kind": "skipped", "file": skipped.file, "reason": skipped.reason, "fingerprint": self.fingerprint}
        self._rows.append({**row, "digest": self._digests.get(skipped.file)})

    def _end_video(self) -> None:
        """Write that a video was gone through, at once: it may have taken hours."""
        if self._video is not None:
            self._digests.pop(self._video["video"], None)
            self._rows.append(self._video)
            self._video = None
            self._flush()

    def _flush(self) -> None:
        """Write what is held as a part, and the settings if they are not there yet."""
        if not self._rows:
            return
        now = datetime.datetime.now(datetime.UTC)
        part = self.folder / f"part-{now:%Y%m%dT%H%M%S.%f}-{uuid.uuid4().hex[:8]}.parquet"
        about = self.folder / f"_run-{self.fingerprint[:16]}.json"
        try:
            if not about.exists():
                self._describe(about, now.isoformat())
            with atomic_write(part) as beside:
                pq.write_table(pa.Table.from_pylist(self._rows, SCHEMA), beside, compression="zstd")
                with beside.open("rb") as written:
                    os.fsync(written.fileno())
        except OSError as error:
            self._failed = True
            reason = os.strerror(error.errno) if error.errno else " ".join(str(error).split())
            raise ConfigError(
                f"cannot write into {self.folder}: {reason}; what is stored so far is whole, and the same command "
                "goes on from there"
            ) from error
        self._rows, self._held, self._since = [], 0, time.monotonic()

    def _describe(self, about: Path, now: str) -> None:
        libraries = ("grounded_sam", "torch", "transformers", "sam2", "segment-anything")
        content = {
            "schema": VERSION,
            "fingerprint": self.fingerprint,
            "created": now,
            "settings": essential_settings(self.settings),
            "vocabulary": asdict(self.vocabulary),
            "versions": {name: version(name) for name in libraries},
        }
        self.folder.mkdir(parents=True, exist_ok=True)
        beside = self.folder / f".{about.name}.{uuid.uuid4().hex}"  # of its own: shards begin together
        beside.write_text(json.dumps(content, ensure_ascii=False, indent=1, default=str), encoding="utf-8")
        beside.replace(about)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._failed:
            return
        if kind is None:
            self._end_video()
        self._flush()

    def summary(self) -> str:
        before = f", {self.before} files were there before" if self.before else ""
        return f"{self.images} images with {self.objects} objects stored{before} in {self.folder}"


def _object(found: sv.Detections, i: int) -> dict[str, Any]:
    assert found.class_id is not None and found.confidence is not None
    row: dict[str, Any] = {
        "class_id": int(found.class_id[i]),
        "class": str(found.data["class_name"][i]),
        "score": float(found.confidence[i]),
        **dict(zip(("x1", "y1", "x2", "y2"), found.xyxy[i].tolist(), strict=True)),
    }
    if "rle" in found.data:
        row |= {"area": mask_area(found, i), "counts": found.data["rle"][i]["counts"].decode("ascii")}
    if "mask_score" in found.data:
        row["mask_score"] = float(found.data["mask_score"][i])
    if found.tracker_id is not None:
        row["tracker_id"] = int(found.tracker_id[i])
    return row


def _changes(before: Any, now: Any, key: str = "") -> list[str]:
    """Where two settings differ, `key: was -> is`."""
    if isinstance(before, dict) and isinstance(now, dict):
        keys = [k for k in now if k in before]
        keys += [k for k in {**before, **now} if key and k not in keys]
        return [
            change
            for k in keys
            for change in _changes(before.get(k), now.get(k), f"{key}.{k}" if key not in ("", "settings") else k)
        ]
    plain = json.loads(json.dumps(now, default=str))
    return (
        []
        if before == plain
        else [f"{key}: {json.dumps(before, ensure_ascii=False)} then, {json.dumps(plain, ensure_ascii=False)} now"]
    )
