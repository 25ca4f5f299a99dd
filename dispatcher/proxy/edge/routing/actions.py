"""The decisions about a request: values that `router` returns and `net` carries out."""

from __future__ import annotations

from dataclasses import dataclass

from dispatcher.proxy.edge.http.request import Request
from dispatcher.proxy.edge.routing.pages import Failure
from dispatcher.proxy.edge.routing.table import Agent


@dataclass(frozen=True, slots=True)
class Pass:
    """Forward the request to a running agent; `poll`: it does not count as use."""

    agent: Agent
    poll: bool


@dataclass(frozen=True, slots=True)
class Hold:
    """Keep the request until the agent's row changes, for `seconds` in all; the first hold sets the limit.

    :ivar pause: an earlier end of this wait, in seconds from now.
    """

    agent: Agent
    seconds: float
    pause: float = float("inf")


@dataclass(frozen=True, slots=True)
class Refuse:
    """Answer with a failure; `link`: HTML that follows its text on a page."""

    failure: Failure
    link: str = ""


@dataclass(frozen=True, slots=True)
class Redirect:
    """Redirect the browser; `lines` are further fields, each ended by CRLF."""

    location: bytes
    status: int = 303
    lines: bytes = b""


@dataclass(frozen=True, slots=True)
class Portal:
    """Forward the request to the portal, with its whole body."""


@dataclass(frozen=True, slots=True)
class Page:
    """Forward `request`, for the waiting page, to the portal in place of the client's."""

    request: Request


@dataclass(frozen=True, slots=True)
class Events:
    """Serve the state of an agent as an event stream."""

    agent: Agent


@dataclass(frozen=True, slots=True)
class Wake:
    """Ask the manager to wake the agent, then do `then`."""

    agent: Agent
    then: Hold | Page | Refuse


@dataclass(frozen=True, slots=True)
class Lookup:
    """Ask the manager for the session and decide again; do `otherwise` if it is known not to exist."""

    digest: bytes
    otherwise: Refuse | Redirect


Decision = Pass | Hold | Wake | Refuse | Redirect | Page | Portal | Events | Lookup

PORTAL = Portal()
