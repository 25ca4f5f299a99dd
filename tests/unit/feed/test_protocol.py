"""The feed's framing: any split, any order of sizes, and refusal of what is no frame."""

from __future__ import annotations

import struct

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dispatcher.feed.protocol import MAX_FRAME, Decoder, FrameError, encode

MESSAGES = [
    {"type": "hello", "version": 1, "pid": 7},
    {"type": "ping"},
    {"type": "change", "agents": [{"name": "älice", "detail": "\u2028\x00\ud800"}]},
    {"type": "wake", "agent": "x" * 70000},
]


def test_every_split_gives_the_same_messages():
    stream = b"".join(encode(message) for message in MESSAGES[:3])
    for cut in range(len(stream) + 1):
        decoder = Decoder()
        first, second = decoder.feed(stream[:cut]), decoder.feed(stream[cut:])
        assert [message["type"] for message in first + second] == ["hello", "ping", "change"]
        assert (first + second)[2]["agents"][0] == {"name": "älice", "detail": "\u2028\x00?"}


@settings(max_examples=60, deadline=None)
@given(
    messages=st.lists(st.dictionaries(st.text(max_size=5), st.integers() | st.text(max_size=30)), max_size=8),
    cuts=st.lists(st.integers(0, 400), max_size=12),
)
def test_random_pieces(messages, cuts):
    sent = [{**message, "type": "t"} for message in messages]
    stream = b"".join(encode(message) for message in sent)
    decoder, got, last = Decoder(), [], 0
    for cut in sorted(cuts):
        got += decoder.feed(stream[last:cut])
        last = max(last, min(cut, len(stream)))
    got += decoder.feed(stream[last:])
    assert got == sent


def test_one_byte_at_a_time():
    stream = b"".join(encode(message) for message in MESSAGES[:2]) + encode(MESSAGES[3])
    decoder = Decoder()
    got = [message for index in range(len(stream)) for message in decoder.feed(stream[index : index + 1])]
    assert got == [*MESSAGES[:2], MESSAGES[3]]


@pytest.mark.parametrize(
    "body",
    [b"", b"[]", b"null", b"{}", b'{"type": 1}', b"{", b'{"type":"\xff"}', b"[" * 100000],
    ids=["empty", "list", "null", "no-type", "type-number", "cut", "no-utf8", "deep"],
)
def test_what_is_no_message_is_refused(body):
    with pytest.raises(FrameError):
        Decoder().feed(struct.pack(">I", len(body)) + body)


def test_too_long_is_refused_before_it_is_kept():
    with pytest.raises(FrameError):
        Decoder().feed(struct.pack(">I", MAX_FRAME + 1))
    with pytest.raises(FrameError):
        Decoder(limit=100).feed(struct.pack(">I", 101))
    with pytest.raises(FrameError):
        encode({"type": "x", "text": "y" * MAX_FRAME})
