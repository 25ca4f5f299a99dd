"""`dispatcher init`: a first configuration that is valid, commented, and never takes the place of another."""

import errno
import io
import json
import os
import shlex
from pathlib import Path

import pytest

from dispatcher.cli import main
from dispatcher.config.load import load
from tests.support.terminal import on_a_terminal

JUPYTER = "/bin/sh -c 'exec x --sock={socket}' {data}"


def init(path, *arguments):
    return main(["--config", str(path), "init", *arguments])


def test_without_choices_it_is_the_demo(tmp_path, capsys):
    path = tmp_path / "new" / "dispatcher.toml"
    assert init(path, "--yes") == 0
    out = capsys.readouterr().out
    assert f"dispatcher --config {path} serve" in out
    assert f"dispatcher --config {path} add NAME" in out
    config = load(path)
    assert list(config.apps) == ["demo"]
    assert config.proxy.listen == ["127.0.0.1:8080"]
    assert "# tls_cert = " in path.read_text()


def test_others_cannot_write_it_whatever_the_umask(tmp_path):
    """Ubuntu's users have 002; `doctor` reports such a file as an error."""
    path = tmp_path / "new/dispatcher.toml"
    before = os.umask(0)
    try:
        assert init(path, "--yes") == 0
    finally:
        os.umask(before)
    assert (path.stat().st_mode & 0o777, path.parent.stat().st_mode & 0o777) == (0o644, 0o755)


def test_passwords_in_the_clear_are_warned_of(tmp_path, capsys):
    assert init(tmp_path / "a.toml", "--yes", "--listen", "0.0.0.0:8080") == 0
    assert "passwords cross the network unencrypted" in capsys.readouterr().err
    assert init(tmp_path / "b.toml", "--yes", "--listen", "127.0.0.1:8080") == 0
    assert "warning" not in capsys.readouterr().err


def test_a_command_is_split_like_in_a_shell(tmp_path):
    path = tmp_path / "a.toml"
    assert init(path, "--app", "lab-x", "--title", 'My "lab"', "--command", JUPYTER, "--listen", "0.0.0.0:80") == 0
    config = load(path)
    app = config.apps["lab-x"]
    assert app.title == 'My "lab"'
    assert app.provider_table("subprocess")["command"] == ["/bin/sh", "-c", "exec x --sock={socket}", "{data}"]
    assert app.network == "none"
    assert config.proxy.listen == ["0.0.0.0:80"]


def test_an_app_with_a_port_gets_a_network(tmp_path, capsys):
    path = tmp_path / "a.toml"
    arguments = ("--app", "files", "--image", "busybox:1.36", "--port", "8080", "--command", "httpd -p {port}")
    assert init(path, "--json", *arguments) == 0
    app = load(path).apps["files"]
    assert app.provider == "docker"
    assert app.network == "private"
    assert app.provider_table("docker") == {
        "image": "busybox:1.36",
        "port": 8080,
        "command": ["httpd", "-p", "{port}"],
    }
    assert json.loads(capsys.readouterr().out)["path"] == str(path)


@pytest.mark.parametrize("what", ["file", "dangling link"])
def test_an_existing_file_stays(tmp_path, capsys, what):
    path = tmp_path / "a.toml"
    if what == "file":
        path.write_text("mine")
    else:
        path.symlink_to(tmp_path / "elsewhere")
    assert init(path, "--yes") == 4
    assert "already" in capsys.readouterr().err
    assert not (tmp_path / "elsewhere").exists()
    assert what != "file" or path.read_text() == "mine"


def test_nothing_is_written_that_has_faults(tmp_path, capsys):
    path = tmp_path / "new" / "a.toml"
    chosen = ["--app", "lab", "--command", "/bin/nothing {sokcet}", "--public-url", "apps.example"]
    assert init(path, *chosen) == 2
    err = capsys.readouterr().err
    assert "proxy.public_url" in err
    assert "apps.lab.subprocess.command" in err
    assert f"{path} was not written" in err
    again = err[err.index("repeat: dispatcher ") :].splitlines()[0].removeprefix("repeat: ").removesuffix(")")
    assert shlex.split(again) == ["dispatcher", "--config", str(path), "init", *chosen]
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("option", "value", "told"),
    [
        ("--app", "My Lab", "apps"),
        ("--provider", "dokcer", "did you mean 'docker'?"),
        ("--listen", "localhost", "an address such as 127.0.0.1:8080"),
        ("--public-url", "apps.example", "proxy.public_url"),
        ("--tls-cert", "/no/such/cert.pem", "proxy.tls_key: is missing"),
        ("--image", "a b", "apps.app.docker.image"),
        ("--command", "/bin/sh", "the app does not get an address to listen on"),
    ],
)
def test_a_bad_value_of_an_option_is_told_and_not_written(tmp_path, capsys, option, value, told):
    path = tmp_path / "a.toml"
    assert init(path, option, value) == 2
    assert told in capsys.readouterr().err
    assert not path.exists()


def test_a_full_disk_leaves_no_half_of_a_file(tmp_path, capsys, monkeypatch):
    class Full(io.StringIO):
        def flush(self):
            raise OSError(errno.ENOSPC, "No space left on device")

    def open_full(path, mode, **more):
        open(path, mode, **more).close()
        return Full()

    path = tmp_path / "a.toml"
    monkeypatch.setattr("dispatcher.cli.commands.init.open", open_full, raising=False)
    assert init(path, "--yes") == 2
    assert "No space left" in capsys.readouterr().err
    assert not path.exists()


def test_answers_that_are_piped_are_not_ignored_in_silence(tmp_path, capsys, monkeypatch):
    path = tmp_path / "a.toml"
    monkeypatch.setattr("sys.stdin", io.StringIO("lab\nsubprocess\n"))
    assert init(path) == 2
    err = capsys.readouterr().err
    assert "standard input is not a terminal" in err
    assert "--yes" in err
    assert not path.exists()
    assert init(path, "--listen", "127.0.0.1:81") == 0
    assert "nothing is asked" in capsys.readouterr().err


def test_a_quotation_mark_that_is_not_closed(tmp_path, capsys):
    assert init(tmp_path / "a.toml", "--command", "x '") == 2
    assert "quotation" in capsys.readouterr().err
    assert not (tmp_path / "a.toml").exists()


def test_a_path_that_cannot_be_written(tmp_path, capsys):
    (tmp_path / "file").write_text("")
    assert init(tmp_path / "file" / "a.toml", "--yes") == 2
    assert "Cannot write" in capsys.readouterr().err


def test_on_a_terminal_it_asks(tmp_path):
    path = tmp_path / "a.toml"
    answers = [b"lab\n", b"\n", JUPYTER.encode() + b"\n", b"127.0.0.1:9000\n", b"https://apps.example.org\n"]
    code, out = on_a_terminal(["--config", str(path), "init"], {}, answers)
    assert code == 0, out
    config = load(path)
    assert config.proxy.listen == ["127.0.0.1:9000"]
    assert config.proxy.public_url == "https://apps.example.org"
    assert list(config.apps) == ["lab"]


def test_an_answer_that_cannot_be_right_is_asked_again(tmp_path):
    path = tmp_path / "a.toml"
    answers = [b"my lab\n", b"lab\n", b"Files\n", b"subprocess\n", JUPYTER.encode() + b"\n", b"localhost\n"]
    code, out = on_a_terminal(
        ["--config", str(path), "init"], {}, [*answers, b"127.0.0.1:9000\n", b"lab.lan\n", b"\n"]
    )
    assert code == 0, out
    assert "use 1 to 32 of a-z" in out
    assert "an address such as 127.0.0.1:8080" in out
    config = load(path)
    assert list(config.apps) == ["lab"]
    assert config.proxy.listen == ["127.0.0.1:9000"]
    assert config.proxy.public_url == ""


def test_the_words_of_a_command_stay_as_they_are(tmp_path):
    path, script = tmp_path / "a.toml", "[ -n x ] && exec y {socket} 'a,  b' # [ c ]"
    assert init(path, "--app", "lab", "--command", f'/bin/sh -c "{script}"') == 0
    command = load(path).apps["lab"].provider_table("subprocess")["command"]
    assert command == ["/bin/sh", "-c", script]
