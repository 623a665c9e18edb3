"""Assign the images of a dataset to splits such as train and val."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path

from grounded_sam.checks import check_number
from grounded_sam.errors import ConfigError
from grounded_sam.files import atomic_write_text
from grounded_sam.structures.frame import Frame
from grounded_sam.structures.results import Skipped

#: Seeds that are tried for a split without an empty part.
MAX_SEEDS = 1000


class Splits:
    """Assign frames to splits by their names.

    A frame's split depends only on a hash of its name and the seed. It is therefore the same when images are added, in
    shards and in resumed runs, and the number of images need not be known; the shares are met on average. All frames
    of a video are in the same split.

    Args:
        ratios: Share of each split, 0 to 1, adding up to 1, such as `{"train": 0.8, "val": 0.2}`; None for no splits.
        seed: Seed of the hash.

    Raises:
        ConfigError: If the shares are not numbers that add up to 1, or a name cannot be that of a folder.

    >>> import numpy as np
    >>> frame = Frame(pixels=np.zeros((4, 6, 3), np.uint8), name="a.png")
    >>> Splits({"train": 1.0, "val": 0.0})(frame)
    'train'
    """

    def __init__(self, ratios: Mapping[str, float] | None, seed: int = 0) -> None:
        self.ratios, self.seed = dict(ratios or {}), seed
        self._used: set[str] = set()
        self._keys: set[str] = set()  # of the images so far, while a part is empty
        for name, share in self.ratios.items():
            check_number(f"split.{name}", share, 0, 1)
            if not str(name).replace("_", "").replace("-", "").isalnum():
                raise ConfigError(f"the names in split may contain only letters, digits, - and _, got {name!r}")
        if self.ratios and abs(sum(self.ratios.values()) - 1) > 1e-6:
            raise ConfigError(f"the shares of split must add up to 1, got {self.ratios}")

    def claim(self, folder: Path) -> None:
        """Record the ratios and the seed in a dataset's folder, before anything is written to it.

        Args:
            folder: The folder, which is created.

        Raises:
            ConfigError: If it holds a dataset of another split, whose files would mix with the new ones.
        """
        path, record = folder / ".split", {"ratios": self.ratios, "seed": self.seed if self.ratios else 0}
        if path.is_file() and json.loads(path.read_text(encoding="utf-8")) != record:
            raise ConfigError(f"{folder} holds a dataset of another split or seed; delete it, or choose another output")
        atomic_write_text(path, json.dumps(record))

    @property
    def names(self) -> list[str]:
        """Names of the splits, in the order given."""
        return [str(name) for name in self.ratios]

    def __call__(self, frame: Frame) -> str | None:
        """Return the name of a frame's split; None if there are no splits."""
        if not self.ratios:
            return None
        key = frame.video or frame.name
        split = self._split_of(key, self.seed)
        self._used.add(split)
        if self._empty and len(self._keys) < MAX_SEEDS:
            self._keys.add(key)
        return split

    def _split_of(self, key: str, seed: int) -> str:
        """Return the split of an image or video."""
        digest = hashlib.sha256(f"{seed}:{key}".encode("utf-8", "backslashreplace")).digest()
        remaining = int.from_bytes(digest[:8], "big") / 2**64  # uniform from 0 to 1
        for name, share in self.ratios.items():
            remaining -= share
            if remaining < 0:
                return str(name)
        return str(list(self.ratios)[-1])

    @property
    def _empty(self) -> list[str]:
        """Names of the splits that should have images and have none so far."""
        return [str(name) for name, share in self.ratios.items() if share > 0 and str(name) not in self._used]

    def skipped(self) -> list[Skipped]:
        """Return the splits that got no image, with a seed that gives each one some, if there is one."""
        if not self._used or not self._empty:
            return []
        wanted = {str(name) for name, share in self.ratios.items() if share > 0}
        seeds = (seed for seed in range(MAX_SEEDS) if {self._split_of(key, seed) for key in self._keys} == wanted)
        seed = next(seeds, None) if len(self._keys) >= len(wanted) else None
        way_out = "there are too few images or videos" if seed is None else f"seed={seed} gives each part some"
        return [Skipped(f"split {name}", f"no image fell into this part; {way_out}") for name in self._empty]
