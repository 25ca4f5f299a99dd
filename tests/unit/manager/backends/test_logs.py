"""Output is followed without losing or doubling a line."""

import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dispatcher.plugin.errors import BadRequest
from dispatcher.manager.backends.logs import LogJoiner
from dispatcher.manager.backends.logs import LogStream
from dispatcher.manager.backends.logs import LogCollector, _cursor, _parse, _place
from dispatcher.plugin.model import Handle


def joined(known, stream):
    joiner = LogJoiner(known)
    return [line for part in stream for line in joiner.new(part)]


@pytest.mark.parametrize(
    ("known", "stream", "new"),
    [
        ([], ["a", "b"], ["a", "b"]),
        (["a", "b"], ["a", "b", "c"], ["c"]),
        (["a", "b"], ["b", "c"], ["c"]),
        (["a", "b"], ["c", "d"], ["c", "d"]),
        (["a", "b"], ["a", "x"], ["a", "x"]),
        (["a", "b"], ["a", "b", "a", "b"], ["a", "b"]),
        (["x", "x", "x"], ["x", "x", "x", "y"], ["y"]),
        (["a"], [], []),
    ],
)
def test_a_stream_is_joined_to_what_is_known(known, stream, new):
    assert joined(known, stream) == new


@given(st.integers(0, 40), st.integers(0, 40), st.integers(1, 60))
def test_lines_that_differ_are_never_lost_or_doubled(before, after, overlap):
    known = [f"line {number}" for number in range(before)]
    everything = known + [f"line {number}" for number in range(before, before + after)]
    stream = known[max(0, before - overlap) :] + everything[before:]
    assert known + joined(known, stream) == everything


def test_a_stream_numbers_lines_and_drops_old_ones():
    stream = LogStream(["a", "b"], max_bytes=10 * 66)
    assert stream.since(0) == (["a", "b"], 2)
    assert stream.since(1) == (["b"], 2)
    assert stream.since(2) == ([], 2)
    for number in range(30):
        stream.add(f"{number:02}")
    lines, end = stream.since(0)
    assert end == 32
    assert lines[-1] == "29"
    assert len(lines) <= 10
    assert stream.last(2) == ["28", "29"]


def test_cursors():
    lines = [str(number) for number in range(20)]
    assert _parse(_cursor("7", 20, lines))[:3] == ("7", 20, 8)
    _, _, count, digest = _parse(_cursor("7", 20, lines))
    assert _place([*lines, "new"], count, digest) == 20
    assert _place(["other"], count, digest) == 0
    assert _place([], 0, "") == 0
    for bad in ("", "x", "1:2:3", "a:b:c:d", "1:1:1:1:1"):
        with pytest.raises(BadRequest):
            _parse(bad)


class ContainedProvider:
    def __init__(self, lines):
        self.lines = lines

    def logs(self, _handle, *, tail, follow, deadline):
        yield from self.lines[-tail:] if tail else ()
        seen = len(self.lines)
        while follow and not deadline.expired:
            yield from self.lines[seen:]
            seen = len(self.lines)
            time.sleep(0.005)


class Backend:
    def __init__(self, lines):
        from dispatcher.manager.backends.pool import Pool

        self.provider = ContainedProvider(lines)
        self.pool = Pool("test-tail", 2)

    def call(self, work, _seconds):
        return work()


class Following:
    """One agent's log, requested as `logs -f` does."""

    def __init__(self, collector=None, backend=None):
        self.log = [b"one", b"two", b"\xff three"] if backend is None else backend.provider.lines
        self.backend = backend or Backend(self.log)
        self.collector = collector or LogCollector()
        self.exists = True

    def lines(self, tail, after):
        handle = Handle(provider="fake", agent="alice", name="x")
        return self.collector.lines(self.backend, handle, tail=tail, after=after, exists=lambda: self.exists)

    def end(self):
        self.collector.close()


@pytest.fixture
def following():
    made = Following()
    yield made
    made.exists = False
    made.backend.pool.close()


def test_the_last_lines(following):
    assert following.lines(2, None)[0] == ["two", "\ufffd three"]
    assert following.lines(0, None)[0] == []


def test_following_returns_every_new_line_once(following):
    _, cursor = following.lines(10, None)
    following.log.append(b"before the stream")
    seen = []
    for number in range(40):
        following.log.append(f"line {number % 3}".encode())  # lines that repeat, too
        new, cursor = following.lines(10, cursor)
        seen += new
    end = time.monotonic() + 5
    while len(seen) < 41 and time.monotonic() < end:
        new, cursor = following.lines(10, cursor)
        seen += new
        time.sleep(0.01)
    assert seen == ["before the stream"] + [f"line {number % 3}" for number in range(40)]
    assert following.lines(10, cursor)[0] == []


def test_a_cursor_of_an_earlier_manager_is_still_found(following):
    _, cursor = following.lines(10, None)
    _, cursor = following.lines(10, cursor)
    following.end()
    later = Following(LogCollector(), following.backend)
    following.log.append(b"four")
    assert later.lines(10, cursor)[0] == ["four"]
    later.end()
