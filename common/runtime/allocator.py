"""Have the C library's allocator keep freed memory."""

from __future__ import annotations

import contextlib
import ctypes

_M_TRIM_THRESHOLD, _M_TOP_PAD, _M_MMAP_MAX = -1, -2, -4


def keep_memory() -> None:
    """Reuse freed memory instead of giving it back to the system. Without glibc nothing happens.

    Activations and gradients are allocated anew in every step. By default glibc maps each large one anew, and the system clears
    every page of it. For large layers that takes longer than computing them.
    """
    with contextlib.suppress(OSError, AttributeError):
        mallopt = ctypes.CDLL(None).mallopt
        mallopt(_M_MMAP_MAX, 0)
        mallopt(_M_TRIM_THRESHOLD, (1 << 31) - 1)
        mallopt(_M_TOP_PAD, 64 << 20)
