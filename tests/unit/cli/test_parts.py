"""The command line's small parts: how states and addresses are shown; passwords that can be read aloud."""

import json
import os
import subprocess
import sys

import pytest

from dispatcher.config.load import parse
from dispatcher.plugin.errors import BadRequest
from dispatcher.cli.commands.demo import MARKER, _home, _write_config, pronounceable
from dispatcher.cli.ui.output import Output, clean, columns
from dispatcher.cli.serve import _PROGRAM, _RUN_MODULE, browser_url, listen_endpoint, tunnel
from dispatcher.cli.ui.progress import describe


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("plain ünï 李", "plain ünï 李"),
        ("\x1b[2J", "\\x1b[2J"),
        ("a\u202eb", "a\\u202eb"),
        ("a\nb\t", "a\nb\t"),
        ("\r", "\\r"),
        ("\ud800", "\\ud800"),
    ],
)
def test_control_characters_are_shown_not_sent(text, shown):
    assert clean(text) == shown


def test_json_controls_no_terminal(capsys):
    value = {"lines": ["plain ünï 李", "\x1b[2J \x9b31m \x7f a\u202eb \U000e0001 \ud800 \t"]}
    Output(json=True).data(value)
    shown = capsys.readouterr().out
    assert "plain ünï 李" in shown
    assert shown.replace("\n", "").isprintable()
    assert json.loads(shown) == value


def test_columns_line_up():
    assert columns(["A", "B"], [False, True], [["long", "1"], ["x", "22"]]) == ["A      B", "long   1", "x     22"]


@pytest.mark.parametrize(
    ("state", "text"),
    [
        ({}, "is gone"),
        ({"state": "running"}, "running"),
        (
            {"state": "starting", "stage": "pulling", "detail": "layer 3", "fraction": 0.42},
            "starting: pulling, layer 3 (42%)",
        ),
    ],
)
def test_a_state_is_a_phrase(state, text):
    assert describe(state) == text


@pytest.mark.parametrize(
    ("address", "endpoint"),
    [
        ("127.0.0.1:80", "tcp:127.0.0.1:80"),
        ("0.0.0.0:80", "tcp:127.0.0.1:80"),
        ("[::]:80", "tcp:[::1]:80"),
        ("[::1]:80", "tcp:[::1]:80"),
        ("unix:/x", "unix:/x"),
        ("systemd", "None"),
    ],
)
def test_where_to_reach_a_listener(address, endpoint):
    assert str(listen_endpoint(address)) == endpoint


@pytest.mark.parametrize(
    ("proxy", "url"),
    [
        ({}, "http://127.0.0.1:8080/"),
        ({"listen": ["0.0.0.0:443"], "tls_cert": "/c", "tls_key": "/k"}, "https://127.0.0.1:443/"),
        ({"listen": ["unix:/x", "[::]:81"]}, "http://[::1]:81/"),
        ({"public_url": "https://apps.example.org"}, "https://apps.example.org/"),
        ({"listen": ["unix:/x"]}, "unix:/x"),
    ],
)
def test_what_people_open(proxy, url):
    assert browser_url(parse({"proxy": proxy})) == url


def test_demo_passwords_differ_and_can_be_read_aloud():
    made = {pronounceable() for _ in range(200)}
    assert len(made) == 200
    assert all(len(password) == 17 for password in made)
    for password in made:
        for half in password.split("-"):
            assert set(half[1::2]) <= set("aeiou")
            assert not set(half[::2]) & set("aeiou")


@pytest.mark.parametrize(
    ("url", "connection", "command"),
    [
        ("http://127.0.0.1:8080/", "192.0.2.7 51000 192.0.2.1 22", "ssh -L 8080:127.0.0.1:8080 eve@192.0.2.1"),
        ("http://[::1]:80/", "2001:db8::7 51000 2001:db8::1 2222", "ssh -p 2222 -L 80:[::1]:80 eve@2001:db8::1"),
        ("http://192.0.2.1:8080/", "192.0.2.7 51000 192.0.2.1 22", ""),
        ("/run/proxy.sock", "192.0.2.7 51000 192.0.2.1 22", ""),
        ("http://127.0.0.1:8080/", "", ""),
    ],
)
def test_the_tunnel_to_a_remote_host(url, connection, command):
    assert tunnel(url, {"SSH_CONNECTION": connection, "USER": "eve"}) == command


@pytest.mark.parametrize("program", [_PROGRAM, ["-c", _RUN_MODULE]], ids=["this Python", "Python 3.10"])
def test_daemons_import_nothing_from_the_working_directory(tmp_path, program):
    """Root may start `serve` in a directory of another user, such as /tmp."""
    for name in ("dispatcher", "click", "logging", "runpy"):
        (tmp_path / f"{name}.py").write_text("raise SystemExit('planted')")
    command = [sys.executable, *program, "--config", "/none", "config", "check"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert "planted" not in done.stderr
    assert "Cannot read /none" in done.stderr


@pytest.mark.root
def test_a_demo_does_not_follow_the_links_of_another_user(tmp_path):
    """Its documentation names a directory below /tmp, where another user may have made that before."""
    theirs, file_of_host = tmp_path / "try", tmp_path / "passwd"
    file_of_host.write_text("the host's")
    theirs.mkdir()
    (theirs / MARKER).touch()
    (theirs / "dispatcher.toml").symlink_to(file_of_host)
    os.chown(theirs, 65534, 65534)
    (tmp_path / "link").symlink_to(theirs)
    for directory in (theirs, tmp_path / "link"):
        with pytest.raises(BadRequest, match="cannot be used"), _home(directory, keep=True) as (home, run_dir):
            _write_config(home, run_dir, 8080)
    assert file_of_host.read_text() == "the host's"
