"""The bodies of requests: on their way to an agent, or collected for the portal.

Any client may send to the portal, at any speed, and the portal has few slots: a request takes one when its body is
complete.  Until then a body uses memory only, limited for each connection (`PORTAL_BODY`) and in total: above
`COLLECTED` a worker accepts only as much as a sign-in needs (`SMALL_BODY`), so a full buffer locks no user out.
"""

from __future__ import annotations

from dispatcher.proxy.edge.http.chunked import Chunked
from dispatcher.proxy.edge.http.request import CHUNKED
from dispatcher.proxy.edge.net.context import Context
from dispatcher.proxy.edge.routing import pages
from dispatcher.proxy.edge.routing.settings import PORTAL_BODY, SMALL_BODY


class RequestBody:
    """Finds the end of one body.

    :ivar left: bytes still to come, `CHUNKED`, or 0 at the end; :ivar rest: the bytes after the body.
    """

    __slots__ = ("_decoder", "left", "rest")

    def __init__(self, length: int) -> None:
        self.left = length
        self.rest = b""
        self._decoder = Chunked() if length == CHUNKED else None

    def take(self, data: bytes) -> bytes:
        """Return the part of `data` to pass on.

        :raises BadHead: invalid chunks.
        """
        decoder = self._decoder
        if decoder is not None:
            passed = decoder.feed(data)
            if decoder.done:
                self.rest = decoder.rest
                self.left = 0
            return passed
        left = self.left
        if len(data) < left:
            self.left = left - len(data)
            return data
        self.left = 0
        self.rest = data[left:]
        return data[:left]


class BodyBuffer:
    """Collects one body; `data` is the body as received; `complete`: all of it has arrived."""

    __slots__ = ("_body", "_context", "complete", "data")

    def __init__(self, context: Context, length: int) -> None:
        self._context = context
        self._body = RequestBody(length)
        self.data = b""
        self.complete = False

    def add(self, data: bytes) -> pages.Failure | None:
        """Add a part of the body; return the reason if it is refused.

        :raises BadHead: invalid chunks.
        """
        self.data += data
        self._context.collected += len(data)
        if not self.complete:
            self._body.take(data)
            self.complete = not self._body.left
        size = len(self.data)
        if self.complete:
            return None
        if size > PORTAL_BODY:
            return pages.TOO_LARGE
        return (
            pages.TOO_BUSY
            if self._context.collected > self._context.most_collected and size > SMALL_BODY
            else None
        )

    def release(self) -> bytes:
        """End collecting; return the bytes and uncount them."""
        self._context.collected -= len(self.data)
        return self.data
