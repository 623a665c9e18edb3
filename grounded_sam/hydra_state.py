"""Read and preserve Hydra's global state."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager

#: Held while a thread changes the global state, which is one per process.
_STATE_LOCK = threading.RLock()


@contextmanager
def preserve_hydra_state() -> Iterator[None]:
    """Restore Hydra's global state afterwards: importing `sam2` initializes it, and composing resets it.

    So a Hydra app can start after `load()`. Threads take turns. To call `sam2.build_sam.build_sam2` afterwards, which
    needs the state that its import leaves, first run `hydra.initialize_config_module("sam2")`.

    >>> with preserve_hydra_state():
    ...     import sam2
    """
    from hydra.core.global_hydra import GlobalHydra

    with _STATE_LOCK:
        previous = GlobalHydra.instance().hydra
        try:
            yield
        finally:
            GlobalHydra.instance().hydra = previous


def in_sweep() -> bool:
    """Return whether this process runs a job of a sweep (`--multirun`)."""
    from hydra.core.hydra_config import HydraConfig
    from hydra.types import RunMode

    return HydraConfig.initialized() and HydraConfig.get().mode == RunMode.MULTIRUN
