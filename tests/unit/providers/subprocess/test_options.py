"""What the provider `subprocess` takes for options, and what it makes of placeholders and environments."""

from pathlib import Path


import pytest
from dispatcher_subprocess.options import AppOptions, Options, endpoint_kind
from dispatcher_subprocess.provider import SubprocessProvider
from pydantic import ValidationError

from dispatcher.config.load import parse
from dispatcher.plugin.errors import ConfigError
from dispatcher.plugin.model import AgentSpec, App
from dispatcher.config.plugins import Plugins


def app(command=("app", "{socket}"), env=None, **options):
    return App(
        name="notes",
        provider="subprocess",
        options=AppOptions(command=list(command), **options),
        environment=env or {},
    )


def spec(tmp_path, **changes):
    return AgentSpec(
        installation="00000000",
        agent="alice:notes",
        user="alice",
        app=app(**changes),
        uid=200001,
        gid=200001,
        proxy_gid=1,
        data_dir=tmp_path / "data",
        run_dir=tmp_path / "run",
        log_dir=tmp_path / "log",
    )


@pytest.mark.parametrize(
    "command, env, kind",
    [
        (["app", "{socket}"], {}, "unix"),
        (["app", "{port}"], {}, "tcp"),
        (["app"], {"LISTEN": "unix:{socket}"}, "unix"),
        (["app"], {"PORT": "{port}"}, "tcp"),
    ],
)
def test_the_endpoint_is_what_the_command_asks_for(command, env, kind):
    assert endpoint_kind(app(command, env)) == kind


@pytest.mark.parametrize(
    ("command", "env"), [(["app", "{port}", "{socket}"], {}), (["app", "--uds={socket}"], {"PORT": "{port}"})]
)
def test_an_app_has_one_address(command, env):
    with pytest.raises(ConfigError, match="{socket} and {port} exclude each other"):
        endpoint_kind(app(command, env))


@pytest.mark.parametrize("command", [["app"], ["app", "{sokcet}"], ["app", "{data}"], ["app", "{ socket }"]])
def test_an_app_must_be_told_where_to_listen(command):
    with pytest.raises(ConfigError) as caught:
        endpoint_kind(app(command))
    assert "apps.notes.subprocess.command" in str(caught.value)
    assert "{socket}" in caught.value.fix


@pytest.mark.parametrize(
    "options, names",
    [
        ({}, "command"),
        ({"command": []}, "command"),
        ({"command": "app {socket}"}, "command"),
        ({"command": ["", "{socket}"]}, "command"),
        ({"command": ["--privileged", "{socket}"]}, "command"),
        ({"command": ["app", "a\0b"]}, "command"),
        ({"command": ["app"], "workdir": "relative"}, "workdir"),
        ({"command": ["app"], "read_only": ["etc"]}, "read_only"),
        ({"command": ["app"], "writable": ["/srv/../root"]}, "writable"),
        ({"command": ["app"], "hide": ["/a\0"]}, "hide"),
        ({"command": ["app"], "pass_environment": ["A=B"]}, "pass_environment"),
        ({"command": ["app"], "umask": "999"}, "umask"),
        ({"command": ["app"], "umask": 7}, "umask"),
        ({"command": ["app"], "tmp_size": 0}, "tmp_size"),
        ({"command": ["app"], "nofile": 1}, "nofile"),
        ({"command": ["app"], "nice": 20}, "nice"),
        ({"command": ["app"], "image": "debian"}, "image"),
    ],
)
def test_bad_app_options_are_refused_by_name(options, names):
    with pytest.raises(ValidationError) as caught:
        AppOptions.model_validate(options)
    assert names in str(caught.value)


@pytest.mark.parametrize(
    "options",
    [
        {"bubblewrap": "sometimes"},
        {"log_size": "1 parsec"},
        {"log_files": 0},
        {"ports": [80, 90]},
        {"ports": [30000, 20000]},
        {"deny": ["everything"]},
        {"private_network": "vpn"},
        {"bubblewarp": "auto"},
    ],
)
def test_bad_backend_options_are_refused(options):
    with pytest.raises(ValidationError):
        Options.model_validate(options)


def test_errors_name_the_full_path_and_the_nearest_key():
    plugins = Plugins([])
    plugins.register("subprocess", __import__("dispatcher_subprocess"))
    config = parse({"apps": {"notes": {"subprocess": {"comand": ["x"], "command": ["x", "{socket}"]}}}})
    with pytest.raises(ConfigError) as caught:
        config.template("notes", plugins)
    assert "apps.notes.subprocess.comand" in str(caught.value)
    assert "did you mean 'command'?" in str(caught.value)


def test_the_plugin_registers_its_provider():
    plugins = Plugins([])
    plugins.register("subprocess", __import__("dispatcher_subprocess"))
    assert plugins.provider("subprocess") is SubprocessProvider


def test_every_option_is_documented():
    text = (Path(__file__).parents[4] / "docs/reference/subprocess.md").read_text(encoding="utf-8")
    for model in (Options, AppOptions):
        for name in model.model_fields:
            assert f"| `{name}` |" in text, name
