"""The queries and bodies of requests.

Unknown members are refused, so that a misspelt setting is not ignored.
"""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field

MAX_WAIT = 60.0  # seconds

Sha256 = Annotated[
    str, Field(pattern=r"^[0-9a-f]{64}$", description="SHA-256 of the session's token, hexadecimal")
]
Name = Annotated[str, Field(min_length=1, max_length=300)]
Password = Annotated[str, Field(min_length=1, max_length=1024)]
Token = Annotated[str, Field(min_length=1, max_length=128)]
Address = Annotated[str, Field(max_length=64, description="of the user's browser")]
Host = Annotated[str, Field(min_length=1, max_length=255, pattern=r"^[a-z0-9.:\[\]-]+$")]


class Query(BaseModel):
    """A request's query."""

    model_config = ConfigDict(extra="forbid", frozen=True, hide_input_in_errors=True, defer_build=True)


class Body(Query):
    """A request's JSON body: a number in quotes is not a number."""

    model_config = ConfigDict(strict=True)


class Nothing(Query):
    """Nothing may be given."""


# Requests of the role admin


class CreateAgent(Body):
    """``POST /agents``"""

    name: Name
    password: Password | None = None
    app: Annotated[str, Field(max_length=64)] | None = None


class SetState(Body):
    """``PUT /agents/NAME/state``"""

    state: Literal["running", "suspended", "hibernated", "stopped"]


class GivePassword(Body):
    """A password alone."""

    password: Password


class Wait(Query):
    """How long to wait for the end of the operation."""

    wait: Annotated[float, Field(ge=0, le=MAX_WAIT, allow_inf_nan=False, description="seconds")] = 0.0


class ListAgents(Query):
    """``GET /agents``"""

    state: Annotated[str, Field(max_length=32)] | None = None


class DeleteAgent(Wait):
    """``DELETE /agents/NAME``"""

    data: Literal["keep", "delete"] = "delete"


class ReadLogs(Query):
    """``GET /agents/NAME/logs``"""

    tail: Annotated[int, Field(ge=0, le=10_000)] = 100
    after: Annotated[str, Field(max_length=200)] | None = None


class ListEvents(Query):
    """``GET /agents/NAME/events``"""

    limit: Annotated[int, Field(ge=1, le=10_000)] = 100


class ListSessions(Query):
    """``GET /sessions``"""

    user: Name | None = None


class RevokeSessions(Query):
    """``DELETE /sessions``: of one user, never of all."""

    user: Name


class CheckProvider(Query):
    """``GET /providers/NAME/check``"""

    app: Annotated[str, Field(max_length=64)] | None = None


# Requests of the role proxy


class Login(Body):
    """``POST /sessions``"""

    user: Annotated[str, Field(min_length=1, max_length=255)]
    password: Password
    address: Address
    user_agent: Annotated[str, Field(max_length=4096)] = ""
    device: Token | None = None


class OfSession(Body):
    """A session alone."""

    sha256: Sha256


class Revoke(OfSession):
    """``POST /sessions/revoke``"""

    id: Annotated[str, Field(pattern=r"^[0-9a-f]{16}$")] | None = None


class Select(OfSession):
    """``POST /sessions/select``"""

    agent: Name


class MyState(Select):
    """``POST /sessions/state``"""

    state: Literal["running", "stopped", "restart"]


class ChangePassword(OfSession):
    """``POST /sessions/password``"""

    password: Password
    address: Address
    new_password: Password


class MakeHandover(OfSession):
    """``POST /sessions/handover``"""

    host: Host
    nonce_sha256: Sha256


class Redeem(Body):
    """``POST /sessions/redeem``"""

    code: Token
    nonce: Token
    host: Host
