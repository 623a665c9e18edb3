"""The C allocator told to keep what it has: fresh pages cost more than what is computed on them."""

from __future__ import annotations

import ctypes
import logging
import sys
from functools import cache

log = logging.getLogger(__name__)

# Of glibc's malloc.h.
M_TRIM_THRESHOLD, M_TOP_PAD, M_MMAP_MAX = -1, -2, -4
TOP_PAD = 64 * 2**20


@cache
def keep_pages() -> bool:
    """Let glibc keep freed blocks for the next ones, for the whole process; true if it does.

    By default every block from 128 KiB (later 32 MiB) on is mapped for itself and handed back when freed, so that each
    feature map of a network is a new mapping whose pages the kernel zeroes one fault at a time. The process then keeps
    the most that it ever needed.
    """
    if not sys.platform.startswith("linux"):
        return False
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError):  # another C library
        log.info("the allocator is left alone: it is not glibc's")
        return False
    told = ((M_MMAP_MAX, 0), (M_TRIM_THRESHOLD, 2**31 - 1), (M_TOP_PAD, TOP_PAD))
    return all(mallopt(ctypes.c_int(key), ctypes.c_int(value)) == 1 for key, value in told)
