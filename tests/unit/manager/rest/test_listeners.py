"""Who may use which listener, decided without a connection."""

from __future__ import annotations

import json
import os

import pytest

from dispatcher.config.host_users import HostAccounts
from dispatcher.plugin.errors import ConfigError
from dispatcher.manager.rest.listeners import (
    CredentialGuard,
    PeerGuard,
    Tokens,
    may_administer,
    may_proxy,
    tcp_socket,
    unix_socket,
)

ME = os.geteuid()
ACCOUNTS = HostAccounts(proxy_uid=5001, proxy_gid=5002, admin_gid=5003, agent_uids=(6000, 7000), made_up=False)


def test_who_may_administer():
    assert may_administer(ACCOUNTS, 0, 0)
    assert may_administer(ACCOUNTS, ME, 1)
    assert may_administer(ACCOUNTS, 4000, 5003)
    assert not may_administer(ACCOUNTS, 4000, 4000)
    assert not may_administer(ACCOUNTS, 5001, 5002)
    assert not may_administer(ACCOUNTS, 6000, 6000)


def test_members_of_the_group_by_the_hosts_database(monkeypatch):
    import pwd

    monkeypatch.setattr(pwd, "getpwuid", lambda _uid: pwd.struct_passwd(("ada", "x", 4000, 4000, "", "/", "/")))
    monkeypatch.setattr(os, "getgrouplist", lambda name, gid: [gid, 5003] if name == "ada" else [gid])
    assert may_administer(ACCOUNTS, 4000, 4000)


def test_without_the_group_only_root_and_the_own_user():
    nobody = HostAccounts(proxy_uid=5001, proxy_gid=5002, admin_gid=None, agent_uids=None, made_up=False)
    assert may_administer(nobody, 0, 0)
    assert not may_administer(nobody, 4000, 5003)


def test_who_may_be_the_proxy():
    assert may_proxy(ACCOUNTS, 5001, 1)
    assert may_proxy(ACCOUNTS, 0, 0)
    assert not may_proxy(ACCOUNTS, 4000, 5002)
    assert not may_proxy(ACCOUNTS, 6000, 6000)


def call(guard, **environ):
    status = []
    body = b"".join(
        guard(
            {"PATH_INFO": "/agents", "REQUEST_METHOD": "GET", **environ},
            lambda line, headers: status.append((line, dict(headers))),
        )
    )
    return status[0][0].partition(" ")[0], status[0][1], body


def app(_environ, start_response):
    start_response("200 OK", [])
    return [b"inside"]


def test_peers():
    guard = PeerGuard(app, lambda uid, gid: (uid, gid) == (7, 8))
    assert call(guard, X_REMOTE_UID="7", X_REMOTE_GID="8")[2] == b"inside"
    for environ in (
        {},
        {"X_REMOTE_UID": "8", "X_REMOTE_GID": "8"},
        {"HTTP_X_REMOTE_UID": "7", "HTTP_X_REMOTE_GID": "8"},
    ):
        status, headers, body = call(guard, **environ)
        assert status == "403"
        assert headers["Content-Type"] == "application/problem+json"
        assert json.loads(body)["status"] == 403


@pytest.fixture
def tokens(tmp_path):
    path = tmp_path / "tokens"
    path.write_text("# comment\nfirst-token-of-twenty-characters # mine\n\nsecond-token-of-twenty-characters\n")
    path.chmod(0o600)
    return Tokens(path)


@pytest.mark.parametrize(
    ("header", "known"),
    [
        ("Bearer first-token-of-twenty-characters", True),
        ("bearer  second-token-of-twenty-characters ", True),
        ("Basic first-token-of-twenty-characters", False),
        ("first-token-of-twenty-characters", False),
        ("Bearer first-token-of-twenty-character", False),
        ("Bearer # comment", False),
        ("Bearer", False),
        ("", False),
        ("Bearer \udcff", False),
    ],
)
def test_tokens(tokens, header, known):
    assert tokens.known(header) is known


def test_no_file_knows_no_token():
    assert not Tokens(None).known("Bearer ")
    assert not Tokens(None).known("")


def test_credentials(tokens):
    guard = CredentialGuard(app, tokens, lambda: "degraded")
    assert call(guard, HTTP_AUTHORIZATION="Bearer first-token-of-twenty-characters")[2] == b"inside"
    assert call(guard, **{"dispatcher.certified": True})[2] == b"inside"
    status, headers, body = call(guard)
    assert (status, headers["WWW-Authenticate"]) == ("401", "Bearer")
    assert json.loads(body)["fix"]
    assert call(guard, PATH_INFO="/healthz")[2] == b'{"status": "degraded"}'
    assert call(guard, PATH_INFO="/healthz", REQUEST_METHOD="HEAD")[2] == b""
    assert call(guard, PATH_INFO="/healthz", REQUEST_METHOD="POST")[0] == "401"
    assert call(guard, PATH_INFO="/healthz/../agents")[0] == "401"
    assert call(guard, **{"HTTP_DISPATCHER.CERTIFIED": True})[0] == "401"


@pytest.mark.parametrize(
    "address", ["", "nonsense", "127.0.0.1", ":4443", "127.0.0.1:x", "127.0.0.1:65536", "[::1]", "::1:4443"]
)
def test_addresses_that_are_none(address):
    with pytest.raises(ConfigError) as caught:
        tcp_socket(address)
    assert "manager.listen" in str(caught.value) + caught.value.fix


def test_a_socket_that_is_left_over_is_replaced_and_a_file_is_not(tmp_path, short_tmp):
    path = short_tmp / "s"
    unix_socket(path, None).close()
    assert path.is_socket()
    unix_socket(path, os.getegid()).close()
    path.unlink()
    path.write_text("precious")
    with pytest.raises(ConfigError):
        unix_socket(path, None)
    assert path.read_text() == "precious"
