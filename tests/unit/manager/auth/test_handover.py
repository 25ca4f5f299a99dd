"""Hand-over codes: once, within 30 seconds, on one host, in one browser."""

from __future__ import annotations

import pytest

from dispatcher.plugin.errors import Forbidden
from dispatcher.manager.auth.handover import LIFETIME, MAX_CODES, HandoverCodes
from dispatcher.manager.auth.sessions import digest

HOST = "alice-abc.example.org"


@pytest.fixture
def codes():
    return HandoverCodes()


def issue(codes, now=0.0, user="alice"):
    return codes.issue(user, "parent", "alice", HOST, digest("nonce"), now)


def test_it_works_once(codes):
    code = issue(codes)
    found = codes.redeem(code, "nonce", HOST, 1.0)
    assert (found.parent, found.agent, found.host) == ("parent", "alice", HOST)
    with pytest.raises(Forbidden):
        codes.redeem(code, "nonce", HOST, 1.0)


@pytest.mark.parametrize(
    ("nonce", "host", "now"),
    [("other", HOST, 1.0), ("nonce", "evil.example.org", 1.0), ("nonce", HOST, LIFETIME + 0.1)],
    ids=["another browser", "another host", "too late"],
)
def test_whatever_is_wrong_uses_it_up_and_looks_alike(codes, nonce, host, now):
    code = issue(codes)
    with pytest.raises(Forbidden) as caught:
        codes.redeem(code, nonce, host, now)
    with pytest.raises(Forbidden) as unknown:
        codes.redeem("x" * 43, "nonce", HOST, 1.0)
    assert str(caught.value) == str(unknown.value)
    with pytest.raises(Forbidden):
        codes.redeem(code, "nonce", HOST, 1.0)


def test_a_user_has_few_codes_and_pushes_out_nobody_elses(codes):
    theirs = issue(codes, user="bob")
    old, *others = [issue(codes) for _ in range(MAX_CODES + 1)]
    with pytest.raises(Forbidden):
        codes.redeem(old, "nonce", HOST, 1.0)
    for code in [theirs, *others]:
        assert codes.redeem(code, "nonce", HOST, 1.0).parent == "parent"
