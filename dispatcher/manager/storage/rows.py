"""The rows of users, agents and what belongs to them: immutable, so that threads can share them.

`tables` makes a table of each; an integer in an annotation is the length of a text.  Times are Unix seconds of the
steady clock.
"""

from __future__ import annotations

import enum
from dataclasses import dataclass, field
from typing import Annotated, Any

from dispatcher.plugin.model import BackendState

AgentName = Annotated[str, 300]
UserName = Annotated[str, 255]
Source = Annotated[str, 128]  # an entry of auth.authenticator
Short = Annotated[str, 32]  # the name of an app or of a provider


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


@dataclass(frozen=True, slots=True, kw_only=True)
class UserRow:
    """A user.

    :ivar password_hash: argon2id, None where an external authenticator knows the password.
    :ivar source: the external authenticator to which the name belongs, None before the first sign-in with one.
    :ivar subject: `Identity.subject`, if it has one; :ivar groups: as the authenticator named them last.
    :ivar departed: when the directory had no account of this user any more, None while it has one.
    """

    id: int
    name: UserName
    password_hash: str | None = field(repr=False)
    created: float
    source: Source | None = None
    subject: Annotated[str, 255] | None = None
    groups: tuple[str, ...] = ()
    departed: float | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Failure:
    """Why the last attempt failed, in three sentences and the agent's last lines."""

    what: str
    why: str = ""
    fix: str = ""
    log: tuple[str, ...] = ()
    time: float = 0.0
    final: bool = False  # another attempt cannot succeed before something is changed

    def to_json(self) -> dict[str, Any]:
        """Return the `failure` of the REST interface."""
        return {"what": self.what, "why": self.why, "fix": self.fix, "log": list(self.log)}


@dataclass(frozen=True, slots=True, kw_only=True)
class Move:
    """A move of an agent and its data between providers that has begun.

    :ivar settling: the agent and its data are on the target; only clean-up is left.
    :ivar handle: of the agent on the target, once data was imported there; :ivar copy: name of the old copy that
        the data directory becomes, or ""; :ivar install: the exported data becomes the data directory.
    """

    source: str
    target: str
    step: str
    since: float
    settling: bool = False
    handle: str = ""
    copy: str = ""
    install: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class AgentRow:
    """Everything that is stored of an agent.

    :ivar version: of the row: an older one never replaces a newer one; :ivar since: of the public state.
    :ivar provider: of the agent and its data now; the app's provider may differ until the next start.
    :ivar handle: `Handle.to_json`, "" before the first start; :ivar ready: the health check has answered
        since it runs; :ivar spec_hash: of what runs or sleeps, "" when nothing does.
    :ivar attempts: times of automatic starts and of failed starts, within the last ten minutes.
    :ivar retry_at: when the next attempt is due; None with a failure: no further attempt.
    """

    id: int
    version: int
    name: AgentName
    user: str  # of the table of users
    user_id: int
    app: Short
    provider: Short
    uid: int
    created: float
    since: float
    desired: Desired = Desired.STOPPED
    keep_data: bool = False
    pending: Pending = Pending.NONE
    handle: str = ""
    observed: BackendState = BackendState.ABSENT
    observed_at: float | None = None
    ready: bool = False
    endpoint: str = ""
    owner_uid: int | None = None
    started_at: float | None = None
    spec_hash: Annotated[str, 64] = ""
    exit_reason: str = ""
    operation: Kind | None = None
    step: Annotated[str, 64] = ""
    operation_since: float | None = None
    failure: Failure | None = None
    attempts: tuple[float, ...] = ()
    retry_at: float | None = None
    move: Move | None = None
    last_used: float | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class KeptRow:
    """Data kept on purpose when its agent was removed; a new agent of the same name gets it.

    :ivar source: the authenticator, and :ivar subject: the account to which the data belonged; None: nobody's yet.
    """

    agent: AgentName
    uid: int
    app: Short
    provider: Short
    handle: str
    time: float
    source: Source | None = None
    subject: Annotated[str, 255] | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class CopyRow:
    """An old copy of data, kept by a move until it is purged.

    :ivar directory: its name below the agent's ``copies/``; "" when the old provider holds it.
    """

    id: int
    agent: AgentName
    provider: Short
    directory: Annotated[str, 64]
    handle: str
    time: float


@dataclass(frozen=True, slots=True, kw_only=True)
class BackendRow:
    """Whether a provider's backend answered, since when, and when it last did."""

    name: Short
    reachable: bool
    since: float
    contact: float | None
