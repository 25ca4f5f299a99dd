"""WebSocket frames (RFC 6455, section 5), read just far enough to know what they are.  Pure.

The edge passes frames on as they come.  It only wants to know where one ends, so that a Close frame of its own
can be put between two, and how many bytes are data: a ping is not use, typing is.
"""

from __future__ import annotations

import struct

GOING_AWAY = 1001  # RFC 6455, 7.4.1
POLICY = 1008
_CONTROL = 0x08
_MASKED = 0x80


class Scanner:
    """One direction of a WebSocket.

    :ivar between: a frame could be put in here; :ivar broken: this is no WebSocket.
    """

    __slots__ = ("_data", "_head", "_skip", "between", "broken")

    def __init__(self) -> None:
        self.between = True
        self.broken = False
        self._skip = 0  # bytes of the frame under way that are still to come
        self._head = b""
        self._data = False

    def scan(self, data: bytes) -> int:
        """Take the next bytes; return how many of them belong to data frames (text, binary, continuation)."""
        size = len(data)
        if self.broken:
            return size
        if self.between and size > 1 and whole(data, size):
            return 0 if data[0] & _CONTROL else size
        counted = self._walk(data, size)
        self.between = not self._skip and not self._head and not self.broken
        return counted

    def _walk(self, data: bytes, size: int) -> int:
        counted = position = 0
        while position < size:
            if self._skip:
                taken = min(self._skip, size - position)
                self._skip -= taken
                position += taken
                if self._data:
                    counted += taken
                continue
            head = self._head + data[position : position + 14 - len(self._head)]
            needed = _head_length(head)
            if len(head) < needed:
                position += len(head) - len(self._head)
                self._head = head
                break
            position += needed - len(self._head)
            self._head = b""
            length = head[1] & 0x7F
            if length == 126:
                (length,) = struct.unpack_from(">H", head, 2)
            elif length == 127:
                (length,) = struct.unpack_from(">Q", head, 2)
                if length >> 63:
                    self.broken = True
                    return counted + size - position
            self._skip = length
            self._data = not head[0] & _CONTROL
            if self._data:
                counted += needed
        return counted


def whole(data: bytes, size: int) -> bool:
    """Whether the bytes, at least two, are exactly one short frame, masked or not: most messages are."""
    second = data[1]
    return second & 0x7F < 126 and second in (size - 2, size + 0x80 - 6)


def _head_length(head: bytes) -> int:
    """Return how many bytes a frame's head has, as far as its beginning tells."""
    if len(head) < 2:
        return 2
    length = head[1] & 0x7F
    return 2 + (2 if length == 126 else 8 if length == 127 else 0) + (4 if head[1] & _MASKED else 0)


def close_frame(code: int, *, masked: bool) -> bytes:
    """Return a Close frame; a client's frames are masked (RFC 6455, 5.3), here with zeros."""
    if masked:
        return b"\x88\x82\0\0\0\0" + struct.pack(">H", code)
    return b"\x88\x02" + struct.pack(">H", code)
