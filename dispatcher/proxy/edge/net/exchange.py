"""The state of one request and its answer as they pass through a client's connection."""

from __future__ import annotations

from typing import Any

from dispatcher.proxy.edge.http.chunked import Chunked
from dispatcher.proxy.edge.http.request import CHUNKED
from dispatcher.proxy.edge.net.upstream import Upstream
from dispatcher.proxy.edge.routing.table import Agent

POLL_SECONDS = 5  # an answer that lasts longer is a stream, even that of a poll


class Exchange:
    """A request and its answer; a connection has one object and uses it for one request after the other.

    :ivar agent: the agent whose requests in flight include this one; :ivar holding: the agent it is held for.
    :ivar lookup: digest of the session that is being looked up; :ivar held_until: 0 before the first hold.
    :ivar body: bytes that came behind the head before they could be passed on.
    :ivar left: bytes of the body still to come, `CHUNKED`, or 0; :ivar rest: the bytes after the body.
    :ivar status: of the answer, 0 before its head was passed on; :ivar replay: bytes that may be sent once more.
    :ivar rechunk: the answer's body goes out in chunks; :ivar poll: the request does not count as use.
    """

    __slots__ = (
        "agent",
        "body",
        "bytes_in",
        "bytes_out",
        "decoder",
        "held_until",
        "holding",
        "left",
        "lookup",
        "poll",
        "rechunk",
        "replay",
        "request",
        "request_id",
        "rest",
        "started",
        "status",
        "upstream",
    )

    request: Any  # a Request, None before the first

    def __init__(self) -> None:
        self.clear()

    def clear(self) -> None:
        """Forget the last request."""
        self.request = None
        self.agent: Agent | None = None
        self.holding: Agent | None = None
        self.upstream: Upstream | None = None
        self.decoder: Chunked | None = None
        self.replay: bytes | None = None
        self.body = self.rest = self.lookup = self.request_id = b""
        self.bytes_in = self.bytes_out = self.left = self.status = 0
        self.held_until = self.started = 0.0
        self.poll = self.rechunk = False

    def begin_body(self) -> bytes:
        """Begin to pass the body on; return the part of it that is here."""
        body, self.body = self.body, b""
        self.left = self.request.length
        self.decoder = Chunked() if self.left == CHUNKED else None
        return self.take_body(body) if body else b""

    def take_body(self, data: bytes) -> bytes:
        """Return the part of `data` to pass on; `left` is 0 at the end of the body, and `rest` what follows it.

        :raises BadHead: invalid chunks.
        """
        left = self.left
        size = len(data)
        if size < left:
            self.left = left - size
            return data
        if left > 0:
            self.left = 0
            self.rest = data[left:]
            return data if size == left else data[:left]
        decoder = self.decoder
        assert decoder is not None
        passed = decoder.feed(data)
        if decoder.done:
            self.rest = decoder.rest
            self.left = 0
            self.decoder = None
        return passed

    def count_answer(self, size: int, body: int, now: float) -> None:
        """Count `size` bytes that go to the client, `body` of them of the answer's body."""
        self.bytes_out += size
        agent = self.agent
        if agent is not None:
            traffic = agent.traffic
            traffic.bytes_out += size
            if not self.poll or now - self.started > POLL_SECONDS:
                traffic.bulk += body
