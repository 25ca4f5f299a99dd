"""End a child process when its parent has ended, even by SIGKILL.

The parent holds the writing end of a pipe, the child the reading end.  When the parent ends, the kernel closes the
pipe and sends the child SIGTERM (fcntl(2), F_SETSIG).  This needs no thread and still works after the child has
changed its user, which resets PR_SET_PDEATHSIG.
"""

from __future__ import annotations

import fcntl
import os
import select
import signal

VARIABLE = "DISPATCHER_PARENT_PIPE"


class ParentPipe:
    """The parent's side, for one child: the receiver of the signal belongs to the pipe."""

    def __init__(self) -> None:
        self._reading, self._writing = os.pipe2(os.O_CLOEXEC)

    @property
    def descriptor(self) -> int:
        """The file descriptor that the child must inherit."""
        return self._reading

    def environment(self) -> dict[str, str]:
        """Return the environment for the child."""
        return {**os.environ, VARIABLE: str(self._reading)}

    def close(self) -> None:
        """Close both ends; a child that still runs gets SIGTERM."""
        os.close(self._reading)
        os.close(self._writing)


def end_with_parent() -> None:
    """In a child: arrange for SIGTERM when the parent ends.  Does nothing unless the parent made a pipe."""
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
        os.kill(os.getpid(), signal.SIGTERM)  # the parent has ended already
