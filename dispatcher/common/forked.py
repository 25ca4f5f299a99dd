"""Locks and listening sockets that end with this process, also where a plugin has forked it.

A child of `os.fork` (multiprocessing uses it) has all descriptors: while it lives, the next manager could neither
lock its directories nor listen.  Programs that are executed do not have them (close-on-exec).
"""

from __future__ import annotations

import os
from typing import Protocol
from weakref import WeakSet


class _Closeable(Protocol):
    def close(self) -> None: ...


_kept: WeakSet[_Closeable] = WeakSet()


def close_in_children(kept: _Closeable) -> None:
    """Close a file or socket in each child that is forked from now on."""
    _kept.add(kept)


def _close() -> None:
    for one in list(_kept):
        one.close()


os.register_at_fork(after_in_child=_close)
