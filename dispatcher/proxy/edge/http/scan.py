"""Field lines of a head in one pass over its bytes: the fast form of `headers.read_fields`, for the compiled edge.

mypyc turns these loops into machine code; they are not used in the interpreter (`COMPILED`).  A head that is not
plainly valid is left to `headers.read_fields`, which decides and gives the reason: both forms return the same.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from dispatcher.proxy.edge.http.headers import (
    FIELD_BYTES,
    KEEP,
    LOOKED_AT,
    SPECIAL,
    Fields,
    Names,
    read_fields,
)

if TYPE_CHECKING:
    from mypy_extensions import i64

#: Whether this module runs as machine code.
COMPILED: Final = not __file__.endswith((".py", ".pyc"))

_TOKEN_BYTES: Final = b"!#$%&'*+.^`|~0123456789ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz-"
#: What a byte may be part of: 1 a name, 2 a value.  The underscore is in no name here: it needs a closer look.
_CLASSES: Final = bytes(
    (1 if byte in _TOKEN_BYTES else 0) | (2 if byte in FIELD_BYTES else 0) for byte in range(256)
)


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
    known = names.known
    perhaps = names.perhaps
    classes = _CLASSES
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
    while position < end:
        left -= 1
        colon = position
        byte = head[colon]
        index = byte & 31
        while classes[byte] & 1:
            colon += 1
            byte = head[colon]
        stop = colon + 1
        byte = head[stop]
        while classes[byte] & 2:
            stop += 1
            byte = head[stop]
        if head[colon] != 58 or colon == position or byte != 13 or head[stop + 1] != 10 or left < 0:
            return read_fields(head, start, max_fields, names)
        index = ((colon - position) & 63) << 5 | index
        if perhaps[index]:
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
                    fields.lines += head[begin:position]
                begin = stop + 2
        position = stop + 2
    if begin < position:
        fields.lines += head[begin:position]
    return fields
