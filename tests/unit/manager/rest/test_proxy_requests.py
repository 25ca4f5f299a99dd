"""The role *proxy*: signing in, and what a session may do: nothing in anybody else's name."""

from __future__ import annotations

import json
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest

from dispatcher.plugin import names
from dispatcher.plugin.authenticator import Authenticator, Identity
from dispatcher.plugin.errors import Unavailable, Unsupported
from dispatcher.manager.rest.application import ROLES
from dispatcher.manager.auth.local import LocalOptions
from dispatcher.manager.auth.sessions import digest
from tests.support.manager_parts import Parts


@pytest.fixture
def parts(tmp_path):
    parts = Parts(tmp_path)
    parts.add("alice")
    parts.add("bob")
    yield parts
    parts.close()


def signed_in(parts, name="alice"):
    return parts.login(name).json["session"]["sha256"]


def test_sign_in_gives_tokens_and_starts_the_agent(parts):
    answer = parts.login("Alice", user_agent="Browser", device=None)
    assert answer.status_code == 201
    session = answer.json["session"]
    assert session["sha256"] == digest(answer.json["token"])
    assert session["user"] == session["agent"] == "alice"
    assert session["agents"] == ["alice"]
    assert session["ttl"] == 86400
    assert session["lifetime"] == 7 * 86400
    assert "parent" not in session
    assert parts.supervisor.calls == [("set_desired", "alice", "running", None)]
    assert parts.post("/sessions/lookup", sha256=session["sha256"]).json == session


def test_the_agent_is_started_before_the_answer_and_without_a_session_for_the_wrong(parts):
    parts.login(password="wrong password")
    assert parts.supervisor.calls == []
    assert parts.sessions.all() == []


def test_blanks_around_a_name_are_ignored(parts):
    assert parts.login(" Alice\u00a0\t").json["session"]["user"] == "alice"


@pytest.mark.parametrize(("name", "shown"), [("al ice", "' '"), ("alice;", "';'"), ("al\x1bice", r"\\x1b")])
def test_the_log_names_the_character_that_no_name_has(parts, capsys, name, shown):
    assert parts.login(name).status_code == 403
    log = capsys.readouterr().out
    assert shown in log
    assert "a name that cannot exist" in log


def test_sixty_guesses_at_once_leave_the_owner_a_second_to_wait(parts):
    def guess(number):
        return parts.login(password=f"guess {number}", address=f"198.51.100.{number}").status_code

    with ThreadPoolExecutor(60) as pool:
        codes = list(pool.map(guess, range(60)))
    assert codes.count(403) <= 10, "attempts that are being checked count as wrong ones"
    answer = parts.login(address="203.0.113.9")
    assert int(answer.headers.get("Retry-After", 0)) <= 60
    parts.clock.time += 60
    assert parts.login(address="203.0.113.9").status_code == 201


def test_each_sign_in_is_a_new_session(parts):
    first, second = parts.login().json, parts.login().json
    assert first["token"] != second["token"]
    assert first["session"]["sha256"] != second["session"]["sha256"]


def test_credentials_go_to_apps_that_ask_for_them_and_nowhere_else(tmp_path):
    config = {"apps": {"demo": {"credentials": "stdin", "subprocess": {"command": ["x"]}}}}
    parts = Parts(tmp_path, config=config)
    parts.add("alice")
    parts.login()
    ((_, agent, state, stdin),) = [call for call in parts.supervisor.calls if call[0] == "set_desired"]
    assert (agent, state) == ("alice", "running")
    assert json.loads(stdin) == {"user": "alice", "password": "correct horse"}
    assert stdin.endswith(b"\n")
    parts.close()
    assert b"correct horse" not in b"".join(path.read_bytes() for path in tmp_path.iterdir())


@pytest.mark.parametrize("name", ["nobody", "ALICE2", "no/body", "-rf", "a\nb", "x" * 255, "é" * 200])
def test_unknown_names_and_wrong_passwords_look_alike(parts, name):
    wrong = parts.login("alice", "wrong password", address="192.0.2.77")
    unknown = parts.login(name, "wrong password", address="192.0.2.78")
    assert wrong.status_code == unknown.status_code == 403
    assert wrong.data == unknown.data
    assert dict(wrong.headers) == dict(unknown.headers)


def test_unknown_names_are_slowed_like_known_ones(parts):
    def codes(name, network):
        return [parts.login(name, "wrong password", address=f"198.51.{network}.{n}").status_code for n in range(9)]

    assert codes("alice", 1) == codes("nobody", 2)
    assert codes("alice", 3)[-1] == 429


def test_a_slowed_name_is_told_when_to_come_back_and_a_restart_does_not_help(parts):
    for number in range(10):
        answer = parts.login(password="wrong password", address=f"198.51.100.{number}")
    assert answer.status_code == 429
    assert int(answer.headers["Retry-After"]) >= 1
    assert "wait" in answer.json["fix"]
    parts.services.signin = parts.new_signin()
    assert parts.login(address="203.0.113.9").status_code == 429
    parts.clock.time += 3600
    assert parts.login(address="203.0.113.9").status_code == 201


def test_the_owner_gets_in_from_a_known_browser_while_others_guess(parts):
    device = parts.login().json["device"]
    for number in range(50):
        parts.login(password="wrong password", address=f"198.51.100.{number}")
    assert parts.login(address="203.0.113.9").status_code == 429
    answer = parts.login(address="203.0.113.9", device=device)
    assert answer.status_code == 201
    assert answer.json["device"] == device


def test_no_known_browser_has_free_guesses_at_a_new_password(parts):
    devices = [parts.login().json["device"] for _ in range(8)]
    parts.admin.put("/agents/alice/password", json={"password": "a new password"})
    codes = [
        parts.login(password="wrong password", address=f"198.51.{number}.{guess}", device=device).status_code
        for number, device in enumerate(devices)
        for guess in range(5)
    ]
    assert codes[:5] == [403] * 5
    assert set(codes[5:]) == {429}


def test_a_browser_stays_its_users_after_a_new_password(parts):
    device = parts.login().json["device"]
    parts.admin.put("/agents/alice/password", json={"password": "a new password"})
    assert parts.login(password="a new password", device=device).json["device"] == device
    for number in range(50):
        parts.login(password="wrong password", address=f"198.51.100.{number}")
    assert parts.login(password="a new password", address="203.0.113.9", device=device).status_code == 201


def test_a_device_token_is_worth_nothing_for_another_name_and_is_slowed_itself(parts):
    device = parts.login("bob").json["device"]
    for _ in range(10):
        last = parts.login("alice", "wrong password", address="198.51.100.1", device=device)
    assert last.status_code == 429
    assert parts.login("alice", address="203.0.113.9", device=device).status_code == 429
    for _ in range(10):
        last = parts.login("bob", "wrong password", address="203.0.113.9", device=device)
    assert last.status_code == 429


def test_an_unknown_device_token_is_replaced(parts):
    answer = parts.login(device="made-up")
    assert answer.status_code == 201
    assert answer.json["device"] != "made-up"


def test_two_hundred_right_sign_ins_from_one_address_are_not_slowed(parts):
    assert {parts.login(["alice", "bob"][n % 2]).status_code for n in range(200)} == {201}


def test_too_many_at_once_get_429_and_the_others_their_turn(tmp_path):
    parts = Parts(tmp_path, queue=3)
    users = [f"user{number}" for number in range(40)]
    for user in users:
        parts.add(user)
    go = threading.Event()
    real = parts.authenticator.authenticate

    def slow(name, password, *, deadline):
        go.wait(10)
        return real(name, password, deadline=deadline)

    parts.authenticator.authenticate = slow
    codes = []

    def ask(number):
        body = {"user": users[number], "password": "correct horse", "address": f"192.0.2.{number}"}
        answer = parts.proxy.application.test_client().post("/sessions", json=body)
        codes.append((answer.status_code, answer.headers.get("Retry-After")))

    threads = [threading.Thread(target=ask, args=(number,)) for number in range(40)]
    for thread in threads:
        thread.start()
    while len(codes) < 35:
        pass
    assert parts.proxy.get("/healthz").status_code == 200  # others go on meanwhile
    go.set()
    for thread in threads:
        thread.join()
    assert sorted(code for code, _ in codes) == [201] * 5 + [429] * 35
    assert all(retry for code, retry in codes if code == 429)
    assert {parts.login(user).status_code for user in users} == {201}, "refused ones were not counted as wrong"
    parts.close()


def test_a_directory_that_is_away_is_503_and_counts_as_nobodys_fault(tmp_path):
    class Away(Authenticator):
        name = "away"
        Options = LocalOptions

        def authenticate(self, name, password, *, deadline):
            raise Unavailable("The directory does not answer", retry_after=7)

    parts = Parts(tmp_path, authenticator=Away(options=LocalOptions()))
    codes = {parts.login().status_code for _ in range(30)}
    assert codes == {503}
    assert parts.login().headers["Retry-After"] == "7"
    parts.close()


def test_a_directory_that_ends_its_program_ends_no_thread_of_the_manager(tmp_path):
    class Exiting(Authenticator):
        name = "exiting"
        Options = LocalOptions

        def authenticate(self, name, password, *, deadline):
            raise SystemExit(9)

        def set_password(self, user, password, *, deadline):
            raise SystemExit(9)

    parts = Parts(tmp_path, authenticator=Exiting(options=LocalOptions()))
    assert [parts.login().status_code for _ in range(3)] == [503] * 3
    with pytest.raises(Unavailable):
        parts.services.signin.set_password("alice", "correct horse")
    parts.close()


def test_an_external_directory_makes_the_user_at_the_first_sign_in(tmp_path):
    class Directory(Authenticator):
        name = "directory"
        Options = LocalOptions

        def authenticate(self, name, password, *, deadline):
            return Identity(user="Alice") if password == "correct horse" else None

    parts = Parts(tmp_path, authenticator=Directory(options=LocalOptions()))
    assert parts.login("alice@corp").status_code == 201
    assert parts.supervisor.store.get_user("alice").password_hash is None
    assert parts.login("alice@corp").json["session"]["user"] == "alice"
    assert parts.post("/sessions/list", sha256=signed_in(parts, "alice@corp")).json["changes_passwords"] is False
    assert list(parts.supervisor.rows) == ["alice"]
    assert parts.admin.put("/agents/alice/password", json={"password": "x" * 8}).status_code == 422
    assert parts.add("bob", "x" * 8).status_code == 400
    assert parts.add("bob", None).status_code == 201
    parts.close()


def test_weak_hashes_are_renewed_at_the_sign_in(parts):
    from dispatcher.manager.auth.hashing import Hasher

    weak = Hasher(memory=8, passes=1).hash("correct horse")
    parts.supervisor.store.set_password_hash("alice", weak)
    assert parts.login(password="wrong password").status_code == 403
    assert parts.supervisor.store.get_user("alice").password_hash == weak
    assert parts.login().status_code == 201
    assert parts.supervisor.store.get_user("alice").password_hash != weak
    assert parts.login().status_code == 201


def test_logout_ends_the_session_and_only_it(parts):
    one, other = signed_in(parts), signed_in(parts)
    assert parts.post("/sessions/revoke", sha256=one).status_code == 204
    assert parts.post("/sessions/lookup", sha256=one).status_code == 404
    assert parts.post("/sessions/lookup", sha256=other).status_code == 200
    assert parts.post("/sessions/revoke", sha256=one).status_code == 204


def test_another_session_of_the_same_user_can_be_ended_and_nobody_elses(parts):
    mine, my_other, bobs = signed_in(parts), signed_in(parts), signed_in(parts, "bob")
    listed = parts.post("/sessions/list", sha256=mine).json["sessions"]
    assert {entry["id"] for entry in listed} == {mine[:16], my_other[:16]}
    assert parts.post("/sessions/revoke", sha256=mine, id=bobs[:16]).status_code == 404
    assert parts.post("/sessions/revoke", sha256=mine, id=my_other[:16]).status_code == 204
    assert parts.sessions.get(my_other) is None
    assert parts.sessions.get(bobs)
    assert parts.sessions.get(mine)


def test_agents_of_the_own_user_only(parts):
    parts.add("alice", None, app="lab")
    session = signed_in(parts)
    assert [agent["name"] for agent in parts.post("/sessions/agents", sha256=session).json["agents"]] == [
        "alice",
        "alice:lab",
    ]
    parts.edge_waits.clear()
    assert parts.post("/sessions/select", sha256=session, agent="alice:lab").json["agent"] == "alice:lab"
    assert parts.edge_waits, "the browser's next request may still go to the other agent"
    assert parts.post("/sessions/lookup", sha256=session).json["agent"] == "alice:lab"
    answer = parts.post("/sessions/state", sha256=session, agent="alice:lab", state="running")
    assert (answer.status_code, answer.json["state"]) == (202, "running")
    assert parts.post("/sessions/state", sha256=session, agent="alice", state="stopped").json["state"] == "stopped"
    assert parts.post("/sessions/state", sha256=session, agent="alice", state="restart").json["state"] == "running"


@pytest.mark.parametrize("agent", ["bob", "nobody", "bob:lab"])
def test_somebody_elses_agent_is_as_unknown_as_none(parts, agent):
    session = signed_in(parts)
    parts.supervisor.calls.clear()
    selected = parts.post("/sessions/select", sha256=session, agent=agent)
    stopped = parts.post("/sessions/state", sha256=session, agent=agent, state="stopped")
    assert selected.status_code == stopped.status_code == 404
    assert selected.json == stopped.json
    assert selected.json["title"] == f"There is no agent {agent}"
    assert parts.supervisor.calls == []
    assert parts.sessions.get(session).agent == "alice"


def test_guessing_the_old_password_is_slowed(parts):
    body = {"sha256": signed_in(parts), "password": "wrong", "new_password": "x" * 8, "address": "192.0.2.1"}
    assert parts.post("/sessions/password", **body).status_code == 403
    for _ in range(20):
        answer = parts.post("/sessions/password", **body)
    assert answer.status_code == 429


def test_a_new_password_ends_all_other_sessions_and_renews_this_one(parts):
    session, other, bobs = signed_in(parts), signed_in(parts), signed_in(parts, "bob")
    body = {
        "sha256": session,
        "password": "correct horse",
        "new_password": "a new password",
        "address": "192.0.2.1",
    }
    assert parts.post("/sessions/password", **body | {"password": "wrong"}).status_code == 403
    assert parts.post("/sessions/password", **body | {"new_password": "short"}).status_code == 400
    assert parts.sessions.get(session)
    answer = parts.post("/sessions/password", **body)
    assert answer.status_code == 200
    assert answer.json["session"]["sha256"] == digest(answer.json["token"])
    assert parts.sessions.get(session) is None
    assert parts.sessions.get(other) is None
    assert parts.sessions.get(bobs)
    assert parts.post("/sessions/lookup", sha256=answer.json["session"]["sha256"]).status_code == 200
    assert parts.login().status_code == 403
    assert parts.login(password="a new password").status_code == 201


def test_a_sign_in_that_overlaps_a_new_password_does_not_outlive_it(parts):
    checked, go = threading.Event(), threading.Event()
    real = parts.authenticator.authenticate

    def slow(name, password, *, deadline):
        identity = real(name, password, deadline=deadline)
        checked.set()
        go.wait(10)
        return identity

    parts.authenticator.authenticate = slow
    answers = []
    thread = threading.Thread(target=lambda: answers.append(parts.login().status_code))
    thread.start()
    checked.wait(10)
    parts.admin.put("/agents/alice/password", json={"password": "a new password"})
    go.set()
    thread.join()
    assert answers == [403]
    assert parts.sessions.all() == []


def handed_over(parts, session, host=None):
    host = host or f"{names.key('alice')}.example.org"
    answer = parts.post("/sessions/handover", sha256=session, host=host, nonce_sha256=digest("nonce"))
    return host, answer


def test_a_hand_over_makes_a_child_that_ends_with_its_parent(parts):
    parent = signed_in(parts)
    host, answer = handed_over(parts, parent)
    assert answer.status_code == 201
    made = parts.post("/sessions/redeem", code=answer.json["code"], nonce="nonce", host=host)
    assert made.status_code == 201
    child = made.json["session"]
    assert (child["parent"], child["host"], child["agent"]) == (parent, host, "alice")
    assert child["sha256"] == digest(made.json["token"])
    assert parts.post("/sessions/redeem", code=answer.json["code"], nonce="nonce", host=host).status_code == 403
    assert len(parts.post("/sessions/list", sha256=parent).json["sessions"]) == 1
    assert parts.post("/sessions/revoke", sha256=child["sha256"]).status_code == 204  # a logout there
    assert parts.sessions.get(parent) is None
    assert parts.sessions.get(child["sha256"]) is None


def test_no_hand_over_to_somebody_elses_host_nor_from_a_child(parts):
    parent = signed_in(parts)
    for host in (f"{names.key('bob')}.example.org", "example.org", "evil.example.net"):
        assert handed_over(parts, parent, host)[1].status_code == 403
    host, answer = handed_over(parts, parent)
    child = parts.post("/sessions/redeem", code=answer.json["code"], nonce="nonce", host=host).json["session"]
    assert handed_over(parts, child["sha256"])[1].status_code == 403


def test_a_code_is_bound_to_the_browser_and_dies_with_the_session(parts):
    parent = signed_in(parts)
    host, answer = handed_over(parts, parent)
    assert parts.post("/sessions/redeem", code=answer.json["code"], nonce="stolen", host=host).status_code == 403
    host, answer = handed_over(parts, parent)
    parts.post("/sessions/revoke", sha256=parent)
    assert parts.post("/sessions/redeem", code=answer.json["code"], nonce="nonce", host=host).status_code == 403


BODIES = {
    "/sessions/lookup": {},
    "/sessions/agents": {},
    "/sessions/list": {},
    "/sessions/select": {"agent": "alice"},
    "/sessions/state": {"agent": "alice", "state": "stopped"},
    "/sessions/password": {"password": "correct horse", "new_password": "x" * 8, "address": "192.0.2.1"},
    "/sessions/handover": {"host": "h.example.org", "nonce_sha256": "0" * 64},
}


@pytest.mark.parametrize("path", BODIES)
@pytest.mark.parametrize("kind", ["dead", "unknown"])
def test_dead_and_unknown_sessions_may_do_nothing(parts, path, kind):
    session = signed_in(parts) if kind == "dead" else "0" * 64
    parts.sessions.revoke(session)
    parts.supervisor.calls.clear()
    answer = parts.post(path, sha256=session, **BODIES[path])
    assert (answer.status_code, answer.json["code"]) == (404, "not-found")
    assert parts.supervisor.calls == []


@pytest.mark.parametrize("path", BODIES)
@pytest.mark.parametrize("sha256", ["", "0" * 63, "G" * 64, 7, None, ["0" * 64]])
def test_what_is_no_session_is_refused(parts, path, sha256):
    assert parts.post(path, **BODIES[path] | {"sha256": sha256}).status_code == 400


@pytest.mark.parametrize(
    "extra",
    [{"admin": True}, {"image": "evil"}, {"command": ["sh"]}, {"mounts": ["/"]}, {"user": "bob"}, {"app": "lab"}],
)
def test_nothing_that_the_app_decides_can_be_asked_for(parts, extra):
    session = signed_in(parts)
    parts.supervisor.calls.clear()
    answer = parts.post("/sessions/state", sha256=session, agent="alice", state="running", **extra)
    assert answer.status_code == 400
    assert parts.supervisor.calls == []


@pytest.mark.parametrize(
    "route",
    [r for r in ROLES["admin"] if r.path not in {"/healthz", "/metrics", "/openapi.json"}],
    ids=lambda r: f"{r.method} {r.path}",
)
def test_nothing_of_the_role_admin_is_here(parts, route):
    answer = parts.proxy.open(
        route.path.replace("<agent>", "alice").replace("<id>", "0" * 16), method=route.method
    )
    assert answer.status_code in {404, 405}


def test_an_authenticator_states_that_it_only_says_where_passwords_are_changed(tmp_path):
    class Directory(Authenticator):
        name = "directory"
        Options = LocalOptions
        changes_passwords = False

        def authenticate(self, name, password, *, deadline):
            return Identity(user="alice")

        def set_password(self, name, password, *, deadline):
            raise Unsupported("Passwords are not changed here", fix="ask the service desk")

    parts = Parts(tmp_path, authenticator=Directory(options=LocalOptions()))
    assert parts.post("/sessions/list", sha256=signed_in(parts)).json["changes_passwords"] is False
    parts.close()


def test_a_user_of_the_manager_s_own_passwords_can_change_it(parts):
    assert parts.post("/sessions/list", sha256=signed_in(parts)).json["changes_passwords"] is True
