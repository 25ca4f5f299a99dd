"""Who may use which listener, decided without a connection."""

from __future__ import annotations

import os

import pytest

from dispatcher.config.host_users import HostAccounts
from dispatcher.plugin.errors import ConfigError
from dispatcher.manager.rest.access import Tokens, credentials, may_administer, may_proxy, peers
from dispatcher.manager.rest.listeners import tcp_socket, unix_socket

from tests.support.manager_parts import Parts, described

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


@pytest.fixture
def parts(tmp_path):
    parts = Parts(tmp_path)
    yield parts
    parts.close()


def client(parts, admit, **environ):
    """A client of the role admin whose requests have these keys in their environment."""
    client = described("admin", parts.services, admit).test_client()
    client.environ_base |= environ
    return client


def test_peers(parts):
    admit = peers(lambda uid, gid: (uid, gid) == (7, 8))
    assert client(parts, admit, **{"dispatcher.peer": (7, 8)}).get("/agents").json == {"agents": []}
    for environ in (
        {},
        {"dispatcher.peer": (8, 8)},
        {"HTTP_DISPATCHER.PEER": (7, 8)},
    ):
        for path in ("/agents", "/healthz", "/nowhere"):
            answer = client(parts, admit, **environ).get(path)
            assert answer.status_code == 403
            assert answer.content_type == "application/problem+json"
            assert answer.json["status"] == 403


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


def test_credentials(parts, tokens):
    admit = credentials(tokens, parts.tokens, lambda: "degraded")
    known = {"Authorization": "Bearer first-token-of-twenty-characters"}
    anonymous = client(parts, admit)
    assert anonymous.get("/agents", headers=known).json == {"agents": []}
    assert client(parts, admit, **{"dispatcher.certified": True}).get("/agents").json == {"agents": []}
    refused = anonymous.get("/agents")
    assert (refused.status_code, refused.headers["WWW-Authenticate"]) == (401, "Bearer")
    assert refused.json["fix"]
    assert anonymous.get("/healthz").json == {"status": "degraded"}
    assert anonymous.head("/healthz").data == b""
    assert anonymous.post("/healthz").status_code == 401
    assert anonymous.get("/healthz/../agents").status_code == 401
    assert anonymous.get("/nowhere").status_code == 401
    assert client(parts, admit, **{"HTTP_DISPATCHER.CERTIFIED": True}).get("/agents").status_code == 401


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
