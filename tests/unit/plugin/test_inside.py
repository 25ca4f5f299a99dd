"""What an app finds: placeholders filled in, and its environment."""

from dataclasses import replace

import pytest
from dispatcher.plugin import AgentSpec, App, ConfigError, Inside, Limits, Table

INSIDE = Inside(socket="/run/agent/s", data="/data", port=20001, tmp="/data/.tmp", secrets="/run/secrets")


def spec(tmp_path, env):
    return AgentSpec(
        installation="00000000",
        agent="alice:notes",
        user="alice",
        app=App(name="notes", provider="p", options=Table(), environment=env),
        uid=200001,
        gid=200001,
        proxy_gid=1,
        data_dir=tmp_path / "data",
        run_dir=tmp_path / "run",
        log_dir=tmp_path / "log",
    )


@pytest.mark.parametrize(
    "text, filled",
    [
        ("{socket}", "/run/agent/s"),
        ("--addr=unix:{socket}", "--addr=unix:/run/agent/s"),
        ("http://127.0.0.1:{port}/", "http://127.0.0.1:20001/"),
        ("{data}/notes", "/data/notes"),
        ("{socket}{port}{data}", "/run/agent/s20001/data"),
        ("{{socket}}", "{/run/agent/s}"),
        ('{"a": {"b": 1}}', '{"a": {"b": 1}}'),
        ("{user} {} {0} {socket.name} {socket!r}", "{user} {} {0} {socket.name} {socket!r}"),
        ("$(id) `id` ; rm -rf ~", "$(id) `id` ; rm -rf ~"),
        ("", ""),
    ],
)
def test_placeholders(text, filled):
    assert INSIDE.fill(text) == filled


def test_what_is_filled_in_is_not_filled_again():
    assert Inside(socket="{data}", data="{port}", port=1).fill("{socket} {data}") == "{data} {port}"


def test_the_environment_is_what_is_promised_and_no_more(tmp_path):
    found = INSIDE.environment(
        spec(tmp_path, {"WHERE": "{data}/x", "ODD": "it's $HOME\n`id`"}),
        limits=Limits(pids=7),
        shell="/bin/bash",
        others={"TZ": "Europe/Rome", "WHERE": "elsewhere"},
    )
    assert found == {
        "PATH": "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin",
        "LANG": "C.UTF-8",
        "HOME": "/data",
        "USER": "alice",
        "LOGNAME": "alice",
        "SHELL": "/bin/bash",
        "TMPDIR": "/data/.tmp",
        "TZ": "Europe/Rome",
        "WHERE": "/data/x",
        "ODD": "it's $HOME\n`id`",
        "DISPATCHER_AGENT": "alice:notes",
        "DISPATCHER_USER": "alice",
        "DISPATCHER_DATA": "/data",
        "DISPATCHER_PIDS_LIMIT": "7",
    }


def test_an_app_may_set_home_but_not_who_it_is(tmp_path):
    made = replace(spec(tmp_path, {"HOME": "/tmp", "DISPATCHER_USER": "mallory"}), secrets={"KEY": "value"})
    found = INSIDE.environment(made)
    assert found["HOME"] == "/tmp"
    assert found["DISPATCHER_USER"] == "alice"
    assert found["DISPATCHER_SECRETS"] == "/run/secrets"


@pytest.mark.parametrize("env", [{"A B": "x"}, {"": "x"}, {"A=B": "x"}, {"1A": "x"}, {"A": "x\0y"}])
def test_variables_that_cannot_be_are_refused(tmp_path, env):
    with pytest.raises(ConfigError, match="cannot be a variable"):
        INSIDE.environment(spec(tmp_path, env))


def test_placeholders_are_found_in_commands_and_variables():
    assert Inside.placeholders("--at={socket}", "{data}/{x}", "{{port}}") == {"socket", "data", "port"}
    assert Inside.placeholders() == set()
