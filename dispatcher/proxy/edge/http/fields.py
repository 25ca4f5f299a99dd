"""Field lines of HTTP/1.1 heads and trailers, strictly by RFC 9110 section 5 and RFC 9112 section 5.

Whatever two parsers could read differently is refused here once, for requests and answers: bare CR or LF, NUL and
other controls, folded lines, space before the colon, invalid names, and names whose underscore spelling some
applications take for a framing field (WSGI and CGI do not tell ``_`` from ``-``).

There are two readers with the same result: `scan_fields`, one pass over the bytes, which mypyc turns into machine
code, and `read_fields` for the interpreter (`COMPILED`).  A head that is not plainly valid is always left to
`read_fields`, which decides and gives the reason.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from dispatcher.proxy.edge.http.field_names import (
    KEEP,
    LOOKED_AT,
    ODD,
    REQUEST_NAMES,
    SPECIAL,
    TOKEN,
    TRAILER_FORBIDDEN,
    TRAILER_PREFIXES,
    BadHead,
    Names,
)

if TYPE_CHECKING:
    from mypy_extensions import i64

#: Whether this module runs as machine code.
COMPILED: Final = not __file__.endswith((".py", ".pyc"))

#: Bytes that a field value or a start line may hold: HTAB, SP, VCHAR and obs-text (RFC 9110, 5.5).
FIELD_BYTES: Final = bytes([0x09, *range(0x20, 0x7F), *range(0x80, 0x100)])
_BLANKS: Final = frozenset({b" ", b"\t"})
MAX_DIGITS: Final = 18  # of a Content-Length


class Fields:
    """The field lines of a head.

    :ivar lines: those to pass on, each with its CRLF; :ivar special: kind and value of all but `KEEP` and `DROP`.
    """

    def __init__(self) -> None:
        self.lines = b""
        self.special: list[tuple[int, bytes]] = []


def read_fields(head: bytes, start: int, max_fields: int, names: Names) -> Fields:
    """Return the field lines of a head.

    :param head: up to and including the empty line; :param start: where the first field line begins.
    :raises BadHead: an invalid line, or more than `max_fields` (431).
    """
    fields = Fields()
    lines = head[start:].split(b"\r\n")
    del lines[-2:]
    if len(lines) > max_fields:
        raise BadHead(f"more than {max_fields} header lines", 431)
    known = names.known
    kept = []
    for given in lines:
        line = given
        name, colon, value = line.partition(b":")
        if not colon:
            raise BadHead("a header line without a colon")
        if (
            names is not REQUEST_NAMES and name[-1:] in _BLANKS
        ):  # removed there, refused in requests (RFC 9112, 5.1)
            name = name.rstrip(b" \t")
            line = name + b":" + value
        kind = known.get(name)
        if kind is None:
            kind = names.learn(name)
        if kind == KEEP or kind >= LOOKED_AT:
            kept.append(line + b"\r\n")
        if kind >= SPECIAL:
            fields.special.append((kind, value.strip(b" \t")))
    # In one go: without the allowed bytes only the line ends are left.
    if head[start:].translate(None, FIELD_BYTES) != b"\r\n" * (len(lines) + 1):
        raise BadHead("a control character in a header")
    fields.lines = b"".join(kept)
    return fields


def head_end(data: bytes) -> int:
    """Return the length of the head at the beginning, its empty line included; -1 if it is not complete."""
    if not COMPILED:
        end = data.find(b"\r\n\r\n")
        return end + 4 if end >= 0 else -1
    position: i64 = 3
    size: i64 = len(data)
    byte: i64
    while position < size:
        byte = data[position]
        if byte > 13:
            position += 4  # the empty line cannot include this byte
        elif byte == 10 and data[position - 1] == 13 and data[position - 2] == 10 and data[position - 3] == 13:
            return position + 1
        else:
            position += 1
    return -1


def scan_fields(head: bytes, start: int, max_fields: int, names: Names) -> Fields:
    """Return the field lines of a head, as `read_fields`."""
    fields = Fields()
    special = fields.special
    kept: list[bytes] = []
    known = names.known
    perhaps = names.perhaps
    position: i64 = start
    end: i64 = len(head) - 2
    begin: i64 = start  # of the lines that are passed on together
    left: i64 = max_fields
    colon: i64
    stop: i64
    first: i64
    last: i64
    byte: i64
    index: i64
    length: i64
    while position < end:
        left -= 1
        colon = position
        byte = head[colon]
        index = byte & 31
        # The bytes of a plain name; names with other bytes, which are valid, need a closer look.
        while 96 < byte < 123 or byte == 45 or 64 < byte < 91 or 47 < byte < 58:
            colon += 1
            byte = head[colon]
        stop = colon + 1
        byte = head[stop]
        while (byte > 31 and byte != 127) or byte == 9:  # as `FIELD_BYTES`
            stop += 1
            byte = head[stop]
        if head[colon] != 58 or colon == position or byte != 13 or head[stop + 1] != 10 or left < 0:
            return read_fields(head, start, max_fields, names)
        length = colon - position
        length = min(length, 63)
        if perhaps[length << 5 | index]:
            name = head[position:colon]
            kind = known.get(name)
            if kind is None:
                kind = names.learn(name)
            if kind >= SPECIAL:
                first = colon + 1
                last = stop
                while first < last and (head[first] == 32 or head[first] == 9):
                    first += 1
                while first < last and (head[last - 1] == 32 or head[last - 1] == 9):
                    last -= 1
                special.append((kind, head[first:last]))
            if KEEP < kind < LOOKED_AT:
                if begin < position:
                    kept.append(head[begin:position])
                begin = stop + 2
        position = stop + 2
    if begin < position:
        kept.append(head[begin:position])
    fields.lines = kept[0] if len(kept) == 1 else b"".join(kept)
    return fields


def connection_options(value: bytes) -> frozenset[bytes]:
    """Return the options of a `Connection` field, lower case (RFC 9110, 7.6.1)."""
    if value == b"keep-alive":
        return KEEP_ALIVE
    return frozenset([option.strip(b" \t").lower() for option in value.split(b",")])


KEEP_ALIVE: Final = frozenset({b"keep-alive"})


def without_named(lines: bytes, names: frozenset[bytes]) -> bytes:
    """Return `lines` without those of some names, in lower case."""
    return b"".join([line for line in lines.splitlines(True) if line.partition(b":")[0].lower() not in names])


def trailer_lines(lines: list[bytes]) -> list[bytes]:
    """Return the lines of a trailer section that may be passed on.

    :raises BadHead: an invalid line.
    """
    kept = []
    for line in lines:
        name, colon, value = line.partition(b":")
        if not colon or not TOKEN.fullmatch(name) or value.translate(None, FIELD_BYTES):
            raise BadHead("an invalid trailer line")
        text = ODD.sub("-", name.decode("ascii").lower())
        if text not in TRAILER_FORBIDDEN and not text.startswith(TRAILER_PREFIXES):
            kept.append(line)
    return kept
