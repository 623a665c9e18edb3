"""From words on the command line to stages: the config folder, composing, building."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def preserve_hydra_state() -> Iterator[None]:
    """Leave Hydra's global state as it was: importing `sam2` seizes it, composing needs it free.

    So a Hydra app may follow on `load`. Who wants `sam2.build_sam.build_sam2` after `load`, which
    counts on the state that the import leaves, says `hydra.initialize_config_module("sam2")` first.
    """
    from hydra.core.global_hydra import GlobalHydra

    held = GlobalHydra.instance().hydra
    try:
        yield
    finally:
        GlobalHydra.instance().hydra = held
