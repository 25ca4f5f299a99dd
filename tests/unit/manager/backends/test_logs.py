"""Output is followed without losing or doubling a line."""

from types import SimpleNamespace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dispatcher.plugin.errors import BadRequest
from dispatcher.manager.backends import logs as module
from dispatcher.manager.backends.logs import Follower, Seam, Tails, _cursor, _parse, _place
from dispatcher.plugin.model import Handle


def joined(known, stream):
    seam = Seam(known)
    return [line for part in stream for line in seam.new(part)]


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


def test_a_follower_numbers_lines_and_forgets_old_ones(monkeypatch):
    monkeypatch.setattr(module, "HELD", 10 * 66)
    follower = Follower(["a", "b"])
    assert follower.since(0) == (["a", "b"], 2)
    assert follower.since(1) == (["b"], 2)
    assert follower.since(2) == ([], 2)
    for number in range(30):
        follower.add(f"{number:02}")
    lines, end = follower.since(0)
    assert end == 32
    assert lines[-1] == "29"
    assert len(lines) <= 10
    assert follower.last(2) == ["28", "29"]


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


class Guard:
    def __init__(self, lines):
        self.lines = lines

    def logs(self, _handle, *, tail, follow, deadline):
        yield from self.lines[-tail:] if tail else ()
        seen = len(self.lines)
        while follow and not deadline.expired:
            yield from self.lines[seen:]
            seen = len(self.lines)
            import time

            time.sleep(0.005)


class Backend:
    def __init__(self, lines):
        from dispatcher.manager.backends.pool import Pool

        self.guard = Guard(lines)
        self.pool = Pool("test-tail", 2)

    def ask(self, call, _seconds):
        return call()


@pytest.fixture
def following():
    lines = [b"one", b"two", b"\xff three"]
    backend = Backend(lines)
    handle = Handle(provider="fake", agent="alice", name="x")
    agent = SimpleNamespace(handle=handle, row=SimpleNamespace(name="alice", provider="fake"), gone=False)
    engine = SimpleNamespace(backends={"fake": backend})
    yield lines, agent, Tails(engine)
    agent.gone = True
    backend.pool.close()


def test_the_last_lines(following):
    lines, agent, tails = following
    assert tails.lines(agent, tail=2, after=None)[0] == ["two", "\ufffd three"]
    assert tails.lines(agent, tail=0, after=None)[0] == []
    agent.handle = None
    assert tails.lines(agent, tail=5, after=None)[0] == []


def test_following_gives_every_new_line_once(following):
    lines, agent, tails = following
    got, cursor = tails.lines(agent, tail=10, after=None)
    lines.append(b"before the follower")
    seen = []
    for number in range(40):
        lines.append(f"line {number % 3}".encode())  # lines that repeat, too
        new, cursor = tails.lines(agent, tail=10, after=cursor)
        seen += new
    import time

    end = time.monotonic() + 5
    while len(seen) < 41 and time.monotonic() < end:
        new, cursor = tails.lines(agent, tail=10, after=cursor)
        seen += new
        time.sleep(0.01)
    assert seen == ["before the follower"] + [f"line {number % 3}" for number in range(40)]
    assert tails.lines(agent, tail=10, after=cursor)[0] == []
    tails._followers["alice"].deadline.at = 0


def test_a_cursor_of_a_manager_before_still_finds_its_place(following):
    lines, agent, tails = following
    _, cursor = tails.lines(agent, tail=10, after=None)
    _, cursor = tails.lines(agent, tail=10, after=cursor)
    tails._followers["alice"].deadline.at = 0
    fresh = Tails(tails._engine)
    lines.append(b"four")
    assert fresh.lines(agent, tail=10, after=cursor)[0] == ["four"]
    fresh._followers["alice"].deadline.at = 0
