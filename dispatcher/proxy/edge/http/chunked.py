"""The chunked transfer coding (RFC 9112, 7.1): strict validation of a body while it is passed on.

The scanner returns chunked coding again: the received bytes where their framing is canonical.  Chunk
extensions are dropped (they are unused, and parsers disagree about them), and the trailer section is rebuilt from
the fields that are allowed in one.  An incomplete line is never passed on, so the output is always well-formed.
"""

from __future__ import annotations

import re
from typing import Final

from dispatcher.proxy.edge.http.field_names import BadHead
from dispatcher.proxy.edge.http.fields import trailer_lines

_SIZE: Final = re.compile(rb"([0-9A-Fa-f]{1,15})([ \t]*;[\t\x20-\x7e\x80-\xff]*)?")
_MAX_LINE: Final = 256
_MAX_TRAILERS: Final = 16384

_SIZE_LINE, _DATA, _DATA_END, _TRAILERS = range(4)


class Chunked:
    """A scanner of one body.

    :ivar done: the last chunk and the trailer section were seen; :ivar rest: the bytes after them.
    :ivar size: bytes of data so far; :ivar chunks: in the bytes of the last `feed`.
    """

    def __init__(self, *, plain: bool = False) -> None:
        """Begin before the first chunk.

        :param plain: return the data instead of chunks, for HTTP/1.0 clients.
        """
        self._state = _SIZE_LINE
        self._left = 0
        self._carry = b""
        self._plain = plain
        self._extensions = 0
        self.done = False
        self.rest = b""
        self.size = self.chunks = 0

    def feed(self, data: bytes) -> bytes:
        """Take the next bytes and return the bytes to pass on, which may be none.

        :raises BadHead: the coding is invalid, or a line is too long.
        """
        self.chunks = 0
        # The middle of a big chunk, the common case of a long body, has no framing.
        if self._state == _DATA and len(data) < self._left:
            self._left -= len(data)
            self.size += len(data)
            return data
        if self._carry:
            data = self._carry + data
        framed = not self._plain
        out: list[bytes] = []
        end = len(data)
        kept = position = 0  # data[kept:position] is passed on unchanged
        while True:
            if self._state == _DATA:
                taken = min(self._left, end - position)
                if not framed:
                    out.append(data[position : position + taken])
                position += taken
                self.size += taken
                self._left -= taken
                if self._left:
                    break
                self._state = _DATA_END
            if self._state == _DATA_END:
                if end - position < 2:
                    break
                if data[position : position + 2] != b"\r\n":
                    raise BadHead("no line end after a chunk")
                position += 2
                self._state = _SIZE_LINE
            if self._state == _SIZE_LINE:
                stop = data.find(b"\r\n", position)
                if (end if stop < 0 else stop) - position > _MAX_LINE:
                    raise BadHead("a chunk-size line that is too long")
                if stop < 0:
                    break
                match = _SIZE.fullmatch(data, position, stop)
                if not match:
                    raise BadHead("an invalid chunk-size line")
                self._left = int(match[1], 16)
                if match[2] is not None:
                    self._count_extension(len(match[2]))
                if not self._left:
                    if framed:
                        out += (data[kept:position], b"0\r\n")
                    kept = stop + 2
                    self._state = _TRAILERS
                else:
                    if match[2] is not None and framed:
                        out.append(data[kept : match.end(1)])
                        kept = stop
                    self._state = _DATA
                    self.chunks += 1
                position = stop + 2
                continue
            trailers = self._trailers(data, position)
            if trailers is None:
                break
            section, self.rest = trailers
            if framed:
                out.append(section)
            self.done = True
            kept = position = end
            break
        self._carry = data[position:]
        if framed and position > kept:
            out.append(data[kept:position])
        return out[0] if len(out) == 1 else b"".join(out)

    def _count_extension(self, size: int) -> None:
        self._extensions += size
        if self._extensions > self.size + _MAX_TRAILERS:
            raise BadHead("more chunk extensions than data")

    def _trailers(self, data: bytes, position: int) -> tuple[bytes, bytes] | None:
        """Return the section to pass on, its empty line included, and what follows; None when incomplete."""
        if data[position : position + 2] == b"\r\n":
            return b"\r\n", data[position + 2 :]
        stop = data.find(b"\r\n\r\n", position)
        if (len(data) if stop < 0 else stop) - position > _MAX_TRAILERS:
            raise BadHead("a trailer section that is too long")
        if stop < 0:
            return None
        lines = trailer_lines(data[position:stop].split(b"\r\n"))
        return b"".join(line + b"\r\n" for line in lines) + b"\r\n", data[stop + 4 :]
