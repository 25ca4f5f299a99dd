"""Standard output for this program's output alone."""

from __future__ import annotations

import contextlib
import sys
import threading
from collections.abc import Iterator
from typing import Any


class _MainThreads:
    """A text stream; what other threads write, in which plugins are called, goes to standard error."""

    def __init__(self, stream: Any) -> None:
        self._stream = stream

    def write(self, text: str) -> int:
        """Write, as `io.TextIOBase.write`."""
        own = threading.current_thread() is threading.main_thread()
        return int((self._stream if own else sys.stderr).write(text))

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


@contextlib.contextmanager
def output_of_the_main_thread() -> Iterator[None]:
    """Keep what a plugin prints out of standard output, where it would break JSON."""
    stream = sys.stdout
    sys.stdout = _MainThreads(stream)
    try:
        yield
    finally:
        sys.stdout = stream
