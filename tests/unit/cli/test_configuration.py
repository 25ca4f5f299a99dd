"""`config show`: what is in force, as a file that says the same, secrets masked."""

import json
import sys

import pytest
import tomli_w

from dispatcher.config.load import parse
from dispatcher.cli import main
from dispatcher.cli.commands.configuration import effective
from dispatcher.config import default_paths
from dispatcher.common.redact import MASK, configuration
from dispatcher.config.plugins import Plugins
from tests.unit.config.test_plugins import FakeProvider, plugin

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib


@pytest.fixture
def plugins():
    found = Plugins([])
    found.register("fake", plugin(providers=[FakeProvider]))
    return found


def test_the_effective_configuration_is_a_fixed_point(plugins):
    first = parse(
        {
            "proxy": {"hsts": "1d"},
            "defaults": {"memory": "1G", "environment": {"A": "1"}},
            "providers": {"fake": {"colour": "red"}},
            "apps": {
                "a": {"provider": "fake", "idle_timeout": False, "fake": {"image": "x"}},
                "b": {"provider": "none"},
            },
        }
    )
    shown = effective(first, plugins)
    text = tomli_w.dumps(shown)
    again = parse(tomllib.loads(text))
    assert effective(again, plugins) == shown
    assert shown["providers"]["fake"] == {"colour": "red"}
    assert shown["apps"]["a"]["fake"] == {"image": "x"}
    assert shown["apps"]["a"]["environment"] == {"A": "1"}
    assert shown["apps"]["a"]["idle_timeout"] is False


def test_secrets_are_masked_and_the_rest_is_not():
    shown = configuration(
        {
            "manager": {"database": "postgresql://user:hunter2@host/db", "token_file": "/etc/tokens"},
            "auth": {"ldap": {"bind_password": "hunter2", "url": "ldaps://x"}},
            "apps": {
                "a": {
                    "environment": {"API_KEY": "hunter2", "DB": "mysql://a:hunter2@h", "TZ": "UTC"},
                    "secrets": ["hunter2"],
                }
            },
            "credentials": "stdin",
        }
    )
    assert "hunter2" not in json.dumps(shown)
    assert shown["manager"] == {"database": f"postgresql://user:{MASK}@host/db", "token_file": "/etc/tokens"}
    assert shown["apps"]["a"]["environment"]["TZ"] == "UTC"
    assert shown["auth"]["ldap"]["url"] == "ldaps://x"
    assert shown["credentials"] == "stdin"


def run(capsys, *arguments):
    code = main(arguments)
    captured = capsys.readouterr()
    return code, captured.out, captured.err


def test_show_and_check_through_the_program(tmp_path, capsys):
    path = tmp_path / "d.toml"
    path.write_text(
        '[manager]\ndatabase = "postgresql://u:hunter2@h/d"\n[apps.a.subprocess]\ncommand = ["sh", "{socket}"]\n'
    )
    code, out, err = run(capsys, "--config", str(path), "config", "show")
    assert (code, err) == (0, "")
    assert "hunter2" not in out
    assert tomllib.loads(out)["apps"]["a"]["subprocess"]["command"] == ["sh", "{socket}"]
    code, out, _ = run(capsys, "--config", str(path), "config", "show", "--json")
    assert json.loads(out)["manager"]["database"].endswith("@h/d")
    assert run(capsys, "--config", str(path), "config", "check") == (
        0,
        f"the configuration is valid: {path} (apps: a)\n",
        "",
    )


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("[manager]\nthreads = 0", "manager.threads: found 0, expected at least 2"),
        ("[apps.a.subprocess]\ncomand = []", "apps.a.subprocess.comand: unknown key, did you mean 'command'?"),
        (
            '[apps.a]\ncommand = ["sh", "{socket}"]',
            "apps.a.command: unknown key, it belongs in [apps.a.subprocess]",
        ),
        (
            '[providers.subprocess]\ncommand = ["sh"]',
            "providers.subprocess.command: unknown key, it belongs in [apps.NAME.subprocess]",
        ),
        ("[apps.a.subprocess]\nmemory = '1G'", "apps.a.subprocess.memory: unknown key, it belongs in [apps.a]"),
        ("[manager]\nworkers = 2", "manager.workers: unknown key, it belongs in [proxy]"),
        ('[apps.a]\nprovider = "dokcer"', "apps.a.provider: there is no plugin 'dokcer'"),
        (f'[manager]\nrun_dir = "/{"x" * 120}"', "manager.run_dir is too long"),
        ('plugins = ["dokcer"]', "plugins: there is no plugin 'dokcer'"),
        ('[auth]\nauthenticator = "locl"', "auth.authenticator: there is no plugin 'locl', did you mean 'local'?"),
        ("[defaults]\nmemory = 1", 'defaults.memory: found 1, expected at least "8M"'),
        ("[proxy]\naccess_log = '/'", "proxy.access_log: / is a directory"),
        ("[proxy]\naccess_log = '/no/where/log'", "proxy.access_log: there is no directory /no/where"),
        ("[", "is not TOML"),
    ],
)
def test_check_names_each_fault(tmp_path, capsys, text, complaint):
    path = tmp_path / "d.toml"
    path.write_text(text)
    code, out, err = run(capsys, "--config", str(path), "config", "check")
    assert (code, out) == (2, "")
    assert complaint in err


NEVER_STARTS = """
[proxy]
port = 8443
[manager]
threads = "many"
state_dir = "{tmp_path}/state"
[apps.gone.subprocess]
command = ["/no/such/program", "{{socket}}"]
[apps.typo.subprocess]
command = ["sh", "-c", "listen {{sockt}} {{other}} {{SOCKET}} ${{HOME}}"]
[apps.mute.subprocess]
command = ["sh"]
[apps.cut]
network = "none"
[apps.cut.subprocess]
command = ["sh", "{{port}}"]
[apps.blind.subprocess]
command = ["sh", "{{socket}}"]
read_only = ["/no/such/directory", "{tmp_path.parent}"]
writable = ["/"]
[apps.away.subprocess]
command = ["sh", "{{socket}}"]
workdir = "/no/such/directory"
[apps.script.subprocess]
command = ["sh", "{tmp_path}/app.py", "{{socket}}"]
[apps.title]
titel = "A"
[apps.title.subprocess]
command = ["sh", "{{socket}}"]
[apps.box]
provider = "docker"
network = "none"
[apps.box.docker]
image = "x"
port = 80
"""


@pytest.mark.bubblewrap
def test_check_finds_apps_that_can_never_start_and_reports_all_in_one_round_one_a_line(tmp_path, capsys):
    path = tmp_path / "d.toml"
    (tmp_path / "app.py").touch()
    path.write_text(NEVER_STARTS.format(tmp_path=tmp_path))
    code, out, err = run(capsys, "--config", str(path), "config", "check")
    assert (code, out) == (2, "")
    first, *lines = err.splitlines()
    assert first == f"dispatcher: {path} is wrong:"
    begins = (
        "  manager.threads: found 'many', expected a whole number",
        "  proxy.port: unknown key, did you mean 'listen'?",
        "  apps.title.titel: unknown key, did you mean 'title'?",
        "  apps.gone.subprocess.command: there is no program '/no/such/program'",
        "  apps.typo.subprocess.command: found '{sockt}', did you mean '{socket}'?",
        "  apps.typo.subprocess.command: found '{SOCKET}', did you mean '{socket}'?",
        "  apps.typo.subprocess.command: the app does not get an address to listen on",
        "  apps.mute.subprocess.command: the app does not get an address to listen on",
        '  apps.cut.network: {port} cannot be reached with network = "none"',
        "  apps.blind.subprocess.read_only: there is no /no/such/directory",
        "  apps.blind.subprocess.writable: / cannot be shown to an agent",
        f"  apps.blind.subprocess.read_only: {tmp_path.parent} cannot be shown to an agent",
        "  apps.away.subprocess.workdir: there is no /no/such/directory",
        f"  apps.script.subprocess.command: {tmp_path}/app.py exists on this host, but is not visible in",
        '  apps.box.docker.port: a port can only be published with network = "private"',
    )
    assert len(lines) == len(begins), err
    for line, begin in zip(lines, begins, strict=True):
        assert line.startswith(begin)


def test_schema_is_json_schema(capsys):
    code, out, _ = run(capsys, "providers", "schema", "subprocess")
    assert code == 0
    found = json.loads(out)
    assert found["apps.APP.subprocess"]["properties"]["command"]["type"] == "array"
    code, _, err = run(capsys, "providers", "schema", "dokcer")
    assert code == 2
    assert "did you mean 'docker'" in err


SECRETS = """
[apps.a.subprocess]
command = ["sh", "{{socket}}"]
[apps.a.secrets]
API_TOKEN = "{file}"
OTHER = "env:NO_SUCH_VARIABLE_HERE"
"""


def test_secrets_are_checked_and_their_contents_never_shown(tmp_path, capsys):
    secret = tmp_path / "token"
    path = tmp_path / "d.toml"
    path.write_text(SECRETS.format(file=secret))
    code, out, err = run(capsys, "--config", str(path), "config", "check")
    assert (code, out) == (2, "")
    assert f"apps.a.secrets.API_TOKEN: cannot read {secret}: there is no such file" in err
    secret.write_text("hunter2")
    secret.chmod(0o644)
    code, out, err = run(capsys, "--config", str(path), "config", "check")
    assert (code, out) == (0, f"the configuration is valid: {path} (apps: a)\n")
    assert f"warning: apps.a.secrets.API_TOKEN: every user of this host can read {secret}" in err
    assert "warning: apps.a.secrets.OTHER: the variable NO_SUCH_VARIABLE_HERE is missing" in err
    code, shown, _ = run(capsys, "--config", str(path), "config", "show")
    assert tomllib.loads(shown)["apps"]["a"]["secrets"] == {
        "API_TOKEN": str(secret),
        "OTHER": "env:NO_SUCH_VARIABLE_HERE",
    }
    assert "hunter2" not in out + err + shown


def test_a_directory_is_no_program(tmp_path, capsys):
    file = tmp_path / "a.toml"
    file.write_text('[apps.x.subprocess]\ncommand = ["/usr/bin/", "{socket}"]\n')
    assert main(["--config", str(file), "config", "check"]) == 2
    assert "there is no program '/usr/bin/'" in capsys.readouterr().err


def test_the_check_names_the_file_and_another_one_of_the_host(tmp_path, capsys, monkeypatch):
    own, system = tmp_path / "own.toml", tmp_path / "system.toml"
    system.touch()
    monkeypatch.delenv("DISPATCHER_CONFIG", raising=False)
    monkeypatch.setattr(default_paths, "config_file", lambda: own)
    monkeypatch.setattr(default_paths, "SYSTEM_CONFIG", system)
    code, out, err = run(capsys, "config", "check")
    assert (code, out) == (0, f"there is no {own}: the defaults are in force (apps: demo)\n")
    assert f"{system} is another file" in err
    assert "another file" not in run(capsys, "--config", str(system), "config", "check")[2]


def test_a_value_that_is_not_valid_is_not_missing_as_well(capsys, tmp_path):
    path = tmp_path / "dispatcher.toml"
    path.write_text(
        '[proxy]\npublic_url = "https://apps.example.org/auth"\n'
        '[auth]\nauthenticator = "oidc.corp"\n'
        '[auth.oidc.corp]\nissuer = "https://login.example.org"\nclient_id = "dispatcher"\n'
    )
    code, _, err = run(capsys, "--config", str(path), "config", "check")
    assert code == 2 and err.count("proxy.public_url: ") == 1
    assert "without a path" in err and "is missing" not in err
