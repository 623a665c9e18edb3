"""The classes of an output folder and their numbers, which later runs into the folder keep."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any, TypeVar

import numpy as np

from grounded_sam.errors import ConfigError
from grounded_sam.files import atomic_write_text
from grounded_sam.formats.coco import read_json
from grounded_sam.formats.store_runs import store_vocabulary
from grounded_sam.output.paths import OutputPath, output_path
from grounded_sam.structures.masks import replace_masks
from grounded_sam.structures.results import FrameResult
from grounded_sam.structures.vocabulary import Vocabulary

T = TypeVar("T")


class OutputClasses:
    """Number the classes of a run after those of earlier runs into the same folder.

    The classes are recorded in `classes.json`, in the form of a COCO file (`text=classes.json` reads it): the position
    of a class is its number in YOLO, `class_id` and label maps, `id` is its category id. Classes are only appended, so
    numbers in files of earlier runs keep their meaning. Names that differ only in case and spacing are one class, and
    keep the spelling that was recorded first.

    Args:
        output: Output folder.
        requested: Classes of the run.

    Attributes:
        vocabulary: Classes of the files: those recorded, followed by new ones; see `append`.

    Raises:
        ConfigError: If the file is damaged, or the run gives a class another id than was recorded.
    """

    def __init__(self, output: OutputPath, requested: Vocabulary) -> None:
        self.path = output_path(output) / "classes.json"
        self._recorded = self._read()
        self._check_ids(requested)
        self.append(requested)

    def _read(self) -> Vocabulary | None:
        """Return the recorded classes; those of the store in a folder of an earlier version; None if there are none."""
        if self.path.is_file():
            content = read_json(self.path)
            categories = content.get("categories") if isinstance(content, dict) else None
            if not isinstance(categories, list) or not categories:
                raise ConfigError(
                    f"{self.path} must list the classes of this folder under 'categories'; put the file back, or "
                    "choose another output"
                )
            return Vocabulary.from_categories(categories, str(self.path))
        store = self.path.with_name("store")
        return store_vocabulary(store) if any(store.glob("_run-*.json")) else None

    def _check_ids(self, requested: Vocabulary) -> None:
        """Check that no id of the run contradicts a recorded one."""
        recorded = self._recorded
        if recorded is None:
            return
        name_of = dict(zip(recorded.category_ids, recorded.classes, strict=True))
        for name, number in zip(requested.classes, requested.ids, strict=False):
            known = recorded.index(name)
            if known is not None and recorded.category_ids[known] != number:
                problem = f"the id {recorded.category_ids[known]} to {name!r}, and this run {number}"
            elif known is None and number in name_of:
                problem = f"the id {number} to {name_of[number]!r}, and this run to {name!r}"
            else:
                continue
            raise ConfigError(
                f"the files in {self.path.parent} give {problem}; choose another output, or the ids in {self.path}"
            )

    def append(self, requested: Vocabulary) -> Vocabulary:
        """Set the classes that results refer to, and return `vocabulary`.

        Args:
            requested: Classes of the run, followed by those of its store.
        """
        self.vocabulary = requested if self._recorded is None else _numbered_after(self._recorded, requested)
        numbers = [self.vocabulary.index(name) for name in requested.classes]
        assert None not in numbers
        self._numbers = np.array(numbers, np.int64)
        self._names = np.array(self.vocabulary.classes, dtype=str)
        self._is_saved = self.path.is_file() and len(self.vocabulary) == len(self._recorded or ())
        self._is_same = self.vocabulary.classes[: len(requested)] == requested.classes
        return self.vocabulary

    def renumber(self, result: FrameResult) -> FrameResult:
        """Return a result with the numbers and names of `vocabulary`; its masks keep their form."""
        if self._is_same:
            return result
        raw = result.raw
        assert raw.class_id is not None
        class_id, masks = self._numbers[raw.class_id], None if raw.mask is None else np.asarray(raw.mask, bool)
        renumbered = replace_masks(raw, masks, {**raw.data, "class_name": self._names[class_id]})
        renumbered.class_id = class_id
        return FrameResult(frame=result.frame, detections=renumbered, stored=result.stored)

    def save(self) -> None:
        """Write `classes.json`, unless it has all classes already."""
        if self._is_saved:
            return
        self._is_saved = True
        content: dict[str, Any] = {"categories": self.vocabulary.categories()}
        text = json.dumps(content, ensure_ascii=False, indent=1) + "\n"
        atomic_write_text(self.path, text, shared=True)  # shards start together


def _numbered_after(earlier: Vocabulary, words: Vocabulary) -> Vocabulary:
    """Return the classes of earlier files with their numbers and ids, followed by the new ones of a vocabulary.

    Other properties of a class that both have are taken from `words`.
    """
    merged = earlier.merged_with(words)
    if (merged.classes, merged.category_ids) == (words.classes, words.category_ids):
        return words
    rows = [words.index(name) for name in merged.classes]

    def filled(recorded: tuple[T | None, ...], own: tuple[T | None, ...]) -> tuple[T | None, ...]:
        if not recorded and not own:
            return ()
        before = recorded or (None,) * len(merged)
        return tuple(own[i] if own and i is not None else value for value, i in zip(before, rows, strict=True))

    return replace(
        merged,
        scores=filled(merged.scores, words.scores),
        colors=filled(merged.colors, words.colors),
        supercategories=filled(merged.supercategories, words.supercategories),
    )
