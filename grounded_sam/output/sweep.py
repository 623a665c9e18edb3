"""Which jobs a sweep has, and in which folders they are."""

from __future__ import annotations

import json
import os
import shutil
import uuid
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from grounded_sam.errors import ConfigError
from grounded_sam.output.paths import STATE


@dataclass(frozen=True)
class JobEntry:
    """A job, as it is registered when it starts.

    Attributes:
        number: Its number in the sweep, from 0.
        folder: Its folder, relative to that of the sweep unless it is elsewhere.
        overrides: Its overrides.
        error: Why it could not start; None if it did.
    """

    number: int
    folder: str
    overrides: list[str]
    error: str | None = None


@dataclass(frozen=True)
class Sweep:
    """A sweep, which later sweeps into the same folder do not mix with.

    Attributes:
        folder: Folder of the sweep.
        id: Unique id.
    """

    folder: Path
    id: str

    @classmethod
    def start(cls, folder: Path) -> Sweep:
        """Start a sweep in a claimed folder; remove the shared predictions of the last one, if it was killed."""
        if (last := cls.last(folder)) is not None:
            last.remove_predictions()
        sweep = cls(folder, uuid.uuid4().hex)
        _write_json(folder / STATE / "sweep.json", {"id": sweep.id})
        return sweep

    @classmethod
    def last(cls, folder: Path) -> Sweep | None:
        """Return the last sweep that was started in a folder; None if there was none."""
        content = _read_json(folder / STATE / "sweep.json")
        sweep_id = content.get("id")
        return cls(folder, sweep_id) if isinstance(sweep_id, str) and sweep_id.isalnum() else None

    @property
    def predictions(self) -> Path:
        """Folder of the predictions that the jobs share."""
        return self.folder / STATE / f"predictions-{self.id}"

    def remove_predictions(self) -> None:
        """Remove the shared predictions."""
        if not self.predictions.is_symlink():
            shutil.rmtree(self.predictions, ignore_errors=True)

    def entry(self, number: int, output: Path, overrides: Sequence[str]) -> JobEntry:
        """Describe a job.

        Args:
            number: Its number in the sweep.
            output: Its folder.
            overrides: Its overrides.
        """
        sweep, folder = Path(os.path.abspath(self.folder)), Path(os.path.abspath(output))
        name = folder.relative_to(sweep).as_posix() if folder.is_relative_to(sweep) else str(folder)
        return JobEntry(number, name, list(overrides))

    def register(self, entry: JobEntry) -> None:
        """Register a job when it starts.

        Raises:
            ConfigError: If another job has the same folder.
        """
        for other in self.jobs():
            if other.folder == entry.folder and other.number != entry.number:
                raise ConfigError(
                    f"jobs {other.number} and {entry.number} of the sweep have the same folder {entry.folder}; give "
                    "each its own, such as 'hydra.sweep.subdir=${hydra.job.num}'"
                )
        self.write(entry)

    def write(self, entry: JobEntry) -> None:
        """Write the entry of a job."""
        _write_json(self.folder / STATE / "jobs" / f"{entry.number}.json", {"sweep": self.id, **asdict(entry)})

    def jobs(self) -> list[JobEntry]:
        """Return the jobs that were started, in their order."""
        found = []
        for path in (self.folder / STATE / "jobs").glob("*.json"):
            content = _read_json(path)
            if content.pop("sweep", None) == self.id:
                found.append(JobEntry(**content))
        return sorted(found, key=lambda entry: entry.number)


def _write_json(path: Path, content: object) -> None:
    """Write a small file such that readers see the old content or the new."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f".{path.name}.{uuid.uuid4().hex}.part")
    part.write_text(json.dumps(content), encoding="utf-8")
    os.replace(part, path)


def _read_json(path: Path) -> dict[str, Any]:
    """Read a mapping; empty if there is none."""
    with suppress(OSError, ValueError):
        content = json.loads(path.read_text(encoding="utf-8"))
        return content if isinstance(content, dict) else {}
    return {}
