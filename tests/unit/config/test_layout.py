"""Where everything lives: defaults by user, short sockets, nothing outside."""

import pytest

from dispatcher.config.load import parse
from dispatcher.config import default_paths
from dispatcher.plugin.errors import ConfigError
from dispatcher.config.layout import MAX_SOCKET_PATH, Paths

HARD = ["alice", "a" * 255, "../x", "a/b", "李雷", "a@b.c:notebook"]


def paths(run_dir="/run/dispatcher", state_dir="/var/lib/dispatcher"):
    return Paths.of(parse({"manager": {"run_dir": run_dir, "state_dir": state_dir}}))


@pytest.mark.parametrize("agent", HARD)
def test_paths_of_an_agent_stay_inside_for_any_name(agent):
    found = paths()
    for path, parent in (
        (found.endpoint_dir(agent), found.run_dir / "a"),
        (found.agent_dir(agent), found.state_dir / "agents"),
    ):
        assert path.parent == parent
        assert ".." not in path.parts
    assert len(str(found.endpoint_dir(agent) / "s")) <= MAX_SOCKET_PATH


def test_two_agents_never_share_a_directory():
    found = paths()
    names = ["a-b:c", "a:b-c", "a-b", "a_b"]
    assert len({found.endpoint_dir(name) for name in names}) == len(names)
    assert len({found.agent_dir(name) for name in names}) == len(names)


def test_a_run_directory_that_is_too_long_is_refused_with_the_numbers():
    longest = "/" + "x" * 88
    with pytest.raises(
        ConfigError,
        match=r"manager\.run_dir is too long: a socket's path would have \d+ bytes; the kernel's limit is 107",
    ):
        paths(run_dir=longest + "y" * 20)


def test_relative_directories_become_absolute(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("dispatcher.config.layout.MAX_SOCKET_PATH", 4096)
    assert paths(run_dir="run").run_dir == tmp_path / "run"


def test_the_listeners_are_apart():
    found = paths()
    sockets = {found.manager_socket, found.proxy_socket, found.feed_socket, found.portal_socket}
    assert len(sockets) == 4
    assert found.database.parent == found.state_dir
    assert found.provider_run("docker").is_relative_to(found.run_dir)
    assert found.provider_state("docker").is_relative_to(found.state_dir)
    assert found.secrets_dir.is_relative_to(found.state_dir)


@pytest.fixture
def ordinary(monkeypatch, tmp_path):
    monkeypatch.setattr("os.geteuid", lambda: 1000)
    for name in ("DISPATCHER_CONFIG", "XDG_CONFIG_HOME", "XDG_RUNTIME_DIR", "XDG_STATE_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    return tmp_path


def test_an_ordinary_user_s_places(ordinary, monkeypatch):
    assert default_paths.config_file() == ordinary / ".config/dispatcher/dispatcher.toml"
    assert default_paths.state_dir() == ordinary / ".local/state/dispatcher"
    assert str(default_paths.run_dir()) == "/tmp/dispatcher-1000/dispatcher"
    for name in ("XDG_CONFIG_HOME", "XDG_RUNTIME_DIR", "XDG_STATE_HOME"):
        monkeypatch.setenv(name, f"/xdg/{name}")
    assert str(default_paths.config_file()) == "/xdg/XDG_CONFIG_HOME/dispatcher/dispatcher.toml"
    assert str(default_paths.run_dir()) == "/xdg/XDG_RUNTIME_DIR/dispatcher"
    assert str(default_paths.state_dir()) == "/xdg/XDG_STATE_HOME/dispatcher"


def test_a_run_directory_that_su_kept_of_another_user_is_not_used(ordinary, monkeypatch, tmp_path):
    monkeypatch.setattr("os.geteuid", lambda: 54321)
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path))
    assert str(default_paths.run_dir()) == "/tmp/dispatcher-54321/dispatcher"
    monkeypatch.setenv("XDG_RUNTIME_DIR", "relative")
    assert str(default_paths.run_dir()) == "/tmp/dispatcher-54321/dispatcher"
    monkeypatch.setattr(default_paths, "_owner", {"/run/user/54321": 54321}.get)
    assert str(default_paths.run_dir()) == "/run/user/54321/dispatcher"


def test_a_user_id_without_a_name_and_a_home_is_told_what_is_missing(ordinary, monkeypatch):
    monkeypatch.delenv("HOME")
    monkeypatch.setattr("os.getuid", lambda: 54321)
    for place in (default_paths.config_file, default_paths.state_dir):
        with pytest.raises(ConfigError, match="HOME is not set.*no entry"):
            place()


def test_root_s_places(monkeypatch):
    monkeypatch.delenv("DISPATCHER_CONFIG", raising=False)
    monkeypatch.setattr("os.geteuid", lambda: 0)
    assert str(default_paths.config_file()) == "/etc/dispatcher/dispatcher.toml"
    assert str(default_paths.run_dir()) == "/run/dispatcher"
    assert str(default_paths.state_dir()) == "/var/lib/dispatcher"


def test_the_environment_names_the_configuration(monkeypatch):
    monkeypatch.setenv("DISPATCHER_CONFIG", "/x/d.toml")
    assert str(default_paths.config_file()) == "/x/d.toml"
