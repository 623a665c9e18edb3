"""The settings and classes of the runs that wrote into a store, and their fingerprint.

Runs with the same settings and classes have the same fingerprint, and share one file `_run-*.json` in the store.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from functools import cached_property, reduce
from importlib.metadata import PackageNotFoundError
from importlib.metadata import version as installed_version
from pathlib import Path
from typing import Any

from grounded_sam.errors import ConfigError, VocabularyError, redact, shorten
from grounded_sam.files import atomic_write_text, home_path, read_regular, require_regular
from grounded_sam.formats.store_migrations import class_name, migrate_settings, migrate_vocabulary
from grounded_sam.output.paths import OutputPath, RemotePath
from grounded_sam.remote import Location
from grounded_sam.structures.vocabulary import Vocabulary, name_key

#: Version of the format. Readers refuse stores of later versions.
VERSION = 3
#: Settings that change how fast results are computed, but not the results.
INCIDENTAL = {"device", "batch_size", "chunk", "points_per_batch", "exports", "export_dir"}
#: Libraries whose versions are recorded.
LIBRARIES = ("grounded_sam", "torch", "transformers", "sam2", "segment-anything")

#: Settings that later versions added, with the value that means what was done before; it is not recorded.
ADDED_SETTINGS: dict[str, Any] = {"status": None}

_COLOR = re.compile(r"#[0-9a-fA-F]{6}")


@dataclass(frozen=True)
class StoreRun:
    """Settings and classes of one or more runs.

    Attributes:
        settings: All settings that decide the results, by config group; see `essential_settings`.
        classes: Columns of the vocabulary, as stored.
        version: Version of this package.
        created: Time of the first write, ISO 8601; empty if nothing was written yet.
        number: How many runs with other settings had written before; 0 in stores of earlier versions.
    """

    settings: dict[str, Any]
    classes: dict[str, Any]
    version: str
    created: str = ""
    number: int = 0

    @classmethod
    def current(cls, settings: Mapping[str, Any], vocabulary: Vocabulary) -> StoreRun:
        """Describe the run that is about to start.

        Args:
            settings: All settings that decide the results, as the config has them.
            vocabulary: Classes of the run.
        """
        columns = asdict(vocabulary)
        del columns["queried"]
        columns["colours"] = columns.pop("colors")
        return cls(essential_settings(settings), columns, package_version("grounded_sam"))

    @cached_property
    def fingerprint(self) -> str:
        """SHA-256 of everything that decides the results: models, files of weights, thresholds, classes."""
        has_builtin_weights = "builtin:" in json.dumps(self.settings, default=str)
        content = {
            "settings": self.settings,
            "vocabulary": self.classes,
            "builtin": self.version if has_builtin_weights else None,
        }
        return hashlib.sha256(json.dumps(content, sort_keys=True, default=str).encode()).hexdigest()

    @property
    def vocabulary(self) -> Vocabulary:
        """Classes of the results, not meant for querying a detector."""
        columns: dict[str, Any] = {key: tuple(values) for key, values in self.classes.items()}
        columns["phrases"] = tuple(map(tuple, columns["phrases"]))
        columns["colors"] = columns.pop("colours", ())
        return Vocabulary(**columns, queried=False)

    def lacks(self, vocabulary: Vocabulary) -> list[str]:
        """Return the classes of a vocabulary of which this run did not look for every phrase."""
        searched = {name_key(phrase) for phrases in self.vocabulary.phrases for phrase in phrases}
        named = zip(vocabulary.classes, vocabulary.phrases, strict=True)
        return [name for name, phrases in named if not searched.issuperset(map(name_key, phrases))]

    def changes(self, current: StoreRun) -> list[str]:
        """Describe how the settings and classes of another run differ from these, one line per key."""
        settings = _changes(self.settings, current.settings, "")
        common = [key for key in current.classes if key in self.classes]
        return settings + [
            line for key in common for line in _changes(self.classes[key], current.classes[key], f"vocabulary.{key}")
        ]

    def write(self, folder: OutputPath, now: str) -> None:
        """Write the run file, unless it exists.

        Args:
            folder: Folder of the store.
            now: Current time, ISO 8601.
        """
        path = folder / f"_run-{self.fingerprint[:16]}.json"
        if path.exists():
            return
        content = {
            "schema": VERSION,
            "fingerprint": self.fingerprint,
            "created": now,
            "number": sum(1 for _ in folder.glob("_run-*.json")),
            "settings": self.settings,
            "vocabulary": self.classes,
            "versions": {name: package_version(name) for name in LIBRARIES},
        }
        text = json.dumps(content, ensure_ascii=False, indent=1, default=str)
        if isinstance(path, RemotePath):
            with suppress(FileExistsError):  # shards start together
                path.write_bytes(text.encode(), create=True)
        else:
            atomic_write_text(path, text, shared=True)


def fingerprint(settings: Mapping[str, Any], vocabulary: Vocabulary) -> str:
    """Return the SHA-256 of everything that decides the results: models, files of weights, thresholds, classes.

    Args:
        settings: All settings that decide the results, as the config has them.
        vocabulary: Classes of the run.

    >>> words = Vocabulary.parse(["car"])
    >>> settings = [{"detector": {"_target_": target}} for target in ("old.module.Detector", "new.Detector")]
    >>> fingerprint(settings[0], words) == fingerprint(settings[1], words)
    True
    """
    return StoreRun.current(settings, vocabulary).fingerprint


def essential_settings(settings: Any) -> Any:
    """Reduce settings to those that decide the results, in a form that does not depend on where files are.

    Incidental keys and those of `ADDED_SETTINGS` are removed, classes are named without their module, and the path of a
    file or folder is replaced by its name and the SHA-256 of its content.

    Args:
        settings: Settings as the config has them. Not for stored ones, whose paths are replaced already.

    >>> essential_settings({"_target_": "my.stages.Detector", "device": "cpu", "score": 0.3})
    {'_target_': 'Detector', 'score': 0.3}
    """
    if isinstance(settings, Mapping):
        return {
            str(key): class_name(value) if key == "_target_" and isinstance(value, str) else essential_settings(value)
            for key, value in sorted(settings.items())
            if key not in INCIDENTAL and not (key in ADDED_SETTINGS and value == ADDED_SETTINGS[key])
        }
    if isinstance(settings, list | tuple):
        return [essential_settings(value) for value in settings]
    if isinstance(settings, str) and settings:
        settings = redact(settings)
        files = _files_at(settings)
        return {"name": home_path(settings).name, "sha256": file_digest(files)} if files else settings
    return settings


def _files_at(text: str) -> list[Path]:
    """List the file or the files of the folder that a setting names; none if it is not a path."""
    path = home_path(text)
    try:
        if path.is_file():
            return [path]
        return sorted(file for file in path.rglob("*") if file.is_file()) if "/" in text else []
    except OSError:  # such as a text that is too long for a path
        return []


def file_digest(files: Sequence[Path | Location]) -> str:
    """Return the SHA-256 of a file; of several files, that of their digests in order.

    Raises:
        OSError: If a file cannot be read.
    """
    digests = []
    for file in files:
        if isinstance(file, Location):
            digests.append(hashlib.sha256(file.read_bytes()).hexdigest())
            continue
        require_regular(file)
        with file.open("rb") as content:
            digests.append(hashlib.file_digest(content, "sha256").hexdigest())
    return digests[0] if len(digests) == 1 else hashlib.sha256("".join(digests).encode()).hexdigest()


def package_version(name: str) -> str:
    """Return the version of an installed package; `unknown` if it is not installed, as in a bare checkout."""
    try:
        return installed_version(name)
    except PackageNotFoundError:
        return "unknown"


def read_runs(folder: OutputPath) -> list[StoreRun]:
    """Read the settings of the runs that wrote into a store, oldest first, under the names of the current version.

    Raises:
        ConfigError: If a run file is damaged, or the store is of a later version.
    """
    return oldest_first(runs_by_fingerprint(folder).values())


def oldest_first(runs: Iterable[StoreRun]) -> list[StoreRun]:
    """Sort runs by the time of their first write."""
    return sorted(runs, key=lambda run: (run.number, run.created, run.fingerprint))


def runs_by_fingerprint(folder: OutputPath) -> dict[str, StoreRun]:
    """Read the runs that wrote into a store, by the first 16 digits of the fingerprint that their rows have.

    Raises:
        ConfigError: As `read_runs`.
    """
    runs = {}
    for path in folder.glob("_run-*.json"):
        try:
            content = json.loads(read_regular(path).decode())
            if (schema := content["schema"]) > VERSION:
                raise ConfigError(
                    f"{folder} has schema version {schema}; this version of grounded_sam reads up to {VERSION}"
                )
            version, created = str(content.get("versions", {}).get("grounded_sam", "unknown")), str(content["created"])
            if StoreRun(content["settings"], content["vocabulary"], version).fingerprint != content["fingerprint"]:
                raise ValueError("it has changed since it was written")
            run = StoreRun(
                settings=migrate_settings(content["settings"]),
                classes=migrate_vocabulary(content["vocabulary"]),
                version=version,
                created=created,
                number=int(content.get("number", 0)),
            )
            if wrong := [color for color in run.vocabulary.colors if not _COLOR.fullmatch(color or "#000000")]:
                raise ValueError(f"a color must be #rrggbb, got {shorten(wrong[0])}")
        except (OSError, VocabularyError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            reason = " ".join(str(error).split())[:200]
            raise ConfigError(
                f"{path} cannot be read ({reason}); delete it, and run again with its settings"
            ) from error
        runs[path.stem.removeprefix("_run-")] = run
    return runs


def store_vocabulary(folder: OutputPath) -> Vocabulary:
    """Return the classes of all runs of a store, those of the first run first.

    Raises:
        ConfigError: As `read_runs`.
    """
    first, *others = (run.vocabulary for run in read_runs(folder))
    return reduce(Vocabulary.merged_with, others, first)


def _changes(before: Any, now: Any, key: str) -> list[str]:
    """Describe where two values differ, each as `key: was VALUE, now VALUE`; keys that both have come first."""
    if isinstance(before, Mapping) and isinstance(now, Mapping):
        keys = [*(k for k in now if k in before), *(k for k in {**before, **now} if not (k in now and k in before))]
        return [line for k in keys for line in _changes(before.get(k), now.get(k), f"{key}.{k}" if key else k)]
    plain = json.loads(json.dumps(now, default=str))
    if before == plain:
        return []
    old, new = (json.dumps(value, ensure_ascii=False) for value in (before, plain))
    return [f"{key}: was {old}, now {new}"]
