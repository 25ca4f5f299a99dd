"""A change of an agent, as decided by the pure modules and applied by the registry."""

from __future__ import annotations

import enum
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any


class EventKind(str, enum.Enum):
    """The kinds of `AgentEvent` (docs/reference/hooks.md)."""

    CREATED = "created"
    STARTING = "starting"
    READY = "ready"
    RESUMED = "resumed"
    SUSPENDED = "suspended"
    HIBERNATED = "hibernated"
    STOPPING = "stopping"
    STOPPED = "stopped"
    DIED = "died"
    FAILED = "failed"
    ADOPTED = "adopted"
    REACHABLE = "reachable"
    UNREACHABLE = "unreachable"
    RESET = "reset"
    MOVED = "moved"
    OUTDATED = "outdated"
    REMOVED = "removed"


class Write(enum.Enum):
    """When a change is written to the database."""

    NOW = enum.auto()  # at once; if that fails, later: the change happens anyway
    REQUIRED = enum.auto()  # at once; if that fails, nothing happens and the error is raised
    LATER = enum.auto()  # with others in one transaction, unless an operation begins


@dataclass(frozen=True, slots=True)
class Change:
    """New values of an agent's row, with the events that report them.

    :ivar insist: begin an operation although the backend was unreachable when last called.
    :ivar urgent: a person waits for the operation that follows.
    """

    fields: dict[str, Any] = field(default_factory=dict)
    events: Sequence[tuple[EventKind, str]] = ()
    write: Write = Write.NOW
    insist: bool = False
    urgent: bool = False
