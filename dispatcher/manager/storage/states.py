"""The stored states of an agent: what is desired, what must happen first, and the operation in flight."""

from __future__ import annotations

import enum


class Desired(str, enum.Enum):
    """The desired state of an agent, written before anything is done to reach it."""

    RUNNING = "running"
    SUSPENDED = "suspended"
    HIBERNATED = "hibernated"
    STOPPED = "stopped"
    ABSENT = "absent"


class Pending(str, enum.Enum):
    """A step to do once, on the way to the desired state."""

    NONE = ""
    RESTART = "restart"
    RESET = "reset"


class Kind(str, enum.Enum):
    """An operation on an agent; one at a time."""

    START = "start"  # also resumes
    SUSPEND = "suspend"
    HIBERNATE = "hibernate"
    STOP = "stop"
    RESET = "reset"
    MOVE = "move"
    REMOVE = "remove"
