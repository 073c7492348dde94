"""Keeps glibc from handing memory back to the system after every step, only to fault it in again in the next."""

from __future__ import annotations

import ctypes
import sys

#: From malloc.h.
_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3


def keep_freed_memory() -> bool:
    """Blocks up to 1 GiB come from the heap, and the heap is never trimmed, for the rest of this process.

    Returns:
        Whether this system's C library took it: glibc does, others are left alone.
    """
    if not sys.platform.startswith("linux"):
        return False
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError):  # musl has no mallopt
        return False
    return bool(mallopt(_MMAP_THRESHOLD, 2**30) and mallopt(_TRIM_THRESHOLD, 2**31 - 1))
