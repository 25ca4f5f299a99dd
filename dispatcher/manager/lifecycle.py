"""The state machine of an agent.  Pure: no I/O, no clock, no thread.

From what is wanted (`Desired`), what the backend said last, and what is being done, three functions say what
to do next (`next_operation`), what people see (`public_state`) and what the edge is told (`feed_state`); a
fourth, `superseded`, says whether what is being done is still wanted.
"""

from __future__ import annotations

import enum


class Desired(str, enum.Enum):
    """What is wanted of an agent; written before anything is done about it."""

    RUNNING = "running"
    SUSPENDED = "suspended"
    HIBERNATED = "hibernated"
    STOPPED = "stopped"
    ABSENT = "absent"


class Pending(str, enum.Enum):
    """Something to be done once, on the way to what is desired."""

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


class State(str, enum.Enum):
    """The public state."""

    STOPPED = "stopped"
    STARTING = "starting"
    RUNNING = "running"
    SUSPENDING = "suspending"
    SUSPENDED = "suspended"
    HIBERNATED = "hibernated"
    STOPPING = "stopping"
    FAILED = "failed"
    UNKNOWN = "unknown"
    REMOVING = "removing"
