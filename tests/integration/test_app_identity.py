"""An app learns who its user is from a signed statement, and verifies it with the keys at the portal."""

from __future__ import annotations

import pytest

from tests.support.installation import Installation, until
from tests.unit.manager.auth.test_app_identity import verified

pytestmark = pytest.mark.bubblewrap

COMMAND = 'command = ["{python}", "{app}", "{{socket}}"]\nread_only = ["{app}"]\n'
APPS = f"""[apps.web]
identity = true
[apps.web.subprocess]
{COMMAND}
[apps.other.subprocess]
{COMMAND}
[groups.staff]
members = ["alice"]
"""


def fields(site, cookie, **headers):
    answer = site.web("GET", "/", Cookie=cookie, Accept="*/*", **headers)
    assert answer.status == 200
    return [value for name, value in answer.json()["headers"] if name.lower() == "x-dispatcher-identity"]


def test_each_request_has_one_statement_about_its_user(short_tmp):
    with Installation(
        short_tmp, APPS, extra='default_app = "web"', proxy='public_url = "http://127.0.0.1:{port}"'
    ) as site:
        site.start("manager")
        site.start("proxy")
        site.add("alice")
        site.add("bob", "other")
        alice, bob = site.login("alice"), site.login("bob")
        site.app(alice)
        site.app(bob)
        keys = site.web("GET", "/auth/jwks.json").json()
        [statement] = until("the statement is there", lambda: fields(site, alice, X_Dispatcher_Identity="forged"))
        claims = verified(statement, keys)
        assert (claims["sub"], claims["aud"], claims["groups"]) == ("alice", "web", ["staff"])
        assert claims["iss"] == f"http://127.0.0.1:{site.port}/auth"
        assert fields(site, bob, X_Dispatcher_Identity="forged") == [], "an app that did not ask gets none"
        site.kill("manager")
        site.start("manager")
        assert site.web("GET", "/auth/jwks.json").json() == keys
