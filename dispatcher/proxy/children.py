"""The proxy's child processes: forked, watched, replaced.

A child is a worker of the edge or the portal.  It inherits what the parent has open and loaded, so that memory
is shared; it never executes another program.
"""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import sys
from collections.abc import Callable
from dataclasses import dataclass, field

from dispatcher.common.log import logger
from dispatcher.plugin.deadline import boottime
from dispatcher.plugin.errors import Unavailable
from dispatcher.proxy.privileges import die_with_parent

FIRST_PAUSE = 0.1
LONGEST_PAUSE = 10.0
FIRST_TRIES = 5  # then the proxy does not start: about three seconds
_STEADY = 20.0  # seconds after which a child that ends has not failed to start
_BORN = 5.0  # seconds after which a child that ends did start

WORKER = "worker"
PORTAL = "portal"


@dataclass(slots=True, eq=False)
class Child:
    """One child process.

    :ivar generation: of the configuration it was started with; :ivar ready: it serves.
    :ivar leaving: it was ordered to end; :ivar accepts: a worker that may take new connections.
    :ivar deadline: boot time after which it is killed.
    """

    kind: str
    generation: int
    pid: int
    control: socket.socket
    started: float = field(default_factory=boottime)
    ready: bool = False
    leaving: bool = False
    accepts: bool = True
    deadline: float = float("inf")

    def order(self, order: bytes) -> None:
        """Send an order; a child that cannot receive it is ending already."""
        with contextlib.suppress(OSError):
            self.control.send(order)

    def signal(self, number: int) -> None:
        """Send a signal, only to a child that has not been waited for."""
        with contextlib.suppress(ProcessLookupError):
            os.kill(self.pid, number)


def fork(kind: str, generation: int, body: Callable[[socket.socket], None], others: list[Child]) -> Child:
    """Start a child that runs `body` with its end of a socket pair.

    :param others: children whose sockets this one must not keep open.
    """
    ours, theirs = socket.socketpair()
    sys.stdout.flush()
    sys.stderr.flush()
    pid = os.fork()
    if pid:
        theirs.close()
        return Child(kind, generation, pid, ours)
    code = 1
    try:
        signal.set_wakeup_fd(-1)
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGCHLD):
            signal.signal(number, signal.SIG_DFL if number != signal.SIGINT else signal.SIG_IGN)
        ours.close()
        for other in others:
            other.control.close()
        if kind == PORTAL:
            die_with_parent(signal.SIGTERM)
        body(theirs)
        code = 0
    except SystemExit:
        code = 0
    except BaseException:
        logger("proxy").exception("a child process failed", kind=kind)
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


class BackOff:
    """The delay before a child of a kind is started again.

    :ivar at: boot time of the next start; :ivar early_exits: exits right after the start, None once a child has
        run for longer.
    """

    __slots__ = ("_pause", "at", "early_exits")

    def __init__(self) -> None:
        self._pause = FIRST_PAUSE
        self.at = 0.0
        self.early_exits: int | None = 0

    def ended(self, child: Child, status: int) -> float:
        """Note that a child ended with this wait status; return the seconds until the next start.

        :raises Unavailable: the first children all ended at once.
        """
        lived = boottime() - child.started
        if lived > _STEADY:
            self._pause = FIRST_PAUSE
        if lived > _BORN:
            self.early_exits = None
        elif self.early_exits is not None and os.WIFEXITED(status):
            self.early_exits += 1
            if self.early_exits >= FIRST_TRIES:
                raise Unavailable(
                    "The proxy cannot start",
                    why=f"its {child.kind} ended at once, {FIRST_TRIES} times in a row",
                    fix="read its messages above",
                )
        pause = self._pause
        self._pause = min(self._pause * 2, LONGEST_PAUSE)
        self.at = boottime() + pause
        return pause


def ending(status: int) -> str:
    """Describe how a process ended."""
    code = os.waitstatus_to_exitcode(status)
    return f"was killed by signal {-code}" if code < 0 else f"ended with exit code {code}"
