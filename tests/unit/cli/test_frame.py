"""The frame of the command line: help, usage, where the manager is, and what is said when it is not."""

import grp
import json
import os
import socket
import subprocess
import sys
import threading
import time
from types import SimpleNamespace

import click
import pytest

from dispatcher import cli
from dispatcher.client import trust
from dispatcher.cli import ALIASES, SECTIONS, program
from tests.support import ordinary
from tests.support.fake_manager import FakeManager, problem

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


# The frame.


def test_every_command_of_the_design_is_there():
    wanted = """serve manager proxy demo reload add remove passwd list running info start stop suspend restart logs
    why top memory-usage reset-data purge init providers plugin config sessions tokens auth sync import doctor""".split()
    assert sorted(wanted) == ALL
    assert {("providers", "list"), ("providers", "check"), ("providers", "schema"), ("plugin", "list"), ("plugin", "new"), ("plugin", "check"), ("config", "check"),
            ("config", "show"), ("sessions", "list"), ("sessions", "revoke"), ("tokens", "create"), ("tokens", "list"), ("tokens", "revoke"), ("auth", "test"), ("auth", "release")} <= set(COMMANDS)  # fmt: skip


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


@pytest.mark.parametrize("group", ["sessions", "tokens", "providers", "plugin", "config"])
def test_a_group_without_a_command_prints_its_help_with_its_lines(run, group):
    code, _, err = run(group)
    assert code == 2
    assert f"Usage: dispatcher {group}" in err
    assert err.count("\n") > 5


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
        (["ls"], "There is no command 'ls': did you mean 'list'?"),
        (["status"], "There is no command 'status': did you mean 'info'?"),
        (["rm"], "There is no command 'rm': did you mean 'remove'?"),
        (["delete", "alice"], "There is no command 'delete': did you mean 'remove'?"),
        (["strat", "alice"], "There is no command 'strat': did you mean 'start'?"),
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
        (["sessions", "revoke"], "Give the ID of one session, or --user NAME"),
        (["tokens", "revoke"], "Give the ID of one token, or --user NAME"),
        (["tokens", "create", "--scope", "read"], "Give the owner: --user NAME or --service NAME"),
        (["tokens", "create", "--user", "alice"], "Give at least one --scope (metrics: GET /metrics"),
        (["providers", "check", "--app", "x"], "--app needs the NAME of its provider"),
        (["providers", "nonsense"], "No such command"),
        (["--manager", "ftp://x", "list"], "'ftp://x' is not the address of a manager"),
        (["--token-file", "/nonexistent", "--manager", "https://localhost", "list"], "Cannot read /nonexistent"),
        (["--manager", "https://localhost", "--fingerprint", "zz", "list"], "'zz' is not a fingerprint"),
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
    assert "the socket does not exist (start it with `dispatcher serve`" in err


@pytest.fixture
def starting(short_tmp):
    """A manager that has its lock and does not listen yet: what makes it, and its socket."""
    from dispatcher.manager.files.manager_dirs import Lock

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
        assert ("does not exist" if missing else "connection refused") in err
        assert time.monotonic() - began < 1
        path.unlink(missing_ok=True)


def test_control_characters_of_a_manager_s_error_do_not_reach_the_terminal(run, manager):
    manager.answers["GET /agents"] = problem(409, "conflict", "a\x1b[31mb\nc")
    code, _, err = run("list")
    assert code == 4
    assert err == "dispatcher: a\\x1b[31mb c\n"


def test_ctrl_c_is_clean(run, manager, monkeypatch):
    monkeypatch.setattr(
        "dispatcher.client.manager_client.ManagerClient.agents",
        lambda *_: (_ for _ in ()).throw(KeyboardInterrupt),
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
    uid = os.geteuid() or 1234
    (short_tmp / "run").mkdir()
    os.chown(short_tmp / "run", uid, -1)
    monkeypatch.setattr("os.geteuid", lambda: uid)
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(short_tmp / "run"))
    monkeypatch.setenv("XDG_CONFIG_HOME", str(short_tmp / "config"))
    monkeypatch.setattr("dispatcher.cli.context.SYSTEM_RUN_DIR", short_tmp / "system")
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


@pytest.mark.root
@pytest.mark.parametrize("variable", ["HOME", "XDG_RUNTIME_DIR"])
def test_files_of_another_user_s_home_are_skipped(short_tmp, variable):
    """As after `su` without a dash, which keeps the variables."""
    own, other = short_tmp / "own", short_tmp / "other"
    for place in (own, other):
        place.mkdir(mode=0o700)
    os.chown(own, 4242, 4242)
    code = f"{variable}={other} exec {sys.executable} -m dispatcher list"
    done = subprocess.run(
        ordinary.command(4242, own, "sh", "-c", code), capture_output=True, text=True, timeout=60
    )
    assert "The manager does not answer" in done.stderr
    assert "Traceback" not in done.stderr


def test_a_named_configuration_must_exist(nowhere, run):
    code, _, err = run("--config", "/nonexistent.toml", "list")
    assert code == 2
    assert "Cannot read /nonexistent.toml: the file does not exist" in err


def test_options_of_the_program_may_follow_the_command(nowhere, run):
    for words in (["list", "--config", "/nonexistent.toml"], ["list", "--config=/nonexistent.toml"]):
        code, _, err = run(*words)
        assert code == 2
        assert "Cannot read /nonexistent.toml: the file does not exist" in err
    assert "Bad name '--config'" in run("info", "--", "--config")[2]
    assert "Option '--config' requires an argument" in run("list", "--config")[2]


def test_a_broken_configuration_is_one_line(nowhere, run):
    (nowhere / "x.toml").write_text("[")
    code, _, err = run("--config", str(nowhere / "x.toml"), "config", "check")
    assert code == 2
    assert err.count("\n") == 1
    code, _, err = run("--config", str(nowhere), "list")
    assert code == 2
    assert f"Cannot read {nowhere}: Is a directory (name the file, such as {nowhere}/dispatcher.toml)" in err


@pytest.mark.parametrize("manager_table", ["", '[manager]\nrun_dir = "{run}"\n'])
def test_a_syntax_error_in_the_configuration_stops_no_command_that_needs_none(nowhere, run, manager_table):
    path, sockets = nowhere / "x.toml", nowhere / "run/dispatcher" if not manager_table else nowhere / "own"
    sockets.mkdir(parents=True)
    path.write_text(manager_table.format(run=sockets) + "[proxy\n")
    with FakeManager(sockets / "manager.sock") as manager:
        manager.add("alice", "running")
        for words in (["list"], ["stop", "alice"], ["why", "alice"]):
            code, _, err = run("--config", str(path), *words)
            assert code == 0, err
            assert err.startswith(f"dispatcher: {path} is not TOML: ")
            assert err.count("\n") == 1
        code, _, err = run("--config", str(path), "--manager", manager.url, "list")
        assert (code, err) == (0, "")


@pytest.mark.parametrize(
    ("words", "meant"),
    [(["strat", "x"], "start"), (["LIST"], "list"), (["prov"], "providers"), (["frobnicate"], "")],
)
def test_a_misspelt_command_is_answered_with_the_nearest(run, words, meant):
    code, _, err = run(*words)
    assert code == 2
    assert (f"did you mean '{meant}'?" in err) if meant else "did you mean" not in err


@pytest.mark.parametrize(
    ("words", "meant"),
    [(["list", "--jsn"], "--json"), (["logs", "x", "--tial", "3"], "--tail"), (["list", "--zzz"], "")],
)
def test_a_misspelt_option_is_answered_with_the_nearest(run, words, meant):
    code, _, err = run(*words)
    assert code == 2
    assert (f"did you mean '{meant}'? (see" in err) if meant else "No such option '--zzz' (see" in err


@pytest.mark.parametrize("installed", [True, False])
def test_the_installed_service_is_named_where_there_is_one(run, short_tmp, monkeypatch, installed):
    monkeypatch.setattr("dispatcher.client.trust.UNIT_DIRECTORIES", [short_tmp])
    if installed:
        (short_tmp / "dispatcher-manager.service").touch()
    err = run("--manager", f"unix://{short_tmp}/none.sock", "list")[2]
    assert ("start it with `systemctl start dispatcher-manager`" in err) is installed
    assert ("start it with `dispatcher serve`" in err) is not installed


def test_who_may_not_connect_is_told_which_group_may(short_tmp, monkeypatch):
    path = short_tmp / "m.sock"
    path.touch()
    group = grp.getgrgid(path.stat().st_gid).gr_name
    told = trust.how_to_be_allowed(str(path))
    assert ("become root:" in told) if group == "root" else f"usermod -aG {group}" in told
    monkeypatch.setattr(grp, "getgrgid", lambda _: SimpleNamespace(gr_name="dispatcher-admin"))
    assert "a member of the group dispatcher-admin (usermod -aG dispatcher-admin USER)" in trust.how_to_be_allowed(
        str(path)
    )
    assert "manager.admin_group" in trust.how_to_be_allowed(f"{path}/none")


def test_a_manager_that_was_started_at_the_same_moment_is_waited_for(run, short_tmp, monkeypatch):
    monkeypatch.setattr("dispatcher.cli.context.PATIENCE", 0.5)
    command = [sys.executable, "-c", "import time; time.sleep(20)", "dispatcher", "serve"]
    with subprocess.Popen(command) as process:
        try:
            began = time.monotonic()
            code, _, err = run("--manager", f"unix://{short_tmp}/none.sock", "list")
            assert (code, time.monotonic() - began > 0.5) == (5, True)
            assert "it is still starting (try again" in err
        finally:
            process.kill()


@pytest.mark.parametrize(
    ("given", "url"),
    [
        ("unix:///x/m.sock", "unix:///x/m.sock"),
        ("/x/m.sock", "unix:///x/m.sock"),
        ("https://host", "https://host"),
        ("host", "https://host"),
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
