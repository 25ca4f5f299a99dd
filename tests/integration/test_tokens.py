"""API tokens over a whole installation: made by the command line, used by a program, ended by all that ends them."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

from tests.support.cases_site import Site, ended, frame
from tests.support.installation import until

pytestmark = [pytest.mark.root, pytest.mark.bubblewrap]


@pytest.fixture(scope="module")
def site():
    with Site(proxy='access_log = "{base}/access.log"') as site:
        yield site


def cli(site, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "dispatcher", "--config", str(site.config), *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=60, check=True)


def create(site, *arguments: str) -> str:
    return cli(site, "tokens", "create", *arguments).stdout.strip()


def get(site, token: str, path: str = "/"):
    return site.web("GET", path, Authorization=f"Bearer {token}")


def opens(site, token: str) -> bool:
    return get(site, token).status == 200


def test_the_life_of_a_token(site):
    site.add("alice")
    token = create(site, "--user", "alice", "--scope", "app", "--note", "export")
    until("a sleeping app is woken", lambda: opens(site, token))
    assert site.state("alice")["state"] == "running"

    sock, head = site.upgrade("/ws", "", f"Authorization: Bearer {token}")
    assert head.startswith(b"HTTP/1.1 101 "), head
    sock.sendall(frame(b"hello"))

    def used():
        (row,) = json.loads(cli(site, "--json", "tokens", "list", "--user", "alice").stdout)["tokens"]
        return row if row["last_used"] else None

    row = until("its use is shown", used)
    assert row["note"] == "export" and row["scopes"] == ["app"]

    site.kill("manager")
    site.start("manager")
    assert opens(site, token)

    revoked = cli(site, "tokens", "revoke", row["id"])
    assert revoked.stdout == "1 token revoked\n"
    ended(sock, 2)
    sock.close()
    answer = get(site, token)
    assert answer.status == 401 and answer.json()["code"] == "invalid-token"
    for name in ("manager", "proxy"):
        assert token not in site.log(name) and token[4:20] not in site.log(name)
    access = (site.base / "access.log").read_text()
    assert row["id"] in access and token not in access
    assert row["id"] in site.log("manager")


def test_a_session_that_is_revoked_leaves_tokens_and_says_so(site):
    site.add("bob")
    token = create(site, "--user", "bob", "--scope", "app")
    until("the app answers", lambda: opens(site, token))
    site.login("bob")
    said = cli(site, "sessions", "revoke", "--user", "bob")
    assert "bob has one API token, which stays valid" in said.stderr
    assert opens(site, token)
    assert cli(site, "tokens", "revoke", "--user", "bob").stdout == "1 token revoked\n"
    assert get(site, token).status == 401


def test_a_removed_users_token_is_not_valid_for_the_next_user_of_that_name(site):
    site.add("carol")
    token = create(site, "--user", "carol", "--scope", "app", "--expires", "never")
    until("the app answers", lambda: opens(site, token))
    assert site.admin("DELETE", "/agents/carol?wait=30").status == 204
    assert get(site, token).status == 401
    site.add("carol")
    assert get(site, token).status == 401
    assert json.loads(cli(site, "--json", "tokens", "list", "--user", "carol").stdout)["tokens"] == []


def test_a_user_without_an_agent_of_the_own_name_reaches_the_oldest_and_after_its_removal_the_next(site):
    site.add("dave:web", "web")
    token = create(site, "--user", "dave", "--scope", "app")
    until("the app answers", lambda: opens(site, token))
    site.admin("POST", "/agents", {"name": "dave", "app": "web"})
    until("the default agent answers", lambda: opens(site, token) and site.state("dave")["state"] == "running")
    assert site.admin("DELETE", "/agents/dave?wait=30").status == 204
    until("the other one answers", lambda: opens(site, token))
