"""Settings of the C allocator: keep and reuse freed memory, since page faults on new memory are expensive."""

from __future__ import annotations

import ctypes
import logging
import sys
from functools import cache

log = logging.getLogger(__name__)

# Options of glibc's `mallopt`, from malloc.h.
M_TRIM_THRESHOLD, M_TOP_PAD, M_MMAP_MAX = -1, -2, -4
TOP_PAD_BYTES = 64 * 2**20


@cache
def keep_freed_memory() -> bool:
    """Let glibc keep freed blocks for later allocations, for the whole process.

    By default glibc maps every block of at least 128 KiB (a threshold that grows to 32 MiB) on its own and returns it
    to the kernel when it is freed, so each feature map of a network is a new mapping whose pages the kernel has to
    zero, one page fault at a time. With this setting the process keeps its peak memory until it ends.

    Returns:
        Whether the settings were accepted; False on other systems and C libraries.
    """
    if not sys.platform.startswith("linux"):
        return False
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError):  # musl has no mallopt
        log.info("allocator settings are not changed: the C library is not glibc")
        return False
    options = ((M_MMAP_MAX, 0), (M_TRIM_THRESHOLD, 2**31 - 1), (M_TOP_PAD, TOP_PAD_BYTES))
    return all(mallopt(ctypes.c_int(option), ctypes.c_int(value)) == 1 for option, value in options)
