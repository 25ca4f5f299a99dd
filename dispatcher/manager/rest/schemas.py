"""What a request may hold, body and query.  Pure.  Unknown members are refused: nothing is believed to be set
that is not.
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
Address = Annotated[str, Field(max_length=64, description="of the person's browser")]
Host = Annotated[str, Field(min_length=1, max_length=255, pattern=r"^[a-z0-9.:\[\]-]+$")]


class Body(BaseModel):
    """A request's body or query: no unknown members, no guessing at types."""

    model_config = ConfigDict(extra="forbid", frozen=True, hide_input_in_errors=True, defer_build=True)


class Nothing(Body):
    """Nothing may be given."""


class StrictBody(Body):
    """A JSON body: a number in quotes is no number."""

    model_config = ConfigDict(strict=True)


# Admin.


class CreateAgent(StrictBody):
    """``POST /agents``"""

    name: Name
    password: Password | None = None
    app: Annotated[str, Field(max_length=64)] | None = None


class SetState(StrictBody):
    """``PUT /agents/NAME/state``"""

    state: Literal["running", "suspended", "hibernated", "stopped"]


class GivePassword(StrictBody):
    """A password alone."""

    password: Password


class Wait(Body):
    """How long to wait for the end of what was asked."""

    wait: Annotated[float, Field(ge=0, le=MAX_WAIT, allow_inf_nan=False, description="seconds")] = 0.0


class ListAgents(Body):
    """``GET /agents``"""

    state: Annotated[str, Field(max_length=32)] | None = None


class DeleteAgent(Wait):
    """``DELETE /agents/NAME``"""

    data: Literal["keep", "delete"] = "delete"


class Logs(Body):
    """``GET /agents/NAME/logs``"""

    tail: Annotated[int, Field(ge=0, le=10_000)] = 100
    after: Annotated[str, Field(max_length=200)] | None = None


class Events(Body):
    """``GET /agents/NAME/events``"""

    limit: Annotated[int, Field(ge=1, le=10_000)] = 100


class ListSessions(Body):
    """``GET /sessions``"""

    user: Name | None = None


class RevokeSessions(Body):
    """``DELETE /sessions``: whose must be said."""

    user: Name


class CheckProvider(Body):
    """``GET /providers/NAME/check``"""

    app: Annotated[str, Field(max_length=64)] | None = None


# Proxy.


class Login(StrictBody):
    """``POST /sessions``"""

    user: Annotated[str, Field(min_length=1, max_length=255)]
    password: Password
    address: Address
    user_agent: Annotated[str, Field(max_length=4096)] = ""
    device: Token | None = None


class OfSession(StrictBody):
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


class Verify(OfSession):
    """``POST /sessions/verify``"""

    password: Password
    address: Address


class ChangePassword(Verify):
    """``POST /sessions/password``"""

    new_password: Password


class MakeHandover(OfSession):
    """``POST /sessions/handover``"""

    host: Host
    nonce_sha256: Sha256


class Redeem(StrictBody):
    """``POST /sessions/redeem``"""

    code: Token
    nonce: Token
    host: Host
