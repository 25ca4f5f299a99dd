"""The types of what requests give, and the forms of answers, for validation and `/openapi.json`.

The tests hold every answer against its form.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field
from typing_extensions import NotRequired, TypedDict

from dispatcher.manager.agents.lifecycle import State
from dispatcher.manager.storage.rows import Desired
from dispatcher.manager.storage.tokens import MAX_NOTE
from dispatcher.plugin.model import Capability, Level

MAX_WAIT = 60.0  # seconds

Sha256 = Annotated[
    str, Field(pattern=r"^[0-9a-f]{64}$", description="SHA-256 of the session's token, hexadecimal")
]
Name = Annotated[str, Field(min_length=1, max_length=300)]
User = Annotated[str, Field(min_length=1, max_length=255)]
App = Annotated[str, Field(max_length=64)]
Password = Annotated[str, Field(min_length=1, max_length=1024)]
Token = Annotated[str, Field(min_length=1, max_length=128)]
SiteName = Annotated[str, Field(min_length=1, max_length=128, description="an entry of auth.authenticator")]
SiteAnswer = Annotated[dict[str, Annotated[str, Field(max_length=8192)]], Field(max_length=20)]
LogoutToken = Annotated[str, Field(min_length=1, max_length=32768)]
SessionId = Annotated[str, Field(pattern=r"^[0-9a-f]{16}$")]
Address = Annotated[str, Field(max_length=64, description="of the user's browser")]
Host = Annotated[str, Field(min_length=1, max_length=255, pattern=r"^[a-z0-9.:\[\]-]+$")]
Wait = Annotated[float, Field(ge=0, le=MAX_WAIT, allow_inf_nan=False, description="seconds")]

Time = Annotated[str, Field(json_schema_extra={"format": "date-time"})]

Problem = TypedDict("Problem", {"type": str, "title": str, "status": int, "detail": str, "fix": str, "code": str})

# Agents

Failure = TypedDict("Failure", {"what": str, "why": str, "fix": str, "log": list[str]})
AgentState = TypedDict(
    "AgentState",
    {
        "state": State,
        "desired": Desired,
        "stage": str,
        "detail": str,
        "fraction": float | None,
        "since": Time,
        "failure": Failure | None,
        "outdated": bool,
    },
)
Move = TypedDict("Move", {"from": str, "to": str, "step": str, "since": Time})
Disk = TypedDict("Disk", {"used": int, "limit": int | None, "full": bool})


class Agent(AgentState):
    """AGENT of docs/reference/rest.md"""

    name: str
    user: str
    app: str
    provider: str
    last_used: Time | None
    created: Time
    reachable: bool
    observed_at: Time | None
    disk: Disk | None
    move: Move | None


AgentList = TypedDict("AgentList", {"agents": list[Agent]})
Usage = TypedDict(
    "Usage", {"memory": int | None, "cpu_seconds": float | None, "disk": int | None, "disk_limit": int | None}
)
Runtime = TypedDict(
    "Runtime",
    {
        "handle": dict[str, Any] | None,
        "endpoint": str | None,
        "uid": int,
        "provider": str,
        "started_at": Time | None,
        "spec_hash": str | None,
        "usage": Usage | None,
    },
)
Logs = TypedDict("Logs", {"lines": list[str], "cursor": str})
Event = TypedDict("Event", {"time": Time, "kind": str, "detail": str})
Events = TypedDict("Events", {"events": list[Event]})
CheckedUser = TypedDict("CheckedUser", {"user": str})
Why = TypedDict("Why", {"agent": str, "sentences": list[str]})
Copy = TypedDict(
    "Copy",
    {
        "id": int | None,
        "provider": str,
        "kind": Literal["directory", "provider"],
        "time": Time,
        "why": str,
        "size": int | None,
    },
)
Copies = TypedDict("Copies", {"copies": list[Copy]})
Purged = TypedDict("Purged", {"purged": int})

# Sessions

Session = TypedDict(
    "Session",
    {
        "sha256": str,
        "user": str,
        "agent": str,
        "agents": list[str],
        "ttl": float,
        "lifetime": float,
        "created": Time,
        "parent": NotRequired[str],
        "host": NotRequired[str],
    },
)
SignedIn = TypedDict("SignedIn", {"token": str, "device": str, "session": Session})
Renewed = TypedDict("Renewed", {"token": str, "session": Session})
Code = TypedDict("Code", {"code": str})
ListedSession = TypedDict(
    "ListedSession",
    {
        "id": str,
        "user": str,
        "agent": str,
        "created": Time,
        "last_used": Time,
        "expires": Time,
        "address": str,
        "user_agent": str,
    },
)
SessionList = TypedDict("SessionList", {"sessions": list[ListedSession]})
Site = TypedDict("Site", {"name": str, "title": str})
SignInMethods = TypedDict("SignInMethods", {"passwords": bool, "sites": list[Site]})
SignInBegun = TypedDict("SignInBegun", {"url": str})
SignedInAtSite = TypedDict("SignedInAtSite", {"token": str, "device": str, "session": Session, "next": str})
SignedOut = TypedDict("SignedOut", {"url": str | None})
Revoked = TypedDict("Revoked", {"revoked": int})

# API tokens

Scope = Annotated[str, Field(max_length=32)]
Expires = Annotated[str, Field(min_length=1, max_length=40, description="a duration, an ISO 8601 date, or never")]
Note = Annotated[str, Field(max_length=MAX_NOTE)]


class ListedToken(TypedDict):
    """TOKEN of docs/reference/rest.md"""

    id: str
    user: str | None
    service: str | None
    scopes: list[str]
    note: str
    created: Time
    expires: Time | None
    last_used: Time | None


class CreatedToken(ListedToken):
    """A new token, with the token itself."""

    token: str


TokenList = TypedDict("TokenList", {"tokens": list[ListedToken]})
OwnAccess = TypedDict(
    "OwnAccess",
    {
        "sessions": list[ListedSession],
        "changes_passwords": bool,
        "tokens": list[ListedToken],
        "tokens_need_password": bool,
    },
)

Keys = TypedDict("Keys", {"keys": list[dict[str, str]]})

# Directories

Sync = TypedDict(
    "Sync",
    {
        "running": bool,
        "dry_run": bool,
        "users": int,
        "asked": int,
        "changed": list[str],
        "left": list[str],
        "back": list[str],
        "removed": list[str],
        "skipped": dict[str, int],
        "problems": list[str],
    },
)
SignInTest = TypedDict(
    "SignInTest",
    {
        "accepted": bool,
        "refusal": str,
        "authenticator": NotRequired[str],
        "user": NotRequired[str],
        "groups": NotRequired[list[str]],
        "configured_groups": NotRequired[list[str]],
        "apps": NotRequired[list[str]],
        "agents": NotRequired[list[str]],
    },
)

# The manager

Provider = TypedDict(
    "Provider",
    {
        "name": str,
        "isolation": Literal["process", "container", "vm"] | None,
        "capabilities": list[Capability],
        "distribution": str,
        "usable": bool,
        "error": str | None,
    },
)
ProviderList = TypedDict("ProviderList", {"providers": list[Provider]})
Plugin = TypedDict(
    "Plugin",
    {
        "name": str,
        "distribution": str,
        "kinds": list[Literal["provider", "authenticator", "observer"]],
        "configured": bool,
        "error": str | None,
        "fix": str,
    },
)
PluginList = TypedDict("PluginList", {"plugins": list[Plugin]})
Finding = TypedDict("Finding", {"level": Level, "what": str, "fix": str})
Findings = TypedDict("Findings", {"findings": list[Finding]})
AgentMemory = TypedDict("AgentMemory", {"name": str, "memory": int | None})
MemoryUsage = TypedDict("MemoryUsage", {"total": int, "average": float, "agents": list[AgentMemory]})
AgentUsage = TypedDict(
    "AgentUsage",
    {
        "name": str,
        "state": State,
        "memory": int | None,
        "cpu_percent": float | None,
        "cpu_seconds": float | None,
        "disk": int | None,
        "disk_limit": int | None,
        "last_used": Time | None,
    },
)
Top = TypedDict("Top", {"agents": list[AgentUsage]})
Reloaded = TypedDict("Reloaded", {"changed": list[str], "faults": list[str]})
Health = TypedDict(
    "Health",
    {
        "status": Literal["ok", "degraded"],
        "version": NotRequired[str],
        "problems": NotRequired[list[str]],
        "configuration_changed": NotRequired[bool],
        "feed_connections": NotRequired[int],
    },
)
