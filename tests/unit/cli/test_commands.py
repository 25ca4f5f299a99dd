"""The command line against a manager that answers by the book: what people see, exit codes, JSON, errors."""

import json
import re
import subprocess
import sys

import pytest

from dispatcher.cli.ui import progress
from tests.support.fake_manager import problem


# People.


def test_add_reads_the_password_from_standard_input(run, manager):
    code, out, err = run("add", "alice", "--password-stdin", stdin=b"correct horse\n")
    assert (code, out, err) == (0, "alice was added\n", "")
    assert manager.users == {"alice": "correct horse"}


def test_add_without_a_terminal_says_how(run, manager):
    code, out, err = run("add", "alice", stdin=b"")
    assert code == 2
    assert "give it with --password-stdin" in err
    assert manager.users == {}


@pytest.mark.parametrize(
    ("password", "why"),
    [
        (b"short\n", "it has 5 characters, not 8 to 1024"),
        (b"x" * 2000, "it has 2000 characters"),
        (b"\xff" * 9, "it is not UTF-8"),
    ],
)
def test_add_refuses_bad_passwords_before_the_manager_hears_of_them(run, manager, password, why):
    code, _, err = run("add", "alice", "--password-stdin", stdin=password)
    assert code == 2
    assert why in err
    assert manager.users == {}


def test_a_password_keeps_its_spaces(run, manager):
    run("add", "alice", "--password-stdin", stdin=b"  two spaces \r\n")
    assert manager.users["alice"] == "  two spaces "


def test_add_of_somebody_who_exists_is_a_conflict_and_asks_nothing(run, manager):
    manager.add("alice")
    code, _, err = run("add", "Alice")
    assert code == 4
    assert err == "dispatcher: alice exists\n"


def test_a_further_agent_needs_no_password(run, manager):
    manager.add("alice")
    code, out, _ = run("add", "alice", "--app", "notebook")
    assert (code, out) == (0, "alice:notebook was added\n")


def test_add_for_another_directory_s_people_needs_no_password(run, manager):
    manager.answers["POST /agents"] = lambda _query, body: (201, manager.add(body["name"]))
    assert run("add", "alice", "--no-password")[0] == 0
    assert manager.requests[-1][3] == {"name": "alice"}


def test_add_asks_for_no_password_where_the_manager_wants_none(run, manager):
    manager.answers["POST /agents"] = lambda _query, body: (201, manager.add(body["name"]))
    assert run("add", "alice", stdin=b"")[0] == 0
    assert manager.requests[-1][3] == {"name": "alice"}


@pytest.mark.parametrize("identifier", ["0f3a9be21c0000002a", "5e2c1b7e-08cc-4a53-9b1e-2f6d6f8a7d11"])
def test_why_says_where_the_id_of_a_request_is_found(run, manager, identifier):
    code, _, err = run("why", identifier)
    assert code == 3
    assert f"There is no agent {identifier}: it looks like the ID of a request" in err
    assert f"journalctl -u dispatcher-proxy --grep {identifier}" in err
    assert "request" not in run("why", "nobody")[2]
    manager.add(identifier)
    assert run("why", identifier)[0] == 0, "an agent may have such a name"


def test_remove_waits_and_tells(run, manager):
    manager.add("alice")
    code, out, _ = run("remove", "alice", "--yes")
    assert (code, out) == (0, "alice was removed\n")
    assert manager.agents == {}


def test_remove_can_keep_the_data(run, manager):
    manager.add("alice")
    assert (
        run("remove", "alice", "--keep-data", "-y")[1]
        == "alice was removed; its data is kept (`dispatcher purge alice` deletes it)\n"
    )
    assert manager.requests[-1][2]["data"] == "keep"


def test_remove_of_nobody_is_exit_code_3(run, manager):
    code, _, err = run("remove", "nobody", "-y")
    assert (code, err) == (3, "dispatcher: There is no agent nobody\n")


def test_passwd(run, manager):
    manager.add("alice")
    assert run("passwd", "alice", "--password-stdin", stdin=b"new-password\n")[:2] == (
        0,
        "alice has a new password\n",
    )
    assert manager.users["alice"] == "new-password"


def test_passwd_of_who_has_only_an_agent_of_another_app(run, manager):
    manager.add("alice:notebook")
    assert run("passwd", "alice", "--password-stdin", stdin=b"new-password\n")[:2] == (
        0,
        "alice has a new password\n",
    )


def test_passwd_of_nobody_names_the_person(run, manager):
    assert run("passwd", "nobody", "--password-stdin", stdin=b"new-password\n")[::2] == (
        3,
        "dispatcher: There is no user nobody (see `dispatcher list`)\n",
    )


def test_output_that_cannot_be_written_is_one_line(manager):
    manager.add("alice")
    with open("/dev/full", "wb") as full:
        done = subprocess.run(
            [sys.executable, "-m", "dispatcher", "list"],
            stdout=full,
            stderr=subprocess.PIPE,
            text=True,
            check=False,
        )
    assert (done.returncode, done.stderr) == (
        1,
        "dispatcher: Cannot write the output: No space left on device (free some space, or redirect the output)\n",
    )


# States.


@pytest.mark.parametrize(
    ("arguments", "state"),
    [
        (["start"], "running"),
        (["stop"], "stopped"),
        (["suspend"], "suspended"),
        (["suspend", "--to-disk"], "hibernated"),
    ],
)
def test_states_are_reached(run, manager, arguments, state):
    manager.add("alice", "unknown")
    code, out, _ = run(*arguments, "alice")
    assert (code, out) == (0, f"alice is {state}\n")
    assert manager.requests[-1][3] == {"state": state}


def test_start_follows_a_long_start_to_its_end(run, manager):
    manager.add("alice")
    manager.script = [
        {"state": "starting", "stage": "pull", "fraction": 0.5},
        {"state": "starting"},
        {"state": "running"},
    ]
    assert run("start", "alice")[:2] == (0, "alice is running\n")


@pytest.mark.parametrize("command", ["suspend", "stop"])
def test_a_suspension_of_what_ends_meanwhile_is_done(run, manager, command):
    """Its start failed: there is nothing left to suspend."""
    manager.add("alice")
    wanted = "suspended" if command == "suspend" else "stopped"
    manager.script = [{"state": "starting", "desired": wanted}, {"state": "stopped", "desired": wanted}]
    assert run(command, "alice")[:2] == (0, "alice is stopped\n")


@pytest.mark.parametrize(
    ("state", "code", "told"),
    [
        (
            {"state": "unknown", "desired": "running"},
            1,
            "The state of alice is unknown: its backend does not answer",
        ),
        ({"state": "stopped", "desired": "stopped"}, 4, "The desired state of alice is stopped now"),
    ],
)
def test_no_command_waits_without_an_end(run, manager, monkeypatch, state, code, told):
    monkeypatch.setattr(progress, "UNKNOWN", 0.3)
    manager.add("alice")
    manager.script = [{"state": "starting", "desired": "running"}, *[state] * 100]
    found, _, err = run("start", "alice")
    assert (found, told in err) == (code, True), err


def test_a_start_ends_when_the_agent_is_removed(run, manager):
    manager.add("alice")
    manager.script = [{"state": "starting"}]
    manager.answers["GET /agents/alice/state"] = problem(404, "not-found", "There is no agent 'alice'")
    found, _, err = run("start", "alice")
    assert (found, "no longer exists" in err) == (3, True), err


def test_a_start_that_fails_says_why_with_the_last_lines(run, manager):
    manager.add("alice")
    failure = {
        "what": "alice did not become ready",
        "why": "exit code 1",
        "fix": "see its log",
        "log": ["a", "\x1b[2Jb"],
    }
    manager.script = [{"state": "starting"}, {"state": "failed", "failure": failure}]
    code, out, err = run("start", "alice")
    assert (code, out) == (1, "")
    assert err == "dispatcher: alice did not become ready: exit code 1 (see its log)\n  | a\n  | \\x1b[2Jb\n"


def test_a_failure_that_the_manager_answers_is_told_the_same(run, manager):
    manager.add("alice")
    manager.answers["PUT /agents/alice/state"] = problem(502, "start-failed", "No luck", log=["last words"])
    assert run("start", "alice")[2] == "dispatcher: No luck\n  | last words\n"


def test_no_wait_returns_at_once(run, manager):
    manager.add("alice")
    assert run("start", "alice", "--no-wait")[:2] == (0, "alice is stopped\n")
    assert "wait" not in manager.requests[-1][2]


def test_what_the_provider_cannot_do_is_an_error(run, manager):
    manager.add("alice")
    manager.answers["PUT /agents/alice/state"] = problem(422, "unsupported", "The provider cannot do this")
    assert run("suspend", "alice")[0] == 1


def test_restart_and_reset_data(run, manager):
    manager.add("alice")
    assert run("restart", "alice")[:2] == (0, "alice is running\n")
    assert run("reset_data", "alice", "--yes")[:2] == (0, "the data of alice was deleted\n")
    assert ("PUT", "/agents/alice/reset_data") in [request[:2] for request in manager.requests]


# Looking.


def test_list_is_plain_columns_without_a_terminal(run, manager):
    manager.add("alice", "running", last_used="2026-01-01T00:00:00+00:00")
    manager.add("bob@example.org", outdated=True)
    manager.fail("bob@example.org")
    code, out, err = run("list")
    assert (code, err) == (0, "")
    heading, alice, bob = out.splitlines()
    assert heading.split() == ["NAME", "APP", "PROVIDER", "STATE", "SINCE", "LAST", "USED"]
    assert alice.split()[:4] == ["alice", "demo", "subprocess", "running"]
    assert "bob@example.org did not become ready" in bob
    assert "never" in bob
    assert heading.index("STATE") == alice.index("running") == bob.index("failed")


def test_an_empty_list_says_what_to_do_and_prints_nothing(run, manager):
    code, out, err = run("list")
    assert (code, out) == (0, "")
    assert "dispatcher add NAME" in err


def test_running_lists_those_that_run(run, manager):
    manager.add("alice", "running")
    manager.add("bob")
    out = run("running")[1]
    assert "alice" in out
    assert "bob" not in out


def test_info_tells_all(run, manager):
    manager.add("alice", "running")
    out = run("info", "alice")[1]
    for text in ("alice", "unix:/run/d/a/x/s", "200001", "3.0 MiB", "1.5 s"):
        assert text in out


def test_info_lists_kept_data(run, manager):
    manager.add("alice", "running")
    assert "kept data" not in run("info", "alice")[1]
    manager.keep("alice", why="an old copy")
    assert "\n\nkept data (" in run("info", "alice")[1]
    assert "3.0 MiB in subprocess, kept since 2026-01-02 (" in run("info", "alice")[1]
    assert json.loads(run("info", "alice", "--json")[1])["copies"][0]["why"] == "an old copy"


def test_info_of_a_removed_agent_whose_data_is_kept(run, manager):
    manager.keep("alice")
    code, out, _ = run("info", "alice")
    assert code == 0
    assert re.search(r"^state +absent$", out, re.MULTILINE)
    assert "the agent was removed and its data kept" in out
    assert "dispatcher purge alice" in out
    assert run("info", "bob")[0] == 3


# Kept data.


def test_purge_shows_and_deletes_what_is_kept(run, manager):
    manager.add("alice", "running")
    manager.keep("alice", size=None, why="an old copy")
    manager.keep("alice")
    code, out, _ = run("purge", "alice", "--yes")
    assert code == 0
    first, second, done = out.splitlines()
    assert first.startswith("size unknown in subprocess, kept since 2026-01-02 (")
    assert first.endswith(" ago): an old copy")
    assert second.startswith("3.0 MiB in subprocess")
    assert done == "2 copies deleted"
    assert manager.copies == {}
    assert "alice" in manager.agents


def test_purge_where_nothing_is_kept(run, manager):
    manager.add("alice")
    assert run("purge", "alice")[:2] == (0, "no data is kept of alice\n")
    assert run("purge", "nobody")[0] == 3
    assert "DELETE" not in {request[0] for request in manager.requests}


def test_purge_of_a_removed_agent_as_json(run, manager):
    manager.keep("alice")
    found = json.loads(run("purge", "alice", "--json")[1])
    assert (found["purged"], len(found["copies"])) == (1, 1)


def test_why_mentions_kept_data_also_of_a_removed_agent(run, manager):
    manager.add("alice")
    manager.keep("alice", why="an old copy")
    manager.keep("bob")
    for name, reason in (("alice", "an old copy"), ("bob", "the agent was removed and its data kept")):
        code, out, _ = run("why", name)
        assert code == 0
        assert re.search(rf"Data is kept: 3.0 MiB in subprocess, kept since .*: {reason}\.\n", out)
        assert f"`dispatcher purge {name}` deletes the kept data." in out
    assert "There is no agent bob." in out
    assert run("why", "carol")[0] == 3


def test_a_fault_of_this_program_is_not_blamed_on_the_manager(run, manager, monkeypatch):
    def broken(*_):
        raise TypeError("a fault of this program")

    manager.add("alice")
    monkeypatch.setattr("dispatcher.cli.commands.inspection.remark", broken)
    with pytest.raises(TypeError, match="of this program"):
        run("list")


def test_why_is_sentences(run, manager):
    manager.add("alice")
    assert run("why", "alice")[1] == "It was asked to stop.\nIt stopped.\n"


def test_logs(run, manager):
    manager.add("alice")
    assert run("logs", "alice", "-n", "2")[1] == "line 4\nline 5\n"


def test_logs_follow_asks_again_with_the_cursor(run, manager, monkeypatch):
    manager.add("alice")

    def stop(seconds):
        raise KeyboardInterrupt

    monkeypatch.setattr("dispatcher.cli.commands.inspection.time.sleep", stop)
    code, out, _ = run("logs", "-f", "alice")
    assert code == 130
    assert out.splitlines()[-1] == "line 5"
    assert manager.requests[-1][2]["after"] == "5"


def test_top_and_memory_usage(run, manager):
    manager.answers["GET /stats/top"] = 200, {"agents": [
        {"name": "small", "state": "running", "memory": 1024, "cpu_percent": 50.0, "cpu_seconds": 4, "last_used": None,
         "disk": 1 << 20, "disk_limit": 64 << 20},
        {"name": "big", "state": "running", "memory": 2048, "cpu_percent": None, "cpu_seconds": None, "last_used": None},
    ]}  # fmt: skip
    lines = run("top")[1].splitlines()
    assert [line.split()[0] for line in lines[1:]] == ["big", "small"]
    assert "1.0 MiB of 64.0 MiB" in lines[2]
    assert [line.split()[0] for line in run("top", "--sort", "cpu")[1].splitlines()[1:]] == ["small", "big"]
    manager.answers["GET /stats/memory_usage"] = (
        200,
        {"total": 4096, "average": 2048, "agents": [{"name": "a", "memory": 2048}]},
    )
    assert "total  4.0 KiB" in " ".join(run("memory_usage")[1].split(" ")).replace("   ", "  ").replace(
        "   ", "  "
    )


def test_sessions(run, manager):
    manager.answers["GET /sessions"] = 200, {"sessions": [{"id": "0123456789abcdef", "user": "alice", "agent": "alice",
        "created": None, "last_used": None, "expires": None, "address": "127.0.0.1", "user_agent": "evil\x1b[2J"}]}  # fmt: skip
    out = run("sessions", "list")[1]
    assert "0123456789abcdef" in out
    assert "\x1b" not in out
    manager.answers["DELETE /sessions/0123456789abcdef"] = 204, None
    assert run("sessions", "revoke", "0123456789abcdef")[:2] == (0, "1 session ended\n")
    manager.answers["DELETE /sessions"] = lambda query, _: (
        200,
        {"revoked": 3 if query == {"user": "alice"} else 0},
    )
    assert run("sessions", "revoke", "--user", "Alice")[1] == "3 sessions ended\n"


def test_providers(run, manager):
    manager.answers["GET /providers"] = 200, {"providers": [
        {"name": "subprocess", "isolation": "process", "capabilities": ["suspend"], "distribution": "d 1", "usable": True, "error": None},
        {"name": "docker", "isolation": "container", "capabilities": [], "distribution": "d 1", "usable": False, "error": {"what": "no engine"}},
    ]}  # fmt: skip
    manager.answers["GET /providers/subprocess/check"] = (
        200,
        {"findings": [{"level": "ok", "what": "sandboxed", "fix": ""}]},
    )
    manager.answers["GET /providers/docker/check"] = (
        200,
        {"findings": [{"level": "error", "what": "no engine", "fix": "start it"}]},
    )
    unused = {"name": "runc", "distribution": "acme 1.2", "kinds": [], "configured": False, "error": None}
    used = {
        "name": "ldap",
        "distribution": "corp 3",
        "kinds": ["authenticator"],
        "configured": True,
        "error": "away",
    }
    manager.answers["GET /plugins"] = 200, {"plugins": [used, unused]}
    code, out, err = run("providers", "list")
    assert "no: no engine" in out
    assert "installed, not used by the configuration: runc (acme 1.2)" in err
    lines = [line.split() for line in run("plugins", "list")[1].splitlines()]
    assert ["ldap", "authenticator", "yes", "corp", "3", "away"] in lines
    assert ["runc", "-", "no", "acme", "1.2", "not", "loaded"] in lines
    assert run("providers", "check", "subprocess")[0] == 0
    code, out, _ = run("providers", "check")
    assert code == 1
    assert "-> start it" in out


def test_providers_are_checked_without_a_manager_too(run, short_tmp, monkeypatch):
    (short_tmp / "x.toml").write_text('[apps.demo]\nprovider = "subprocess"\n')
    words = [
        "--config",
        str(short_tmp / "x.toml"),
        "--manager",
        f"unix://{short_tmp}/none.sock",
        "providers",
        "check",
    ]
    code, out, err = run(*words, "subprocess", "--json")
    found = json.loads(out)["subprocess"]
    assert err.startswith("dispatcher: The manager does not answer at unix://")
    assert err.endswith("; checking without it\n")
    assert code == int(any(finding["level"] == "error" for finding in found))
    assert found[0]["what"]
    assert run(*words, "docker", "--app", "demoo")[0] == 2
    monkeypatch.setenv("DOCKER_HOST", f"unix://{short_tmp}/docker.sock")
    code, out, _ = run(*words, "docker")
    assert code == 1
    assert f"The Docker engine cannot be reached: unix://{short_tmp}/docker.sock: No such file or directory" in out
    assert "-> start it (systemctl start docker)" in out


@pytest.mark.parametrize("command", ["info", "start", "why", "logs", "remove", "purge"])
def test_a_misspelt_name_of_an_agent_is_answered_with_the_nearest(run, manager, command):
    manager.add("alice")
    assert "There is no agent alcie: did you mean 'alice'?" in run(command, "alcie")[2]
    assert "did you mean" not in run(command, "zzzzzz")[2]
    manager.add("bob:notebook")
    assert "There is no agent bob: did you mean 'bob:notebook'?" in run(command, "bob")[2]


@pytest.mark.parametrize("answer", [{"agents": 5}, {"agents": [5]}, {"agents": [{}]}, {}, {"agents": {"a": None}}])
def test_an_answer_of_another_form_is_one_line(run, manager, answer):
    manager.answers["GET /agents"] = 200, answer
    code, out, err = run("list")
    assert (code, out) == (5, "")
    assert err.count("\n") == 1
    assert "is not understood" in err


def test_reload_says_what_changed(run, manager):
    manager.answers["POST /reload"] = 200, {"changed": ["apps.demo: memory is 1G now"]}
    code, out, _ = run("reload")
    assert (code, out) == (0, "apps.demo: memory is 1G now\nno proxy is running on this machine\n")


def test_reload_says_which_apps_cannot_start(run, manager):
    manager.answers["POST /reload"] = (
        200,
        {"changed": [], "faults": ["apps.lab.subprocess.command: no such program"]},
    )
    code, out, err = run("reload")
    assert (code, out.count("\n")) == (0, 2)
    assert "agents cannot start: apps.lab.subprocess.command: no such program" in err


# JSON.


@pytest.mark.parametrize("where", ["before", "after"])
@pytest.mark.parametrize(
    ("arguments", "keys"),
    [
        (["list"], {"agents"}),
        (["running"], {"agents"}),
        (["info", "alice"], {"name", "state", "runtime"}),
        (["start", "alice"], {"state", "desired"}),
        (["stop", "alice"], {"state", "desired"}),
        (["restart", "alice"], {"state", "desired"}),
        (["reset-data", "--yes", "alice"], {"state", "desired"}),
        (["remove", "--yes", "alice"], {"name", "state"}),
        (["add", "--app", "x", "alice"], {"name", "state"}),
        (["why", "alice"], {"sentences"}),
        (["logs", "alice"], {"lines", "cursor"}),
    ],
)  # fmt: skip
def test_json_is_what_the_manager_said(run, manager, arguments, keys, where):
    manager.add("alice")
    code, out, err = run(*(["--json", *arguments] if where == "before" else [*arguments, "--json"]))
    assert (code, err) == (0, "")
    assert keys <= set(json.loads(out))


def test_a_removal_that_cannot_delete_the_data_fails_with_what_remains(run, manager):
    manager.add("alice")
    failure = {
        "what": "1 entry of /x cannot be deleted",
        "why": "'a': Operation not permitted",
        "fix": "",
        "log": [],
    }
    manager.answers["DELETE /agents/alice"] = 202, {"name": "alice", "state": "removing", "failure": failure}
    code, out, err = run("remove", "alice", "--yes")
    assert (code, out) == (1, "")
    assert err == "dispatcher: 1 entry of /x cannot be deleted: 'a': Operation not permitted\n"


# API tokens.

CREATED = {"id": "0123456789abcdef", "user": None, "service": "prometheus", "scopes": ["metrics"], "note": "",
    "created": "2026-01-01T10:00:00+00:00", "expires": "2026-04-01T10:00:00+00:00", "last_used": None}  # fmt: skip


def test_tokens_create_prints_the_token_alone(run, manager):
    sent = []
    manager.answers["POST /tokens"] = lambda _, body: (sent.append(body), (201, {"token": "dsp_x", **CREATED}))[1]
    code, out, err = run("tokens", "create", "--service", "prometheus", "--scope", "metrics")
    assert (code, out) == (0, "dsp_x\n")
    assert "token 0123456789abcdef, scope metrics, expires 2026-04-01; it is not shown again" in err
    run("tokens", "create", "--user", "Alice", "--scope", "app", "--scope", "read", "--expires", "never")
    assert sent[0] == {"service": "prometheus", "scopes": ["metrics"], "expires": "90d", "note": ""}
    assert sent[1] == {"user": "alice", "scopes": ["app", "read"], "expires": "never", "note": ""}
    code, out, _ = run("--json", "tokens", "create", "--service", "x", "--scope", "read")
    assert json.loads(out)["token"] == "dsp_x"


def test_tokens_create_says_what_is_missing(run):
    code, _, err = run("tokens", "create", "--scope", "read")
    assert code == 2 and "--user NAME or --service NAME" in err
    code, _, err = run("tokens", "create", "--service", "x")
    assert code == 2 and all(f"{scope}: " in err for scope in ("metrics", "read", "admin", "app"))


def test_tokens_list_and_revoke(run, manager):
    manager.answers["GET /tokens"] = 200, {"tokens": [CREATED, {**CREATED, "user": "alice", "expires": None}]}
    out = run("tokens", "list")[1]
    assert "service prometheus" in out and "alice" in out and "never" in out
    manager.answers["DELETE /tokens/0123456789abcdef"] = 204, None
    assert run("tokens", "revoke", "0123456789abcdef")[:2] == (0, "1 token revoked\n")
    manager.answers["DELETE /tokens"] = 200, {"revoked": 2}
    assert run("tokens", "revoke", "--user", "alice")[1] == "2 tokens revoked\n"
    assert json.loads(run("--json", "tokens", "revoke", "--user", "alice")[1]) == {"revoked": 2}
    code, _, err = run("tokens", "revoke")
    assert code == 2 and "Give the ID of one token" in err


def test_who_ends_sessions_is_told_of_tokens_that_remain(run, manager):
    manager.add("alice")
    manager.answers["DELETE /sessions"] = 200, {"revoked": 3}
    manager.answers["GET /tokens"] = 200, {"tokens": [CREATED, CREATED]}
    code, out, err = run("sessions", "revoke", "--user", "alice")
    assert (code, out) == (0, "3 sessions ended\n")
    assert "alice has 2 API tokens, which stay valid; to revoke: dispatcher tokens revoke --user alice" in err
    err = run("passwd", "--password-stdin", "alice", stdin=b"battery staple\n")[2]
    assert "2 API tokens" in err


# Directories.

SYNC = {
    "running": False,
    "dry_run": False,
    "users": 3,
    "asked": 3,
    "changed": ["alice"],
    "left": ["bob"],
    "back": [],
    "removed": [],
    "skipped": {"oidc.uni": 2},
    "problems": [],
}


def test_sync_follows_the_manager_and_says_what_changed(run, manager):
    manager.answers["POST /sync"] = (202, SYNC | {"running": True, "asked": 0})
    manager.answers["GET /sync"] = (200, SYNC)
    code, out, err = run("sync")
    assert (code, err) == (0, "")
    assert out.splitlines() == [
        "alice: groups changed",
        "bob: left",
        "oidc.uni: 2 users were skipped, the authenticator cannot look up users",
        "3 users, 2 changed",
    ]
    assert manager.requests[0][3] == {"force": False, "dry_run": False}


def test_sync_with_a_problem_fails(run, manager):
    manager.answers["POST /sync"] = (202, SYNC | {"problems": ["ldap: The directory does not answer"]})
    code, out, err = run("sync", "--dry-run")
    assert (code, err) == (1, "problem: ldap: The directory does not answer\n")
    assert "2 would be changed" in out
    assert json.loads(run("sync", "--json")[1])["left"] == ["bob"]


def test_auth_test_shows_what_a_sign_in_would_give(run, manager):
    found = {"accepted": True, "refusal": "", "authenticator": "ldap", "user": "alice", "groups": ["staff"]}
    found |= {"configured_groups": [], "apps": ["lab"], "agents": []}
    manager.answers["POST /sign-in/test"] = (200, found)
    code, out, _ = run("auth", "test", "alice", "--password-stdin", stdin=b" secret \n")
    assert code == 0
    assert out.splitlines()[0] == "accepted"
    assert "  groups: staff" in out and "  apps: lab" in out
    assert manager.requests[-1][3] == {"name": "alice", "password": " secret "}


def test_auth_test_of_a_refusal_fails(run, manager):
    manager.answers["POST /sign-in/test"] = (200, {"accepted": False, "refusal": "no such user"})
    assert run("auth", "test", "alice")[:2] == (1, "refused: no such user\n")


def test_auth_release(run, manager):
    manager.answers["POST /users/alice/release"] = (204, None)
    code, out, _ = run("auth", "release", "Alice", "--yes")
    assert (code, out) == (0, "alice belongs to the next account that signs in with this name\n")


# Import.


@pytest.mark.parametrize(
    "text",
    [
        b"name,app,password\nAlice,notebook,correct horse\nbob,,correct, horse\n",
        b"\xef\xbb\xbfname;app;password\r\nalice;notebook;correct horse\r\n\r\nbob;;battery staple\r\n",
    ],
)
def test_import_adds_users_and_can_be_repeated(run, manager, tmp_path, text):
    text = text.replace(b"correct, horse", b'"battery staple"')
    (tmp_path / "users.csv").write_bytes(text)
    assert run("import", str(tmp_path / "users.csv"))[:2] == (0, "2 added, 0 were there\n")
    assert manager.users == {"alice": "correct horse", "bob": "battery staple"}
    assert manager.agents["alice"]["app"] == "notebook"
    code, out, _ = run("import", "-", "--json", stdin=text)
    assert (code, json.loads(out)["present"]) == (0, ["alice", "bob"])


@pytest.mark.parametrize(
    ("text", "why"),
    [
        (b"", "does not name the columns"),
        (b"alice,bob\n", "does not name the columns"),
        (b"name,nane\n", "does not name the columns"),
        (b"name\nalice\na/b\n", "line 3: Bad name 'a/b'"),
        (b"name,app\nalice,BAD\n", "line 2: Bad app name"),
        (b"name,password\nalice,short\n", "line 2: the password has 5 characters"),
        (b"name\nalice\nALICE\n", "line 3: alice is in line 2, too"),
        (b"name\nalice,demo\n", "line 2: it has 2 columns, the first line 1"),
        (b'name\n"alice\n', "unexpected end of data"),
        (b"name\n\xff\n", "is not UTF-8"),
    ],
)
def test_import_of_a_file_with_an_error_changes_nothing(run, manager, tmp_path, text, why):
    (tmp_path / "users.csv").write_bytes(text)
    code, out, err = run("import", str(tmp_path / "users.csv"))
    assert (code, out) == (2, "")
    assert why in err
    assert manager.requests == []


def test_import_goes_on_after_a_line_that_fails(run, manager, tmp_path):
    (tmp_path / "users.csv").write_text("name,app,password\nalice,nowhere,correct horse\nbob,demo,correct horse\n")
    code, out, err = run("import", str(tmp_path / "users.csv"))
    assert code == 1
    assert err.startswith("line 2: alice: ")
    assert out == "1 added, 0 were there, 1 failed\n"
    assert list(manager.agents) == ["bob"]


def test_import_can_be_tried(run, manager, tmp_path):
    (tmp_path / "users.csv").write_text("name\nalice\n")
    assert run("import", "--dry-run", str(tmp_path / "users.csv"))[:2] == (0, "1 lines are valid\n")
    assert manager.requests == []


def test_import_of_a_file_that_is_not_there(run, tmp_path):
    code, _, err = run("import", str(tmp_path / "users.csv"))
    assert (code, "No such file" in err) == (2, True)
