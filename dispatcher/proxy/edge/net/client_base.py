"""The states of a client's connection, and its interface for the modules below `connection`."""

from __future__ import annotations

import asyncio
from enum import Enum

from dispatcher.proxy.edge.http.field_names import BadHead
from dispatcher.proxy.edge.http.head_reader import HeadReader
from dispatcher.proxy.edge.http.request import Request
from dispatcher.proxy.edge.routing.actions import Decision
from dispatcher.proxy.edge.routing.pages import Failure
from dispatcher.proxy.edge.routing.table import Session


class State(Enum):
    """What a connection is doing."""

    HEAD = "between requests, or in the middle of a head"
    BODY = "a request is being passed on, and its body still comes"
    ANSWER = "the request is complete, the answer is not"
    WAIT = "the request cannot be passed on yet: lookup, hold, connect"
    STREAM = "an event stream"
    LINGER = "the last answer is written"
    CLOSED = "the transport is gone, or serves a tunnel"
    COLLECT = "the body of a request for the portal comes"


class Client:
    """A client's connection; `connection.Connection` implements it.

    :ivar address: of the peer, or of a trusted PROXY header, None where the transport knows it.
    :ivar remote: the client's address, for agents and logs; :ivar trusted: its proxy headers are.
    :ivar deadline: when `expired` is called; :ivar closing: no request follows; :ivar eof: the client sent all.
    :ivar write_paused: the client reads too slowly; :ivar unsent: the bytes it had not taken at the last check.
    :ivar to_https: each request is redirected to HTTPS, on the `same_port` if a plain one came to a TLS port.
    :ivar reading_paused: the client is not read, see `regulate_reading`.
    """

    address: str | None
    closing: bool
    deadline: float
    eof: bool
    reader: HeadReader
    reading_paused: bool
    remote: bytes
    same_port: bool
    scheme: bytes
    session: Session | None
    state: State
    to_https: bool
    transport: asyncio.Transport
    trusted: bool
    unsent: int
    write_paused: bool

    def is_answering(self) -> bool:
        """Whether a request is complete, and its answer is not."""
        return self.state is State.ANSWER or self.state is State.WAIT

    def reset(self) -> None: ...
    def expired(self) -> None: ...
    def close_if_idle(self) -> None: ...
    def revoke(self) -> None: ...
    def count_use(self) -> None: ...

    # For the exchange.

    def route(self, request: Request, may_look_up: bool) -> None: ...
    def carry_out(self, decision: Decision) -> None: ...
    def refuse(self, failure: Failure, link: str = "") -> None: ...
    def refuse_head(self, error: BadHead) -> None: ...
    def proceed(self, clean: bool) -> None: ...
    def regulate_reading(self) -> None: ...
    def pause_for(self, seconds: float) -> None: ...

    # As a protocol of the event loop.

    def connection_made(self, transport: asyncio.BaseTransport) -> None: ...
    def data_received(self, data: bytes) -> None: ...
    def connection_lost(self, exc: Exception | None) -> None: ...
