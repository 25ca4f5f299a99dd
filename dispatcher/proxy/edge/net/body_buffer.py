"""Buffers the body of a request for the portal until it is complete.

Any client may send to the portal, at any speed, and the portal has few slots: a request takes one when its body is
complete.  Until then a body uses memory only, limited for each connection (`PORTAL_BODY`) and in total: above
`COLLECTED` a worker accepts only as much as a sign-in needs (`SMALL_BODY`), so a full buffer locks no user out.
"""

from __future__ import annotations

from dispatcher.proxy.edge.http.chunked import Chunked
from dispatcher.proxy.edge.http.request import CHUNKED
from dispatcher.proxy.edge.net.registry import Registry
from dispatcher.proxy.edge.routing import pages
from dispatcher.proxy.edge.routing.settings import COLLECTED, PORTAL_BODY, SMALL_BODY


class BodyBuffer:
    """Collects one body; `data` is the body as received; `complete`: all of it has arrived."""

    __slots__ = ("_decoder", "_length", "_registry", "complete", "data")

    def __init__(self, registry: Registry, length: int) -> None:
        self._registry = registry
        self._length = length
        self._decoder = Chunked() if length == CHUNKED else None
        self.data = b""
        self.complete = False

    def add(self, data: bytes) -> pages.Failure | None:
        """Add a part of the body; return the reason if it is refused.

        :raises BadHead: invalid chunks.
        """
        self.data += data
        self._registry.collected += len(data)
        decoder = self._decoder
        size = len(self.data)
        if decoder is not None:
            decoder.feed(data)
            self.complete = decoder.done
        else:
            self.complete = size >= self._length
        if self.complete:
            return None
        if size > PORTAL_BODY:
            return pages.TOO_LARGE
        return pages.TOO_BUSY if self._registry.collected > COLLECTED and size > SMALL_BODY else None

    def release(self) -> bytes:
        """End collecting; return the bytes and uncount them."""
        self._registry.collected -= len(self.data)
        return self.data
