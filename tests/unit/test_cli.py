"""The command line against a manager that answers by the book: what people see, exit codes, JSON, errors."""

import io
import json
import os
import socket
import subprocess
import sys
import threading
import time

import click
import pytest

from dispatcher import cli
from dispatcher.cli import ALIASES, SECTIONS, main, program
from tests.fake_manager import FakeManager, problem
from tests.terminal import on_a_terminal

ALL = sorted(name for section in SECTIONS.values() for name in section)


def commands(group=program, prefix=()):
    """Yield every command with its words."""
    ctx = click.Context(group)
    for name in group.list_commands(ctx):
        command = group.get_command(ctx, name)
        if isinstance(command, click.Group):
            yield from commands(command, (*prefix, name))
        else:
            yield (*prefix, name), command


COMMANDS = dict(commands())


@pytest.fixture
def manager(short_tmp, monkeypatch):
    monkeypatch.delenv("DISPATCHER_TOKEN", raising=False)
    with FakeManager(short_tmp / "manager.sock") as fake:
        monkeypatch.setenv("DISPATCHER_MANAGER", fake.url)
        yield fake


@pytest.fixture
def run(capsys, monkeypatch):
    """Run the program; returns exit code, standard output, standard error."""

    def run(*arguments, stdin=None):
        if stdin is not None:
            monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(stdin)))
        code = main(arguments)
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    return run


# The frame.


def test_every_command_of_the_design_is_there():
    wanted = """serve manager proxy demo reload add remove passwd list running info start stop suspend restart logs
    why top memory-usage reset-data providers config sessions doctor""".split()
    assert sorted(wanted) == ALL
    assert {("providers", "list"), ("providers", "check"), ("providers", "schema"), ("config", "check"),
            ("config", "show"), ("sessions", "list"), ("sessions", "revoke")} <= set(COMMANDS)  # fmt: skip


def test_the_help_lists_all_commands_without_importing_them(run):
    code, out, _ = run("--help")
    assert code == 0
    for section in SECTIONS.values():
        for name, lazy in section.items():
            assert f"  {name} " in out
            assert lazy.help in out
    for option in ("--config", "--manager", "-k", "--no-check-certificate", "--no-ssl", "--sslcert", "--fingerprint",
                   "--token-file", "--json"):  # fmt: skip
        assert option in out


@pytest.mark.parametrize("words", COMMANDS, ids=" ".join)
def test_each_command_explains_itself_with_an_example(run, words):
    code, out, _ = run(*words, "--help")
    assert code == 0
    assert "Example" in out
    assert (
        f"dispatcher {' '.join(words)}" in out
        or f"dispatcher --config new.toml {' '.join(words)}" in out
        or words[0] in {"manager", "proxy"}
    )
    assert COMMANDS[words].help


@pytest.mark.parametrize("name", ALL)
def test_the_one_line_help_and_the_command_agree_on_the_name(name):
    lazy = next(section[name] for section in SECTIONS.values() if name in section)
    assert lazy.load().name == name


def test_without_a_command_there_is_help(run):
    code, out, _ = run()
    assert code == 0
    assert "Usage: dispatcher" in out


@pytest.mark.parametrize(("alias", "name"), ALIASES.items())
def test_aliases_of_the_ancestor(run, alias, name):
    code, out, _ = run(alias, "--help")
    assert code == 0
    assert f"dispatcher {name}" in out


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (["lisst"], "There is no command 'lisst': did you mean 'list'? (see `dispatcher --help`)"),
        (["zzz"], "There is no command 'zzz' (see `dispatcher --help`)"),
        (["--nonsense"], "No such option"),
        (["start"], "Missing argument 'NAME' (see `dispatcher start --help`)"),
        (["start", "a", "b"], "Got unexpected extra argument (b) (see `dispatcher start --help`)"),
        (["start", "-rf"], "No such option"),
        (["start", "--", "-rf"], "Bad name '-rf': it must begin with a letter or a digit"),
        (["info", "a/b"], "Bad name 'a/b': the character '/' is not allowed"),
        (["info", "a\nb"], r"Bad name 'a\nb': the character '\n' is not allowed"),
        (["info", ""], "Bad name: a name has 1 to 255 characters"),
        (["logs", "alice", "-n", "many"], "Invalid value for '-n'"),
        (["sessions", "revoke"], "Give the ID of one sign-in, or --user NAME"),
        (["providers", "check", "--app", "x"], "--app needs the NAME of its provider"),
        (["providers", "nonsense"], "No such command"),
        (["--manager", "ftp://x", "list"], "Bad address of the manager 'ftp://x'"),
        (["--token-file", "/nonexistent", "--manager", "https://localhost", "list"], "Cannot read /nonexistent"),
        (["--manager", "https://localhost", "--fingerprint", "zz", "list"], "'zz' is no fingerprint"),
    ],
)
def test_wrong_usage_is_one_line_and_exit_code_2(run, monkeypatch, arguments, complaint):
    monkeypatch.delenv("DISPATCHER_TOKEN", raising=False)
    code, out, err = run(*arguments)
    assert code == 2
    assert out == ""
    assert err.startswith("dispatcher: ")
    assert err.count("\n") == 1
    assert complaint in err


def test_no_manager_is_exit_code_5_and_says_what_to_do(run, short_tmp):
    code, out, err = run("--manager", f"unix://{short_tmp}/none.sock", "list")
    assert (code, out) == (5, "")
    assert err.count("\n") == 1
    assert "there is no such socket (start it with `dispatcher serve`" in err


@pytest.fixture
def starting(short_tmp):
    """A manager that has its lock and does not listen yet: what makes it, and its socket."""
    from dispatcher.manager.directories import Lock

    lock = Lock(short_tmp)
    yield FakeManager, short_tmp / "manager.sock"
    lock.close()


def test_a_manager_that_is_just_starting_is_waited_for(run, starting):
    make, path = starting
    made = []
    timer = threading.Timer(0.4, lambda: made.append(make(path).__enter__()))
    timer.start()
    try:
        code, out, err = run("--manager", f"unix://{path}", "list", "--json")
    finally:
        timer.join()
        made[0].__exit__()
    assert (code, json.loads(out), err) == (0, {"agents": []}, "")


def test_one_that_never_comes_up_is_not_waited_for_long(run, starting, monkeypatch):
    monkeypatch.setattr("dispatcher.cli.context.PATIENCE", 0.3)
    began = time.monotonic()
    code, _, err = run("--manager", f"unix://{starting[1]}", "list")
    assert code == 5
    assert "it is still starting (try again" in err
    assert 0.3 <= time.monotonic() - began < 2


def test_where_no_manager_is_nobody_waits(run, short_tmp):
    """Neither for one that never was, nor for one that has ended and left its lock file and socket behind."""
    (short_tmp / "manager.lock").write_text("1")
    path = short_tmp / "manager.sock"
    with socket.socket(socket.AF_UNIX) as sock:
        sock.bind(str(path))
    for missing in (False, True):
        began = time.monotonic()
        code, _, err = run("--manager", f"unix://{path}", "list")
        assert code == 5
        assert ("no such socket" if missing else "nobody listens there") in err
        assert time.monotonic() - began < 1
        path.unlink(missing_ok=True)


def test_control_characters_of_a_manager_s_error_do_not_reach_the_terminal(run, manager):
    manager.answers["GET /agents"] = problem(409, "conflict", "a\x1b[31mb\nc")
    code, _, err = run("list")
    assert code == 4
    assert err == "dispatcher: a\\x1b[31mb c\n"


def test_ctrl_c_is_clean(run, manager, monkeypatch):
    monkeypatch.setattr(
        "dispatcher.client.ManagerClient.agents", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt)
    )
    code, out, err = run("list")
    assert (code, out) == (130, "")
    assert "Traceback" not in err


@pytest.mark.parametrize("closed", ["<&-", ">&-", "2>&-", "<&- >&- 2>&-"])
def test_closed_standard_streams_are_no_trouble(manager, closed):
    manager.add("alice")
    env = {**os.environ, "DISPATCHER_MANAGER": manager.url}
    for arguments in ("list", "remove alice --yes", "add bob"):
        command = f"exec {sys.executable} -m dispatcher {arguments} {closed}"
        done = subprocess.run(["sh", "-c", command], env=env, capture_output=True, text=True, timeout=30)
        assert "Traceback" not in done.stderr
        assert done.returncode == (2 if arguments == "add bob" else 0), done.stderr
        manager.agents.setdefault("alice", manager.add("alice"))


# Where the manager is.


@pytest.fixture
def nowhere(monkeypatch, short_tmp):
    """No configuration, no manager, an ordinary user."""
    monkeypatch.delenv("DISPATCHER_MANAGER", raising=False)
    monkeypatch.delenv("DISPATCHER_CONFIG", raising=False)
    monkeypatch.setattr("os.geteuid", lambda: 1234)
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(short_tmp / "run"))
    monkeypatch.setenv("XDG_CONFIG_HOME", str(short_tmp / "config"))
    monkeypatch.setattr("dispatcher.cli.target.SYSTEM_RUN_DIR", short_tmp / "system")
    return short_tmp


def test_an_ordinary_user_s_manager_is_below_the_runtime_directory(nowhere):
    assert cli.Cli().url == f"unix://{nowhere}/run/dispatcher/manager.sock"


def test_the_system_s_manager_is_taken_when_there_is_no_own_one(nowhere):
    (nowhere / "system").mkdir()
    (nowhere / "system/manager.sock").touch()
    assert cli.Cli().url == f"unix://{nowhere}/system/manager.sock"


def test_the_configuration_says_where_the_manager_is(nowhere):
    (nowhere / "config/dispatcher").mkdir(parents=True)
    (nowhere / "config/dispatcher/dispatcher.toml").write_text('[manager]\nrun_dir = "/run/x"\n')
    assert cli.Cli().url == "unix:///run/x/manager.sock"


def test_a_named_configuration_must_exist(nowhere, run):
    code, _, err = run("--config", "/nonexistent.toml", "list")
    assert code == 2
    assert "Cannot read /nonexistent.toml: there is no such file" in err


def test_a_broken_configuration_is_one_line(nowhere, run):
    (nowhere / "x.toml").write_text("[")
    code, _, err = run("--config", str(nowhere / "x.toml"), "list")
    assert code == 2
    assert err.count("\n") == 1


def test_a_run_directory_that_somebody_else_made_is_not_believed(nowhere, run):
    (nowhere / "run/dispatcher").mkdir(parents=True)
    if os.stat(nowhere / "run/dispatcher").st_uid == 0:
        os.chown(nowhere / "run/dispatcher", 4321, 4321)
        code, _, err = run("list")
        assert code == 5
        assert "the directory belongs to user id 4321" in err


@pytest.mark.parametrize(
    ("given", "url"),
    [
        ("unix:///x/m.sock", "unix:///x/m.sock"),
        ("/x/m.sock", "unix:///x/m.sock"),
        ("https://host", "https://host:4443"),
        ("https://host:1/", "https://host:1"),
        ("host:99", "https://host:99"),
        ("https://[::1]:5", "https://[::1]:5"),
    ],
)
def test_the_manager_s_address_may_be_short(given, url):
    assert cli.Cli(manager=given).url == url


def test_no_check_certificate_says_what_it_skips_where_it_matters(run, manager):
    manager.add("alice")
    assert run("-k", "list")[2] == ""
    code, _, err = run("-k", "--manager", "https://127.0.0.1:1", "list")
    assert code == 5
    assert "-k: the manager's certificate is not checked" in err.splitlines()[0]


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
    assert err == "dispatcher: alice exists (give them a further agent with --app, or choose another name)\n"


def test_a_further_agent_needs_no_password(run, manager):
    manager.add("alice")
    code, out, _ = run("add", "alice", "--app", "notebook")
    assert (code, out) == (0, "alice:notebook was added\n")


def test_add_for_another_directory_s_people_needs_no_password(run, manager):
    manager.answers["POST /agents"] = lambda _query, body: (201, manager.add(body["name"]))
    assert run("add", "alice", "--no-password")[0] == 0
    assert manager.requests[-1][3] == {"name": "alice"}


def test_remove_waits_and_tells(run, manager):
    manager.add("alice")
    code, out, _ = run("remove", "alice", "--yes")
    assert (code, out) == (0, "alice was removed\n")
    assert manager.agents == {}


def test_remove_can_keep_the_data(run, manager):
    manager.add("alice")
    assert run("remove", "alice", "--keep-data", "-y")[1] == "alice was removed, its data kept\n"
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
        "dispatcher: There is no person nobody (`dispatcher list` shows those there are)\n",
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
        "dispatcher: Cannot write: No space left on device (make room, or send the output elsewhere)\n",
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
    assert run("reset_data", "alice", "--yes")[:2] == (0, "alice has begun afresh\n")
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

    monkeypatch.setattr("dispatcher.cli.logs.time.sleep", stop)
    code, out, _ = run("logs", "-f", "alice")
    assert code == 130
    assert out.splitlines()[-1] == "line 5"
    assert manager.requests[-1][2]["after"] == "5"


def test_top_and_memory_usage(run, manager):
    manager.answers["GET /stats/top"] = 200, {"agents": [
        {"name": "small", "state": "running", "memory": 1024, "cpu_percent": 50.0, "cpu_seconds": 4, "last_used": None},
        {"name": "big", "state": "running", "memory": 2048, "cpu_percent": None, "cpu_seconds": None, "last_used": None},
    ]}  # fmt: skip
    lines = run("top")[1].splitlines()
    assert [line.split()[0] for line in lines[1:]] == ["big", "small"]
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
    assert run("sessions", "revoke", "0123456789abcdef")[:2] == (0, "1 sign-in ended\n")
    manager.answers["DELETE /sessions"] = lambda query, _: (
        200,
        {"revoked": 3 if query == {"user": "alice"} else 0},
    )
    assert run("sessions", "revoke", "--user", "Alice")[1] == "3 sign-ins ended\n"


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
    assert "no: no engine" in run("providers", "list")[1]
    assert run("providers", "check", "subprocess")[0] == 0
    code, out, _ = run("providers", "check")
    assert code == 1
    assert "-> start it" in out


def test_reload_says_what_changed(run, manager):
    manager.answers["POST /reload"] = 200, {"changed": ["apps.demo: memory is 1G now"]}
    code, out, _ = run("reload")
    assert (code, out) == (0, "apps.demo: memory is 1G now\nno proxy runs here; it was told nothing\n")


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
