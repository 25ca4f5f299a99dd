"""Finding request heads in the bytes of a connection, without I/O."""

from __future__ import annotations

from dispatcher.proxy.edge.http.headers import BadHead
from dispatcher.proxy.edge.http.request import Request, parse_request


class HeadReader:
    """Reads the heads of one connection.

    Clients repeat their field lines on a connection; then only the request line is parsed again.

    :ivar kept: the beginning of a head, or bytes that wait for an earlier request; None for nothing.
    :ivar rest: the bytes after the head that was read last; :ivar size: of that head in bytes.
    :ivar model: the request whose field lines may repeat.
    """

    __slots__ = ("_block", "_max_bytes", "_max_fields", "kept", "model", "rest", "size")

    def __init__(self, max_bytes: int, max_fields: int) -> None:
        self._max_bytes = max_bytes
        self._max_fields = max_fields
        self.kept: bytearray | None = None
        self.rest = b""
        self.size = 0
        self.forget()

    def forget(self) -> None:
        """Forget the field lines of earlier requests."""
        self._block = b""
        self.model: Request | None = None

    def keep(self, data: bytes) -> None:
        """Keep bytes that come before they can be read."""
        if self.kept is None:
            self.kept = bytearray(data)
        else:
            self.kept += data

    def read(self, data: bytes) -> Request | None:
        """Take the next bytes; return a request once its head is complete.

        :raises BadHead: the head is refused; nothing after it can be understood.
        """
        kept = self.kept
        if kept is not None:
            start = max(0, len(kept) - 3)
            kept += data
            if kept.find(b"\r\n\r\n", start) >= 0:
                return self.read_kept()
            if len(kept) > self._max_bytes:
                raise self._too_long()
            return None
        block = self._block
        if block and data.endswith(block) and len(data) <= self._max_bytes:
            request = self.model
            assert request is not None
            try:
                request.start(data[: -len(block)])
            except BadHead:
                request.version = 0
            if request.version:
                self.rest = b""
                self.size = len(data)
                return request
            self._block = b""  # invalid, or HTTP/1.0, in which the same lines have another meaning
        return self._read(data)

    def read_kept(self) -> Request | None:
        """Read on with the bytes that were kept.

        :raises BadHead: see `read`.
        """
        kept, self.kept = self.kept, None
        return None if kept is None else self._read(bytes(kept))

    def _read(self, data: bytes, *, skipped: bool = False) -> Request | None:
        end = data.find(b"\r\n\r\n")
        if end <= 0:
            return self._begin(data)
        end += 4
        try:
            if end > self._max_bytes:
                raise self._too_long()
            head = data if end == len(data) else data[:end]
            request = parse_request(head, self._max_fields)
        except BadHead:
            if data[:2] == b"\r\n" and not skipped:
                # RFC 9112, 2.2: an empty line before the request line is ignored.
                return self._read(data[2:], skipped=True)
            raise
        self.rest = data[end:]
        self.size = end
        if request.repeats():
            self._block = head[head.find(b"\r\n") :]
            self.model = request
        else:
            self._block = b""
        return request

    def _begin(self, data: bytes) -> Request | None:
        """Keep the beginning of a head."""
        if data[:2] == b"\r\n":
            data = data[2:]
        if not data or data == b"\r":
            return None
        if not 0x41 <= data[0] <= 0x5A:
            raise BadHead("no request line")
        if len(data) > self._max_bytes:
            raise self._too_long()
        if b"\r\n\r\n" in data:
            return self._read(data, skipped=True)
        self.kept = bytearray(data)
        return None

    def _too_long(self) -> BadHead:
        return BadHead(f"a head of more than {self._max_bytes} bytes", 431)
