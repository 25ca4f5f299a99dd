"""`/openapi.json` names every request there is, and none that there is not; so does docs/reference/rest.md."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from dispatcher.manager.rest import openapi
from dispatcher.manager.rest.application import ROLES
from tests.support.manager_parts import Parts

DOCS = Path(__file__).parents[4] / "docs/reference/rest.md"
METHODS = {"get", "put", "post", "delete"}


@pytest.fixture
def parts(tmp_path):
    parts = Parts(tmp_path)
    yield parts
    parts.close()


def rules(app):
    return {
        (method.lower(), re.sub(r"<(\w+)>", r"{\1}", rule.rule))
        for rule in app.url_map.iter_rules()
        for method in rule.methods - {"HEAD", "OPTIONS"}
    }


@pytest.mark.parametrize("role", ROLES)
def test_described_is_what_there_is(parts, role):
    client = getattr(parts, role)
    document = client.get("/openapi.json").json
    described = {
        (method, path)
        for path, operations in document["paths"].items()
        for method in operations
        if method in METHODS
    }
    assert described == rules(client.application)
    assert document["openapi"].startswith("3.")


@pytest.mark.parametrize("role", ROLES)
def test_every_request_says_what_it_does_and_answers(role):
    document = json.loads(json.dumps(openapi.document(role, ROLES[role])))
    names = set(document["components"]["schemas"])
    for path, operations in document["paths"].items():
        for method, operation in operations.items():
            assert operation["summary"], (method, path)
            assert operation["responses"], (method, path)
            assert operation.get("x-scope") in ({"metrics", "read", "admin"} if role == "admin" else {None})
            parameters = {p["name"] for p in operation.get("parameters", []) if p["in"] == "path"}
            assert parameters == set(re.findall(r"{(\w+)}", path))
            body = operation.get("requestBody")
            if body:
                assert body["content"]["application/json"]["schema"]["additionalProperties"] is False
    referred = set(re.findall(r"#/components/schemas/(\w+)", json.dumps(document)))
    assert referred <= names


def test_an_answer_that_is_not_described_is_noticed(parts):
    """`Parts` holds every answer of a handler against its description, in all tests of this folder."""
    parts.add("alice")
    parts.supervisor.runtime = lambda _agent: {"provider": "fake"}
    assert parts.admin.get("/agents/alice/runtime").status_code == 500


@pytest.mark.parametrize("role", ROLES)
def test_members_are_described(parts, role):
    schemas = getattr(parts, role).get("/openapi.json").json["components"]["schemas"]
    assert set(schemas["Problem"]["properties"]) == {"type", "title", "status", "detail", "fix", "code"}
    agent = schemas["Agent"]
    assert set(agent["properties"]) == set(agent["required"]) == set(parts.add("alice").json)
    assert agent["properties"]["created"] == {"type": "string", "format": "date-time"}
    assert "running" in schemas["State"]["enum"]


@pytest.mark.parametrize("role", ROLES)
def test_the_reference_names_every_request(role):
    section = DOCS.read_text().split(f"## {role.title()}\n")[1].split("\n## ")[0]
    everywhere = DOCS.read_text()
    documented = set(re.findall(r"`(GET|PUT|POST|DELETE) (/[^\s`?]*)", section))
    plain = {(method, path.replace("NAME", "_").replace("ID", "_")) for method, path in documented}
    there = {(route.method, re.sub(r"<\w+>", "_", route.path)) for route in ROLES[role]}
    common = {("GET", "/healthz"), ("GET", "/metrics"), ("GET", "/openapi.json")}
    assert plain == there - common
    for _, path in common:
        assert path in everywhere
