"""The feed's frames and constants, shared by the manager and the edge.  Pure: bytes in, messages out.

A frame is 4 bytes of length, big-endian, then that many bytes of a UTF-8 JSON object with a `type`
(docs/reference/feed.md).  Both sides ignore types and members that they do not know.
"""

from __future__ import annotations

import json
import struct
from typing import Any

VERSION = 1
MAX_FRAME = 16 * 1024 * 1024  # bytes of one frame's body
MAX_ROWS = 5000  # rows in one part of a snapshot, or in one change
PING_INTERVAL = 5.0  # seconds between the manager's pings
SILENCE = 15.0  # seconds without a frame after which the feed counts as lost
ACTIVITY_INTERVAL = 5.0  # seconds between a worker's reports

# Down, manager to worker.
HELLO = "hello"  # both ways
ERROR = "error"
SNAPSHOT = "snapshot"
CHANGE = "change"
SESSION = "session"
PING = "ping"
SYNC = "sync"
# Up, worker to manager.
LOOKUP = "lookup"
WAKE = "wake"
ACTIVITY = "activity"
DEAD = "dead"
COUNTERS = "counters"
SYNCED = "synced"

# States of an agent in the feed.
RUNNING = "running"
ASLEEP = "asleep"
STARTING = "starting"
STOPPING = "stopping"
FAILED = "failed"

Message = dict[str, Any]

_LENGTH = struct.Struct(">I")
_encode_json = json.JSONEncoder(ensure_ascii=False, separators=(",", ":"), check_circular=False).encode
_decode_json = json.JSONDecoder().decode


class FrameError(ValueError):
    """The other side sent an invalid frame; the connection must be closed."""


def encode(message: Message) -> bytes:
    """Return the frame of a message.

    :raises FrameError: its body would be longer than `MAX_FRAME`.
    """
    body = _encode_json(message).encode("utf-8", "replace")
    if len(body) > MAX_FRAME:
        raise FrameError(f"a frame of {len(body)} bytes is longer than {MAX_FRAME}")
    return _LENGTH.pack(len(body)) + body


class Decoder:
    """Cuts a stream of bytes, split anywhere, into messages.

    Never keeps more than one incomplete frame, and copies each byte at most twice however small the pieces.

    :param limit: longest body taken, in bytes; a worker's frames may be held to less than `MAX_FRAME`.
    """

    __slots__ = ("_buffer", "_limit", "_need")

    def __init__(self, limit: int = MAX_FRAME) -> None:
        self._buffer = bytearray()
        self._limit = limit
        self._need = _LENGTH.size

    def feed(self, data: bytes | bytearray | memoryview) -> list[Message]:
        """Take the next bytes and return the messages that they complete, in order.

        :raises FrameError: a body too long, no JSON object, or without a textual `type`.
        """
        buffer = self._buffer
        buffer += data
        if len(buffer) < self._need:
            return []
        messages: list[Message] = []
        start, end = 0, len(buffer)
        self._need = _LENGTH.size
        while end - start >= _LENGTH.size:
            (length,) = _LENGTH.unpack_from(buffer, start)
            if length > self._limit:
                raise FrameError(f"a frame of {length} bytes is longer than {self._limit}")
            stop = start + _LENGTH.size + length
            if stop > end:
                self._need = _LENGTH.size + length
                break
            messages.append(_parse(buffer[start + _LENGTH.size : stop]))
            start = stop
        if start:
            del buffer[:start]
        return messages


def _parse(body: bytearray) -> Message:
    try:
        message = _decode_json(body.decode("utf-8"))
    except (ValueError, RecursionError) as error:
        raise FrameError(f"a frame that is not JSON: {error}") from error
    if not isinstance(message, dict) or not isinstance(message.get("type"), str):
        raise FrameError("a frame that is not an object with a type")
    return message
