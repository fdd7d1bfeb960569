"""The C library's allocator, told to keep what it has."""

from __future__ import annotations

import contextlib
import ctypes

_M_TRIM_THRESHOLD, _M_TOP_PAD, _M_MMAP_MAX = -1, -2, -4


def keep_memory() -> None:
    """Have freed memory reused instead of given back to the system; glibc only, elsewhere nothing happens.

    Activations and gradients are allocated anew in every step, and left to itself glibc maps each large one anew too: the
    system then clears every page of it, which for large layers takes longer than computing them.
    """
    with contextlib.suppress(OSError, AttributeError):
        mallopt = ctypes.CDLL(None).mallopt
        mallopt(_M_MMAP_MAX, 0)
        mallopt(_M_TRIM_THRESHOLD, (1 << 31) - 1)
        mallopt(_M_TOP_PAD, 64 << 20)
