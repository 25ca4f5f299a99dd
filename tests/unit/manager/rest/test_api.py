"""The role *admin*: every request does what rest.md says, and refuses what it must."""

from __future__ import annotations

import json
import threading
import time

import pytest

from dispatcher.manager.rest import long_poll
from dispatcher.manager.rest.application import ROLES
from dispatcher.manager.rest.server import MAX_BODY
from tests.support.manager_parts import Parts

BOB = '{"name": "bob", "password": "xxxxxxxx"}'
PROBLEM = "application/problem+json"


@pytest.fixture
def parts(tmp_path):
    parts = Parts(tmp_path)
    parts.add("alice")
    yield parts
    parts.close()


@pytest.fixture
def slow(tmp_path):
    """Agents change state only when told."""
    parts = Parts(tmp_path, settle=False)
    parts.add("alice")
    yield parts
    parts.close()


def test_create_answers_with_the_agent_and_where_it_is(parts):
    answer = parts.add("Bob@Example.org")
    assert answer.status_code == 201
    assert answer.headers["Location"] == "/agents/bob%40example.org"
    assert answer.json["name"] == answer.json["user"] == "bob@example.org"
    assert answer.json["state"] == "stopped"
    assert parts.admin.get("/agents/BOB@example.org").json == answer.json


def test_a_further_agent_of_a_user_needs_no_password(parts):
    answer = parts.add("alice", password=None, app="lab")
    assert (answer.status_code, answer.json["name"], answer.json["user"]) == (201, "alice:lab", "alice")
    assert answer.headers["Location"] == "/agents/alice%3Alab"
    assert parts.admin.get("/agents/alice%3Alab").json["app"] == "lab"


def test_a_user_who_is_being_removed_is_not_said_to_exist(slow):
    slow.admin.delete("/agents/alice")
    answer = slow.add("alice")
    assert (answer.status_code, answer.json["title"]) == (409, "The agent alice is being removed")
    assert "again" in answer.json["fix"]


@pytest.mark.parametrize(
    ("body", "status", "words"),
    [
        ({"name": "alice"}, 409, "exists"),
        ({"name": "alice", "app": "lab", "password": "another one"}, 409, "leave the password out"),
        ({"name": "bob"}, 400, "no password"),
        ({"name": "bob"}, 400, '"missing":"password"'),
        ({"name": "bob", "app": "nope"}, 400, "no app"),
        ({"name": "alice", "app": "nope"}, 400, "no app"),
        ({"name": "bob", "password": "short"}, 400, "8 to 1024"),
        ({"name": "bob", "password": "x" * 1025}, 400, "password"),
        ({"name": "../etc", "password": "x" * 8}, 400, "Bad name"),
        ({"name": "bob", "password": "x" * 8, "app": "nope"}, 400, "no app"),
        (
            {"name": "bob", "password": "x" * 8, "admin": True},
            400,
            "admin: unknown, valid are: app, name, password",
        ),
        ({"nam": "bob", "password": "x" * 8}, 400, "nam: unknown, did you mean 'name'?"),
        ({"name": 7, "password": "x" * 8}, 400, "name: "),
        ({"password": "x" * 8}, 400, "name: is missing"),
        ({"name": "bob", "password": "\ud800" * 8}, 400, ""),
        ([], 400, "object"),
        (None, 400, "object"),
    ],
)
def test_create_refuses_and_makes_nothing(parts, body, status, words):
    answer = parts.admin.post("/agents", data=json.dumps(body), content_type="application/json")
    assert answer.status_code == status
    assert answer.content_type == PROBLEM
    assert words in answer.text
    assert "x" * 8 not in answer.text
    assert list(parts.supervisor.rows) == ["alice"]


def test_list_and_filter(parts):
    parts.add("bob")
    parts.supervisor.set_desired("bob", "running")
    assert [agent["name"] for agent in parts.admin.get("/agents").json["agents"]] == ["alice", "bob"]
    assert [agent["name"] for agent in parts.admin.get("/agents?state=running").json["agents"]] == ["bob"]
    assert parts.admin.get("/agents?state=asleep").status_code == 400


def test_state_now_and_later(slow):
    answer = slow.admin.put("/agents/alice/state", json={"state": "running"})
    assert answer.status_code == 202
    assert answer.json["desired"] == "running"
    assert set(answer.json) == {"state", "desired", "stage", "detail", "fraction", "since", "failure", "outdated"}
    threading.Timer(0.1, slow.supervisor.reach, ["alice"]).start()
    answer = slow.admin.put("/agents/alice/state?wait=10", json={"state": "running"})
    assert (answer.status_code, answer.json["state"]) == (200, "running")
    assert slow.admin.get("/agents/alice/state").json == answer.json


def test_waiting_ends_with_the_failure_as_a_problem(slow):
    threading.Timer(0.1, slow.supervisor.fail, ["alice"]).start()
    answer = slow.admin.put("/agents/alice/state?wait=10", json={"state": "running"})
    assert answer.status_code == 502
    assert answer.json["title"] == "The agent did not start"
    assert answer.json["code"] == "start-failed"
    assert answer.json["log"] == ["boom <b>"]


def test_waiting_ends_when_somebody_wants_something_else(slow):
    threading.Timer(0.1, slow.supervisor.set_desired, ["alice", "stopped"]).start()
    answer = slow.admin.put("/agents/alice/state?wait=10", json={"state": "running"})
    assert (answer.status_code, answer.json["code"]) == (409, "conflict")


def test_waiting_ends_when_the_state_stays_unknown(slow, monkeypatch):
    """The backend does not answer: the manager goes on, nobody waits for it without an end."""
    monkeypatch.setattr(long_poll, "UNKNOWN", 0.2)
    slow.supervisor.lose("alice")
    began = time.monotonic()
    answer = slow.admin.put("/agents/alice/state?wait=30", json={"state": "running"})
    assert (answer.status_code, answer.json["title"]) == (503, "The state of alice is unknown")
    assert "dispatcher why alice" in answer.json["fix"]
    assert time.monotonic() - began < 5


def test_waiting_ends_when_the_agent_is_removed(slow):
    threading.Timer(0.1, slow.supervisor.vanish, ["alice"]).start()
    answer = slow.admin.put("/agents/alice/state?wait=10", json={"state": "running"})
    assert answer.status_code == 404


def test_waiting_too_long_answers_with_the_state_now(slow):
    began = time.monotonic()
    answer = slow.admin.put("/agents/alice/state?wait=0.2", json={"state": "running"})
    assert answer.status_code == 202
    assert 0.2 <= time.monotonic() - began < 2


def test_only_so_many_wait_the_others_get_the_state_now(slow):
    answers = []

    def ask():
        answers.append(slow.admin.application.test_client().post("/agents/alice/restart?wait=10").status_code)

    waiting = [threading.Thread(target=ask) for _ in range(2)]
    for thread in waiting:
        thread.start()
    while slow.services.waiting._value:
        time.sleep(0.001)
    began = time.monotonic()
    assert slow.admin.post("/agents/alice/restart?wait=10").status_code == 202
    assert time.monotonic() - began < 1
    slow.supervisor.reach("alice")
    for thread in waiting:
        thread.join()
    assert answers == [200, 200]


def test_waiting_ends_when_the_manager_ends(slow):
    threading.Timer(0.1, slow.services.closing.set).start()
    began = time.monotonic()
    assert slow.admin.post("/agents/alice/restart?wait=60").status_code == 202
    assert time.monotonic() - began < 5


@pytest.mark.parametrize("wait", ["-1", "61", "nan", "inf", "x", ""])
def test_bad_waits_are_refused_and_nothing_begins(parts, wait):
    answer = parts.admin.put(f"/agents/alice/state?wait={wait}", json={"state": "running"})
    assert answer.status_code == 400
    assert "wait" in answer.json["detail"]
    assert parts.supervisor.calls == []


def test_a_capability_that_is_missing_is_422(parts):
    answer = parts.admin.put("/agents/alice/state", json={"state": "hibernated"})
    assert (answer.status_code, answer.json["code"]) == (422, "unsupported")


def test_delete_now_later_and_keeping_data(slow):
    answer = slow.admin.delete("/agents/alice?data=keep")
    assert (answer.status_code, answer.json["desired"], answer.json["state"]) == (202, "absent", "removing")
    assert ("remove", "alice", True) in slow.supervisor.calls
    threading.Timer(0.1, slow.supervisor.vanish, ["alice"]).start()
    answer = slow.admin.delete("/agents/alice?wait=10")
    assert (answer.status_code, answer.data) == (204, b"")
    assert slow.admin.get("/agents/alice").status_code == 404


def test_delete_of_the_last_agent_ends_the_sessions_at_once_and_lets_nobody_in(slow):
    slow.add("alice", None, app="lab")
    session = slow.login().json["session"]["sha256"]
    slow.admin.delete("/agents/alice%3Alab")
    assert slow.sessions.get(session)
    slow.admin.delete("/agents/alice")
    assert slow.sessions.get(session) is None
    assert slow.login().status_code == 403


def test_a_new_user_with_an_old_name_gets_no_old_sessions(parts):
    session = parts.login().json["session"]["sha256"]
    parts.supervisor.vanish("alice")  # without our being told in time
    parts.add("alice", "another password")
    assert parts.sessions.get(session) is None


def test_reset_and_restart(parts):
    assert parts.admin.put("/agents/alice/reset_data").status_code == 202
    assert ("reset_data", "alice") in parts.supervisor.calls
    assert parts.admin.post("/agents/alice/restart?wait=5").json["state"] == "running"


def test_authenticate(parts):
    assert parts.admin.post("/agents/alice/authenticate", json={"password": "correct horse"}).json == {
        "user": "alice"
    }
    answer = parts.admin.post("/agents/alice/authenticate", json={"password": "wrong"})
    assert (answer.status_code, answer.json["code"]) == (403, "forbidden")
    for _ in range(20):
        answer = parts.admin.post("/agents/alice/authenticate", json={"password": "wrong"})
    assert answer.status_code == 429
    assert int(answer.headers["Retry-After"]) >= 1


def test_a_new_password_counts_and_ends_the_sessions(parts):
    session = parts.login().json["session"]["sha256"]
    assert parts.admin.put("/agents/alice/password", json={"password": "short"}).status_code == 400
    assert parts.sessions.get(session)
    answer = parts.admin.put("/agents/alice/password", json={"password": "a new password"})
    assert (answer.status_code, answer.data) == (204, b"")
    assert parts.sessions.get(session) is None
    assert parts.login().status_code == 403
    assert parts.login(password="a new password").status_code == 201


def test_sessions_are_listed_and_revoked(parts):
    parts.add("bob")
    first = parts.login(user_agent="Browser\n\x1b[31m").json["session"]["sha256"]
    second = parts.login().json["session"]["sha256"]
    bobs = parts.login("bob").json["session"]["sha256"]
    listed = parts.admin.get("/sessions?user=Alice").json["sessions"]
    assert {entry["id"] for entry in listed} == {first[:16], second[:16]}
    assert all(entry["user"] == "alice" and entry["address"] == "192.0.2.1" for entry in listed)
    assert {entry["user_agent"] for entry in listed} == {"", "Browser  [31m"}
    assert len(parts.admin.get("/sessions").json["sessions"]) == 3
    assert parts.admin.delete(f"/sessions/{first[:16]}").status_code == 204
    assert parts.admin.delete(f"/sessions/{first[:16]}").status_code == 404
    assert parts.admin.delete("/sessions?user=alice").json == {"revoked": 1}
    assert parts.sessions.get(bobs)


def test_revoking_all_needs_a_name(parts):
    session = parts.login().json["session"]["sha256"]
    for path in ("/sessions", "/sessions?usr=alice", "/sessions?user=", "/sessions?user=alice&user=bob"):
        assert parts.admin.delete(path).status_code == 400
    assert parts.sessions.get(session)


@pytest.mark.parametrize(
    ("path", "members"),
    [
        (
            "/agents/alice/runtime",
            {"handle", "endpoint", "uid", "provider", "started_at", "spec_hash", "usage"},
        ),
        ("/agents/alice/logs", {"lines", "cursor"}),
        ("/agents/alice/events", {"events"}),
        ("/agents/alice/why", {"agent", "sentences"}),
        ("/agents/alice/copies", {"copies"}),
        ("/providers", {"providers"}),
        ("/providers/fake/check", {"findings"}),
        ("/authenticator/check", {"findings"}),
        ("/stats/memory_usage", {"total", "average", "agents"}),
        ("/stats/top", {"agents"}),
        ("/healthz", {"status", "version", "problems", "feed_connections", "configuration_changed"}),
    ],
)
def test_what_can_be_asked(parts, path, members):
    answer = parts.admin.get(path)
    assert (answer.status_code, set(answer.json)) == (200, members)
    assert answer.headers["Cache-Control"] == "no-store"


def test_purge_reload_events_and_findings(parts):
    assert parts.admin.delete("/agents/alice/copies").json == {"purged": 0}
    assert parts.admin.post("/reload").json == {"changed": ["The log level is debug."], "faults": []}
    events = parts.admin.get("/agents/alice/events?limit=2").json["events"]
    assert events == [
        {"time": "1970-01-01T00:00:01.500+00:00", "kind": "starting", "detail": ""},
        {"time": "1970-01-01T00:00:01.500+00:00", "kind": "ready", "detail": ""},
    ]
    assert parts.admin.get("/providers/fake/check").json["findings"][0]["level"] == "warning"
    assert parts.admin.get("/providers/nope/check").status_code == 404


AGENT_PATHS = [(route.method, route.path) for route in ROLES["admin"] if "<agent>" in route.path]
BODIES = {
    "/agents/<agent>/state": {"state": "running"},
    "/agents/<agent>/authenticate": {"password": "x" * 8},
    "/agents/<agent>/password": {"password": "x" * 8},
}


@pytest.mark.parametrize(("method", "path"), AGENT_PATHS)
def test_unknown_agents_are_404_everywhere(parts, method, path):
    body = BODIES.get(path) if method in {"PUT", "POST"} else None
    answer = parts.admin.open(path.replace("<agent>", "nobody"), method=method, json=body)
    assert (answer.status_code, answer.json["code"]) == (404, "not-found")


@pytest.mark.parametrize("name", ["..", "%2e%2e%2f", "-rf", "a%00b", "a%0Ab", "x" * 400, "a:b:c", "%FF", "a%20b"])
@pytest.mark.parametrize(("method", "path"), AGENT_PATHS[:3])
def test_bad_names_are_refused(parts, method, path, name):
    answer = parts.admin.open(path.replace("<agent>", name), method=method)
    assert answer.status_code in {400, 404}
    assert answer.content_type == PROBLEM


@pytest.mark.parametrize(
    ("method", "path", "status"),
    [
        ("GET", "/nope", 404),
        ("GET", "/agents/", 404),
        ("GET", "//agents", 404),
        ("PATCH", "/agents", 405),
        ("OPTIONS", "/agents", 405),
        ("DELETE", "/healthz", 405),
    ],
)
def test_what_there_is_not_is_a_problem_document(parts, method, path, status):
    answer = parts.admin.open(path, method=method)
    assert (answer.status_code, answer.content_type) == (status, PROBLEM)
    assert answer.json["status"] == status
    assert set(answer.json) >= {"type", "title", "status", "detail", "fix", "code"}
    if status == 405:
        assert answer.headers["Allow"]


@pytest.mark.parametrize(
    "type", [None, "text/plain", "application/x-www-form-urlencoded", "multipart/form-data; boundary=x"]
)
def test_a_body_that_is_not_json_is_415(parts, type):
    answer = parts.admin.post("/agents", data=b'{"name": "bob", "password": "xxxxxxxx"}', content_type=type)
    assert (answer.status_code, answer.content_type) == (415, PROBLEM)
    assert list(parts.supervisor.rows) == ["alice"]


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"{",
        b'{"name": "bob"',
        b"\xff\xfe",
        BOB.encode("utf-8-sig"),
        BOB.encode("utf-16"),
        BOB.encode("utf-16-le"),
        BOB.encode("utf-32"),
        BOB.replace("bob", "b\xf6b").encode("latin-1"),
        BOB.replace('"bob"', "NaN").encode(),
        BOB.replace('"bob"', "-Infinity").encode(),
        BOB.replace('"bob"', "9" * 60_000).encode(),
        BOB.replace('"bob"', "1e999").encode(),
        BOB.replace("bob", "\\ud800").encode(),
        b"\0" * 100,
        b'{"name":"bob","name":"eve"}x',
        b"[" * 5000,
        b"[" * 1500 + b"]" * 1500,
        b'{"name": "bob", "password": ' + b"[" * 1500 + b"]" * 1500 + b"}",
        b'{"name": "bob", "more": ' + b'{"a":' * 1500 + b"1" + b"}" * 1500 + b"}",
    ],
)
def test_broken_json_is_400(parts, data):
    answer = parts.admin.post("/agents", data=data, content_type="application/json")
    assert (answer.status_code, answer.content_type) == (400, PROBLEM)


def test_a_large_body_is_413(parts):
    answer = parts.admin.post("/agents", json={"name": "x" * (MAX_BODY + 1)})
    assert (answer.status_code, answer.content_type) == (413, PROBLEM)


def test_a_body_where_none_belongs_is_refused(parts):
    assert parts.admin.post("/agents/alice/restart", json={"force": True}).status_code == 400
    assert parts.supervisor.calls == []


def test_a_query_where_none_belongs_is_refused(parts):
    assert parts.admin.get("/agents/alice?verbose=1").status_code == 400
    assert parts.admin.delete("/agents/alice?data=keep&data=delete").status_code == 400
    assert parts.supervisor.calls == []


def test_what_goes_wrong_inside_is_logged_and_not_shown(parts, monkeypatch, caplog):
    def broken(*_args, **_kwargs):
        raise RuntimeError("secret detail of /the/inside")

    monkeypatch.setattr(parts.supervisor, "why", broken)
    answer = parts.admin.get("/agents/alice/why")
    assert (answer.status_code, answer.content_type) == (500, PROBLEM)
    assert "secret detail" not in answer.text
    assert "Traceback" not in answer.text


def test_metrics_count_without_naming_agents(parts):
    parts.login()
    parts.login(password="wrong password")
    text = parts.admin.get("/metrics").text
    assert 'dispatcher_agents{app="demo",state="running"} 1.0' in text
    assert 'dispatcher_logins_total{outcome="success"} 1.0' in text
    assert 'dispatcher_logins_total{outcome="failure"} 1.0' in text
    assert "dispatcher_sessions 1.0" in text
    assert 'dispatcher_edge_requests_total{worker="7"} 3.0' in text
    assert "alice" not in text


def test_why_mentions_kept_data_of_a_removed_agent_too(parts):
    parts.add("alice")
    parts.supervisor.store.kept_copies["alice"] = ["an old copy"]
    sentences = parts.admin.get("/agents/alice/why").json["sentences"]
    assert sentences[-1] == (
        "One copy of its data is kept: `dispatcher info alice` shows it, `dispatcher purge alice` deletes it."
    )
    parts.supervisor.store.kept_copies["bob"] = parts.supervisor.store.kept_copies["alice"]
    parts.supervisor.store.kept_data["bob"] = "its data"
    sentences = parts.admin.get("/agents/bob/why").json["sentences"]
    assert sentences[0] == "The agent was removed."
    assert sentences[1].startswith("2 copies of its data are kept")
    assert parts.admin.get("/agents/carol/why").status_code == 404


def test_ending_the_sessions_of_an_unknown_user_is_404(parts):
    parts.add("alice")
    assert parts.admin.delete("/sessions?user=alice").json == {"revoked": 0}
    answer = parts.admin.delete("/sessions?user=nobody")
    assert (answer.status_code, answer.json["title"]) == (404, "There is no user nobody")


@pytest.mark.parametrize("depth", [200, 1500, 15000])
@pytest.mark.parametrize("body", ['{"name": %s1%s}', '{"zz": %s1%s}', "%s1%s"])
def test_deeply_nested_bodies_are_refused_like_any_other(parts, capsys, depth, body):
    """Of every request that takes a body, in both roles."""
    data = body % ("[" * depth, "]" * depth)
    for role, client in (("admin", parts.admin), ("proxy", parts.proxy)):
        for route in ROLES[role]:
            if route.body.model_fields:
                path = route.path.replace("<agent>", "alice")
                answer = client.open(path, method=route.method, data=data, content_type="application/json")
                assert (answer.status_code, answer.json["code"]) == (400, "bad-request"), (path, answer.json)
    assert "Traceback" not in "".join(capsys.readouterr())


@pytest.mark.parametrize("unit", [" ", "\t", ";", ",", "=", '"', "\\", "a", "/", "%", "-", " ;", '\\"', ';a="\\'])
@pytest.mark.parametrize("name", ["Accept", "Content-Type", "Cookie", "Authorization", "If-None-Match", "Range"])
def test_no_field_or_query_takes_time_by_the_square_of_its_length(parts, name, unit):
    """32 KiB are the most that a head may have; by the square they would take seconds."""
    value = unit * (30_000 // len(unit)) + "x"
    start = time.thread_time()
    for begin in ("", "application/json;a=", "text/html"):
        parts.admin.post("/agents", data=BOB, headers={"Content-Type": "application/json", name: begin + value})
    parts.admin.get("/agents", query_string=value)
    assert time.thread_time() - start < 0.4
