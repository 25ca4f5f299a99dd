"""WebSocket frames (RFC 6455, section 5): their borders and their kind.

The edge passes frames on unchanged.  It needs the end of each, to send its own Close frame between two, and the
number of bytes of data: a ping does not count as use, typing does.
"""

from __future__ import annotations

import struct
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from mypy_extensions import i64

GOING_AWAY: Final = 1001  # RFC 6455, 7.4.1
POLICY: Final = 1008
_CONTROL: Final = 0x08
_MASKED: Final = 0x80


class Scanner:
    """One direction of a WebSocket.

    :ivar between: at a border of two frames; :ivar broken: the bytes are not WebSocket frames.
    :ivar frames: that began in the bytes of the last `scan`.
    """

    def __init__(self) -> None:
        self.between = True
        self.broken = False
        self.frames = 0
        self._skip = 0  # bytes of the frame under way that are missing
        self._head = b""
        self._data = False

    def scan(self, data: bytes) -> int:
        """Take the next bytes; return how many of them belong to data frames (text, binary, continuation)."""
        size = len(data)
        self.frames = 0
        if self.broken:
            return size
        if self.between and size > 1 and whole(data, size):
            return 0 if data[0] & _CONTROL else size
        counted = self._walk(data)
        self.between = not self._skip and not self._head and not self.broken
        return counted

    def _walk(self, data: bytes) -> int:
        size: i64 = len(data)
        position: i64 = 0
        counted: i64 = 0
        frames: i64 = 0
        needed: i64
        length: i64
        second: i64
        while position < size:
            if self._skip:
                taken = min(self._skip, size - position)
                self._skip -= taken
                position += taken
                if self._data:
                    counted += taken
                continue
            # Short frames, which end in these bytes, need nothing else.
            while not self._head and position + 1 < size:
                second = data[position + 1]
                length = second & 0x7F
                needed = 6 if second & _MASKED else 2
                if length > 125 or position + needed + length > size:
                    break
                if not data[position] & _CONTROL:
                    counted += needed + length
                position += needed + length
                frames += 1
            if position == size:
                break
            head = self._head + data[position : position + 14 - len(self._head)]
            needed = _head_length(head)
            if len(head) < needed:
                self._head = head
                break
            position += needed - len(self._head)
            frames += 1
            self._head = b""
            length = head[1] & 0x7F
            if length == 126:
                length = int.from_bytes(head[2:4], "big")
            elif length == 127:
                if head[2] & 0x80:
                    self.broken = True
                    counted += size - position
                    break
                length = int.from_bytes(head[2:10], "big")
            self._skip = length
            self._data = not head[0] & _CONTROL
            if self._data:
                counted += needed
        self.frames = frames
        return counted


def whole(data: bytes, size: int) -> bool:
    """Whether the bytes, at least two, are exactly one short frame, masked or not, as most messages are."""
    second = data[1]
    return second & 0x7F < 126 and second in (size - 2, size + 0x80 - 6)


def _head_length(head: bytes) -> int:
    """Return how many bytes a frame's head has, by its first bytes."""
    if len(head) < 2:
        return 2
    length = head[1] & 0x7F
    return 2 + (2 if length == 126 else 8 if length == 127 else 0) + (4 if head[1] & _MASKED else 0)


def close_frame(code: int, *, masked: bool) -> bytes:
    """Return a Close frame; a client's frames are masked (RFC 6455, 5.3), here with zeros."""
    if masked:
        return b"\x88\x82\0\0\0\0" + struct.pack(">H", code)
    return b"\x88\x02" + struct.pack(">H", code)
