"""WebSocket frames (RFC 6455), server side, as far as the demo needs.  Pure: bytes in, messages out."""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Iterator
from dataclasses import dataclass

CONTINUATION, TEXT, BINARY, CLOSE, PING, PONG = 0x0, 0x1, 0x2, 0x8, 0x9, 0xA
_GUID = b"258EAFA5-E914-47DA-95CA-C5AB0DC85B11"


class ProtocolError(Exception):
    """The client broke the protocol.

    :param code: the close code to answer with (section 7.4.1).
    """

    def __init__(self, code: int, reason: str) -> None:
        super().__init__(reason)
        self.code = code


@dataclass(frozen=True, slots=True)
class Message:
    """A whole message or a control frame."""

    opcode: int
    payload: bytes


def accept_key(key: str) -> str:
    """Return ``Sec-WebSocket-Accept`` for a ``Sec-WebSocket-Key`` (section 4.2.2)."""
    return base64.b64encode(hashlib.sha1(key.encode() + _GUID, usedforsecurity=False).digest()).decode()


def encode(opcode: int, payload: bytes) -> bytes:
    """Return one unmasked, final frame (section 5.2)."""
    size = len(payload)
    if size < 126:
        return bytes((0x80 | opcode, size)) + payload
    if size < 65536:
        return bytes((0x80 | opcode, 126)) + size.to_bytes(2, "big") + payload
    return bytes((0x80 | opcode, 127)) + size.to_bytes(8, "big") + payload


def close_frame(code: int, reason: str = "") -> bytes:
    """Return a close frame; the reason is cut to what fits (section 5.5.1)."""
    return encode(CLOSE, code.to_bytes(2, "big") + reason.encode()[:120])


class Decoder:
    """Turns a client's bytes into messages.

    :param limit: the longest message in bytes.
    """

    def __init__(self, limit: int = 1 << 20) -> None:
        self._limit = limit
        self._buffer = bytearray()
        self._opcode = CONTINUATION
        self._parts = bytearray()

    def feed(self, data: bytes) -> Iterator[Message]:
        """Yield what is complete.

        :raises ProtocolError: the connection must be closed with its code.
        """
        self._buffer += data
        while (frame := self._frame()) is not None:
            final, opcode, payload = frame
            if opcode >= CLOSE:
                yield Message(opcode, payload)
                continue
            if (opcode == CONTINUATION) == (self._opcode == CONTINUATION):
                raise ProtocolError(1002, "fragments out of order")
            if opcode != CONTINUATION:
                self._opcode = opcode
            self._parts += payload
            if len(self._parts) > self._limit:
                raise ProtocolError(1009, "message too big")
            if final:
                message, opcode = bytes(self._parts), self._opcode
                self._parts.clear()
                self._opcode = CONTINUATION
                if opcode == TEXT:
                    try:
                        message.decode()
                    except UnicodeDecodeError as error:
                        raise ProtocolError(1007, "text is not UTF-8") from error
                yield Message(opcode, message)

    def _frame(self) -> tuple[bool, int, bytes] | None:
        buffer = self._buffer
        if len(buffer) < 2:
            return None
        final, opcode, size = bool(buffer[0] & 0x80), buffer[0] & 0x0F, buffer[1] & 0x7F
        if buffer[0] & 0x70 or opcode not in {CONTINUATION, TEXT, BINARY, CLOSE, PING, PONG}:
            raise ProtocolError(1002, "unknown frame")
        if not buffer[1] & 0x80:
            raise ProtocolError(1002, "frame of a client is not masked")
        if opcode >= CLOSE and (size > 125 or not final):
            raise ProtocolError(1002, "bad control frame")
        at = 2
        if size >= 126:
            width = 2 if size == 126 else 8
            if len(buffer) < at + width:
                return None
            size = int.from_bytes(buffer[at : at + width], "big")
            at += width
        if size > self._limit:
            raise ProtocolError(1009, "message too big")
        if len(buffer) < at + 4 + size:
            return None
        mask, masked = buffer[at : at + 4], buffer[at + 4 : at + 4 + size]
        del buffer[: at + 4 + size]
        key = (bytes(mask) * (size // 4 + 1))[:size]
        return final, opcode, (int.from_bytes(masked, "big") ^ int.from_bytes(key, "big")).to_bytes(size, "big")
