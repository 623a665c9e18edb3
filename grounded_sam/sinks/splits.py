"""Which part of a dataset a frame belongs to."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path

from grounded_sam.errors import ConfigError
from grounded_sam.files import atomic_write
from grounded_sam.structures.frame import Frame


class Splits:
    """Parts by ratio, the same every time.

    The place of a picture follows from its name and the seed alone, so neither more pictures nor shards nor a
    resumed run move it, and nothing has to be known in advance; shares are met as far as chance allows.
    All frames of a video go where its name goes.

    Args:
        ratios: shares by part, `{train: 0.8, val: 0.2}`, which add up to 1; None for no parts.
        seed: another one gives another split.

    Raises:
        ConfigError: if the shares are not numbers that add up to 1, or a name cannot name a folder.
    """

    def __init__(self, ratios: Mapping[str, float] | None, seed: int = 0) -> None:
        self.ratios, self.seed = dict(ratios or {}), seed
        for name, share in self.ratios.items():
            if not isinstance(share, int | float) or isinstance(share, bool) or not 0 <= share <= 1:
                raise ConfigError(f"split.{name} must be a number from 0 to 1, got {share!r}")
            if not str(name).replace("_", "").replace("-", "").isalnum():
                raise ConfigError(f"split must name its parts with letters and digits, got {name!r}")
        if self.ratios and abs(sum(self.ratios.values()) - 1) > 1e-6:
            raise ConfigError(f"the shares of split must add up to 1, got {self.ratios}")

    def claim(self, folder: Path) -> None:
        """Note in a folder of a dataset how it is split, before anything is put there.

        Raises:
            ConfigError: if it holds a dataset of another split, whose files would mix with the new ones.
        """
        note, own = folder / ".split", {"ratios": self.ratios, "seed": self.seed if self.ratios else 0}
        if note.is_file() and json.loads(note.read_text(encoding="utf-8")) != own:
            raise ConfigError(f"{folder} holds a dataset of another split or seed; delete it, or choose another output")
        with atomic_write(note) as beside:
            beside.write_text(json.dumps(own), encoding="utf-8")

    @property
    def names(self) -> list[str]:
        """The parts, in the order given."""
        return [str(name) for name in self.ratios]

    def __call__(self, frame: Frame) -> str | None:
        """The part of a frame; None if there are no parts."""
        if not self.ratios:
            return None
        name = f"{self.seed}:{frame.video or frame.name}"
        place = int.from_bytes(hashlib.sha256(name.encode("utf-8", "backslashreplace")).digest()[:8], "big") / 2**64
        for part, share in self.ratios.items():
            place -= share
            if place < 0:
                return str(part)
        return str(list(self.ratios)[-1])
