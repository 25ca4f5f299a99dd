"""Finding request heads in the bytes of a connection, without I/O."""

from __future__ import annotations

from dispatcher.proxy.edge.http.field_names import BadHead, HeadTooLong
from dispatcher.proxy.edge.http.fields import head_end
from dispatcher.proxy.edge.http.request import Request, parse_request


class HeadReader:
    """Reads the heads of one connection.

    :ivar kept: the beginning of a head, or bytes that wait for an earlier request; None for nothing.
    :ivar rest: the bytes after the head that was read last.
    """

    def __init__(self, max_bytes: int, max_fields: int) -> None:
        self._max_bytes = max_bytes
        self._max_fields = max_fields
        self.kept: bytearray | None = None
        self.rest = b""

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
                raise HeadTooLong(self._max_bytes, bytes(kept))
            return None
        return self._read(data)

    def read_kept(self) -> Request | None:
        """Read on with the bytes that were kept.

        Bytes behind the head that are not its request's body stay: thousands of requests may be waiting in them.

        :raises BadHead: see `read`.
        """
        kept, self.kept = self.kept, None
        if kept is None:
            return None
        end = kept.find(b"\r\n\r\n") + 4
        if end < 4:
            return self._read(bytes(kept))
        request = self._read(bytes(kept[:end]))
        if request is not None:
            length = 0 if request.upgrade else request.length
            own = len(kept) if request.upgrade or length < 0 else end + length
            self.rest = bytes(kept[end:own])
            del kept[:own]
            if kept:
                self.kept = kept
        return request

    def _read(self, data: bytes, *, skipped: bool = False) -> Request | None:
        end = head_end(data)
        if end <= 4:
            return self._begin(data)
        try:
            if end > self._max_bytes:
                raise HeadTooLong(self._max_bytes, data)
            head = data if end == len(data) else data[:end]
            request = parse_request(head, self._max_fields)
        except BadHead:
            if data[:2] == b"\r\n" and not skipped:
                # RFC 9112, 2.2: an empty line before the request line is ignored.
                return self._read(data[2:], skipped=True)
            raise
        self.rest = data[end:]
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
            raise HeadTooLong(self._max_bytes, data)
        if b"\r\n\r\n" in data:
            return self._read(data, skipped=True)
        self.kept = bytearray(data)
        return None
