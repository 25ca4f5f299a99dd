"""A child that ends when its parent is gone, even by SIGKILL.  Touches one pipe and a signal's disposition.

The parent holds the writing end of a pipe, the child the reading end.  When the last writer is gone the kernel
sends the child SIGTERM (fcntl(2), F_SETSIG): no thread, and it works after the child has changed its user, when
PR_SET_PDEATHSIG would have been forgotten.
"""

from __future__ import annotations

import fcntl
import os
import select
import signal

VARIABLE = "DISPATCHER_LIFELINE"


class Lifeline:
    """The parent's side, for one child: who is told belongs to the pipe, so that two children need two."""

    def __init__(self) -> None:
        self._reading, self._writing = os.pipe2(os.O_CLOEXEC)

    @property
    def descriptor(self) -> int:
        """What a child must inherit."""
        return self._reading

    def environment(self) -> dict[str, str]:
        """Return the environment that tells a child."""
        return {**os.environ, VARIABLE: str(self._reading)}

    def close(self) -> None:
        """Let go; the child is told if it still lives."""
        os.close(self._reading)
        os.close(self._writing)


def hold() -> None:
    """In a child: get SIGTERM once the parent is gone.  Without a parent that asked for it, do nothing."""
    text = os.environ.pop(VARIABLE, "")
    if not text.isdigit():
        return
    descriptor = int(text)
    os.set_inheritable(descriptor, False)
    fcntl.fcntl(descriptor, fcntl.F_SETSIG, signal.SIGTERM)
    fcntl.fcntl(descriptor, fcntl.F_SETOWN, os.getpid())
    flags = fcntl.fcntl(descriptor, fcntl.F_GETFL)
    fcntl.fcntl(descriptor, fcntl.F_SETFL, flags | os.O_ASYNC | os.O_NONBLOCK)
    if select.select([descriptor], [], [], 0)[0]:
        os.kill(os.getpid(), signal.SIGTERM)  # it was gone before
