"""The body of a request on its way to an upstream."""

from __future__ import annotations

from dispatcher.proxy.edge.http.chunked import Chunked
from dispatcher.proxy.edge.http.request import CHUNKED


class RequestBody:
    """Finds the end of one body.

    :ivar left: bytes still to come, `CHUNKED`, or 0 at the end; :ivar rest: the bytes after the body.
    :ivar chunks: in the bytes of the last `take`.
    """

    def __init__(self, length: int) -> None:
        self.left = length
        self.rest = b""
        self.chunks = 0
        self._decoder = Chunked() if length == CHUNKED else None

    def take(self, data: bytes) -> bytes:
        """Return the part of `data` to pass on.

        :raises BadHead: invalid chunks.
        """
        decoder = self._decoder
        if decoder is not None:
            passed = decoder.feed(data)
            self.chunks = decoder.chunks
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
