"""Settings of glibc's allocator for this process; a no-op with other C libraries."""

from __future__ import annotations

import ctypes

# mallopt(3)
_M_TRIM_THRESHOLD, _M_TOP_PAD, _M_MMAP_THRESHOLD, _M_ARENA_MAX = -1, -2, -3, -8


def keep_buffers() -> None:
    """Keep freed buffers of bodies: a piece has up to 256 KiB, and the next one follows at once.

    By default glibc returns such buffers to the kernel each time, which must then fill them with zeros, page by
    page: a third of the CPU time of an upload.  At most 4 MiB stay unused.
    """
    _set({_M_TRIM_THRESHOLD: 4 << 20, _M_TOP_PAD: 1 << 20, _M_MMAP_THRESHOLD: 1 << 20})


def share_one_heap() -> None:
    """Let all threads allocate from one heap: otherwise each of many idle threads keeps its own part."""
    _set({_M_ARENA_MAX: 1})


def _set(options: dict[int, int]) -> None:
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        for option, value in options.items():
            mallopt(option, value)
