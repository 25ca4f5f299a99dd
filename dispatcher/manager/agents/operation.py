"""An operation in flight on an agent."""

from __future__ import annotations

import enum
import threading

from dispatcher.manager.storage.states import Kind
from dispatcher.plugin.errors import Cancelled


class Status(enum.Enum):
    """Whether an operation is still wanted."""

    ACTIVE = enum.auto()
    CANCELLED = enum.auto()  # a newer command contradicts it
    ABANDONED = enum.auto()  # a provider's call hangs: the result is ignored


class Operation:
    """One operation, and its progress as shown to people.

    :ivar since: Unix time; :ivar stage: a short text; :ivar published: progress as last published, and its boot
        time.
    :ivar observe_again: the backend reported a change of the agent meanwhile.
    """

    __slots__ = (
        "_ended",
        "detail",
        "fraction",
        "kind",
        "observe_again",
        "published",
        "published_at",
        "since",
        "stage",
        "status",
    )

    def __init__(self, kind: Kind, since: float) -> None:
        self.kind = kind
        self.since = since
        self.status = Status.ACTIVE
        self.stage = ""
        self.detail = ""
        self.fraction: float | None = None
        self.observe_again = False
        self.published: tuple[str, str, float | None] = ("", "", None)
        self.published_at = 0.0
        self._ended = threading.Event()

    def cancel(self) -> None:
        """Ask the operation to end: `check` raises from now on."""
        if self.status is Status.ACTIVE:
            self.status = Status.CANCELLED
        self._ended.set()

    def abandon(self) -> None:
        """Ignore the operation from now on."""
        self.status = Status.ABANDONED

    def wait_for_cancel(self, seconds: float) -> None:
        """Sleep, but not beyond a cancellation."""
        self._ended.wait(seconds)

    def check(self) -> None:
        """Return while the operation is wanted.

        :raises Cancelled: it was cancelled or abandoned.
        """
        if self.status is not Status.ACTIVE:
            raise Cancelled("The operation was cancelled", why="a newer command contradicts it")
