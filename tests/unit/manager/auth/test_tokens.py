"""API tokens begin, are used, and end: by time, by revocation, with their user."""

from __future__ import annotations

import re

import pytest
import structlog

from dispatcher.common.api_tokens import SCOPES, SIZE, allows
from dispatcher.manager.auth import tokens as module
from dispatcher.manager.auth.sessions import digest
from dispatcher.manager.auth.tokens import MAX_PER_OWNER, ApiTokens, lifetime, public_id
from dispatcher.manager.storage.database import Database
from dispatcher.manager.storage.tokens import TokenStore
from dispatcher.plugin.errors import BadRequest, Conflict, NotFound, Unavailable
from tests.support.manager_parts import Clock

DAY = 86400.0


class World:
    def __init__(self, directory):
        self.clock = Clock(1_800_000_000.0)
        self.database = Database(f"sqlite:///{directory}/x.db")
        self.database.open()
        self.store = TokenStore(self.database)
        self.changed, self.gone = [], []
        self.users = {"alice": 1, "bob": 2}
        self.tokens = self.restarted()

    def restarted(self):
        tokens = ApiTokens(self.store, self.clock, self.users.get)
        tokens.load()
        tokens.subscribe(lambda changed, gone: (self.changed.extend(changed), self.gone.extend(gone)))
        return tokens

    def create(self, user="alice", scopes=("app",), seconds=DAY, **more):
        return self.tokens.create(user=user, scopes=scopes, seconds=seconds, **more)


@pytest.fixture
def world(tmp_path):
    world = World(tmp_path)
    yield world
    world.database.close()


def test_a_token_is_recognisable_and_only_its_hash_is_kept(world, tmp_path):
    token, row = world.create(note="export")
    assert re.fullmatch(r"dsp_[A-Za-z0-9_-]{43}", token) and len(token) == SIZE
    assert row.sha256 == digest(token)
    assert world.tokens.find(token) == row
    world.database.close()
    stored = b"".join(path.read_bytes() for path in tmp_path.iterdir())
    assert row.sha256.encode() in stored
    assert token.encode() not in stored and token[4:].encode() not in stored
    assert world.changed == [row.sha256]


def test_what_is_logged_of_a_token_is_its_id(world):
    with structlog.testing.capture_logs() as lines:
        token, row = world.create(scopes=["admin"])
        module.authorize(row, "admin", "POST", "/reload")
        module.authorize(row, "read", "GET", "/agents")
        world.tokens.revoke(row.sha256)
    assert [line["event"] for line in lines] == [
        "API token created",
        "request with an API token",
        "API token ended",
    ]
    assert {line["id"] for line in lines} == {public_id(row)}
    assert {line["owner"] for line in lines} == {"user alice"}
    assert lines[1]["path"] == "/reload"
    assert token not in repr(lines) and row.sha256 not in repr(lines)


def test_a_token_and_its_last_use_survive_a_restart(world):
    token, row = world.create(scopes=["read", "app"], note="n", seconds=None)
    world.clock.time += 5
    world.tokens.touch([row.sha256, "0" * 64])
    world.tokens.flush()
    again = world.restarted().find(token)
    assert again.scopes == ("read", "app") and again.note == "n" and again.expires is None
    assert again.last_used == world.clock.time


def test_it_expires(world):
    token, row = world.create(seconds=60.0)
    assert world.tokens.ttl(row) == 60.0
    world.clock.time += 59.9
    assert world.tokens.find(token)
    world.clock.time += 0.1
    assert world.tokens.find(token) is None and world.tokens.all() == []
    assert world.gone == []
    world.tokens.end_expired()
    assert world.gone == [row.sha256]
    assert world.store.all() == []


def test_revocation_takes_effect_at_once_and_while_the_database_cannot_be_written(world, monkeypatch):
    token, row = world.create()
    kept, _ = world.create()

    def broken(_sha256s):
        raise Unavailable("The database cannot be used now")

    with monkeypatch.context() as patch:
        patch.setattr(world.store, "remove", broken)
        world.tokens.revoke(row.sha256)
        world.tokens.revoke(row.sha256)
    assert world.tokens.find(token) is None and world.tokens.find(kept)
    assert world.gone == [row.sha256]
    assert len(world.store.all()) == 2
    world.tokens.flush()
    assert [row.sha256 for row in world.store.all()] == [digest(kept)]


def test_a_removed_user_has_no_tokens_and_neither_has_the_next_one_of_that_name(world):
    token, row = world.create()
    bobs, _ = world.create("bob")
    world.users["alice"] = 3
    assert world.tokens.find(token) is None and world.tokens.all("alice") == []
    with pytest.raises(NotFound):
        world.tokens.by_id(public_id(row))
    assert world.restarted().find(token) is None
    assert [row.sha256 for row in world.store.all()] == [digest(bobs)]


def test_revoke_user_leaves_others_and_services(world):
    mine = [world.create()[0] for _ in range(2)]
    others = [world.create("bob")[0], world.create(None, ["read"], service="alice")[0]]
    assert world.tokens.revoke_user("alice") == 2
    assert [world.tokens.find(token) for token in mine] == [None, None]
    assert all(world.tokens.find(token) for token in others)


def test_an_owner_has_a_limited_number(world):
    for _ in range(MAX_PER_OWNER):
        world.create()
    with pytest.raises(Conflict, match="alice has 50 tokens"):
        world.create()
    world.create("bob")
    world.tokens.revoke(world.tokens.all("alice")[0].sha256)
    world.create()


@pytest.mark.parametrize(
    ("options", "error", "text"),
    [
        ({}, BadRequest, "one owner"),
        ({"user": "alice", "service": "x"}, BadRequest, "both"),
        ({"user": "nobody"}, NotFound, "no user nobody"),
        ({"user": "alice", "scopes": []}, BadRequest, "metrics: .* read: .* admin: .* app: "),
        ({"user": "alice", "scopes": ["raed"]}, BadRequest, "did you mean 'read'"),
        ({"service": "x", "scopes": ["read", "app"]}, BadRequest, "has no agents"),
    ],
)
def test_what_cannot_be_created(world, options, error, text):
    with pytest.raises(error) as caught:
        world.tokens.create(**{"scopes": ["read"], "seconds": None} | options)
    assert re.search(text, str(caught.value))
    assert world.tokens.count() == 0


def test_scopes_include_each_other():
    granted = {scope: {needed for needed in SCOPES if allows((scope,), needed)} for scope in SCOPES}
    assert granted == {
        "metrics": {"metrics"},
        "read": {"metrics", "read"},
        "admin": {"metrics", "read", "admin"},
        "app": {"app"},
    }


@pytest.mark.parametrize(
    ("text", "seconds"),
    [
        ("never", None),
        ("90d", 90 * DAY),
        (" 1h30m ", 5400.0),
        ("2027-01-16", 1_800_057_600 - 1_800_000_000),
        ("2027-01-15T09:00:00Z", 3600.0),
        ("2027-01-15T10:00:00+01:00", 3600.0),
    ],
)
def test_expiry(text, seconds):
    assert lifetime(text, 1_800_000_000.0) == seconds


@pytest.mark.parametrize(
    "text", ["", "soon", "-5d", "Never", "0s", "59s", "2020-01-01", "99999d", "9" * 39 + "d", "x" * 40]
)
def test_expiries_that_are_none(text):
    with pytest.raises(BadRequest, match="The expiry .*90d"):
        lifetime(text, 1_800_000_000.0)


def test_a_clock_that_was_ahead_prolongs_no_token(world):
    world.clock.time += 1000 * DAY
    token, _ = world.create(seconds=DAY)
    world.tokens.touch([digest(token)])
    world.tokens.flush()
    world.clock.time -= 1000 * DAY
    world.store.pull_back(world.clock.now())
    tokens = world.restarted()
    assert tokens.ttl(tokens.find(token)) == DAY
    world.clock.time += DAY
    assert tokens.find(token) is None
