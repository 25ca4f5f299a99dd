"""An engine behind ssh://: a real sshd, the engine's socket and the agents' ports through one connection."""

import os
import time

import pytest

from dispatcher.plugin.deadline import Deadline
from dispatcher.plugin.errors import ConfigError, Unavailable
from dispatcher.plugin.model import BackendState, Network
from dispatcher.testing.kit import eventually
from tests.support.docker_tools import PORTED, DockerWorld, docker, images
from tests.support.sshd import Sshd

pytestmark = [pytest.mark.docker, pytest.mark.root, pytest.mark.slow]


@pytest.fixture(scope="module")
def sshd():
    images()
    sshd = Sshd()
    yield sshd
    sshd.close()


@pytest.fixture(autouse=True)
def ssh_settings(sshd, monkeypatch):
    """The manager's user has a key and knows the host: by a program `ssh` that says so."""
    directory = sshd.directory / "bin"
    directory.mkdir(exist_ok=True)
    program = directory / "ssh"
    program.write_text(f'#!/bin/sh\nexec /usr/bin/ssh {" ".join(sshd.options)} "$@"\n')
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{directory}:{os.environ['PATH']}")


@pytest.fixture
def world(sshd):
    world = DockerWorld(f"ssh://root@127.0.0.1:{sshd.port}")
    world.host = ""  # the tests themselves ask the engine directly
    yield world
    ssh = world.driver.provider._engine.ssh
    world.close()
    ssh.close(Deadline(10))


def run(world, name, **changes):
    return world.run(name, options=PORTED, network=Network.PRIVATE, **changes)


def test_agents_by_ssh(world):
    world.driver.check()
    agent = run(world, "alice")
    assert agent.inside.endpoint.path == str(agent.spec.socket), "the port is reached by a socket on this side"
    assert os.stat(agent.spec.socket).st_mode & 0o777 == 0o660
    assert os.stat(agent.spec.socket).st_gid == agent.spec.proxy_gid, "the proxy may connect, others may not"
    assert agent.inside.environment()["DISPATCHER_AGENT"] == "alice"
    changed = []
    watch = world.driver.watch(changed.append)
    docker("kill", agent.handle.name)
    assert eventually(lambda: agent.handle.name in changed, 3)
    watch.close()
    agent = run(world, "alice")
    world.driver.stop(agent.handle, grace=5)
    assert not agent.inside.answers()
    assert not agent.spec.socket.exists()
    said = [one.what for one in world.driver.provider.explain(None)]
    assert any("goes through the ssh" in one for one in said)
    assert not any("not encrypted" in one for one in said)


def test_a_fresh_instance_uses_the_same_ssh(world):
    agent = run(world, "bob")
    start = agent.inside.id()["start"]
    pid = world.driver.provider._engine.ssh.pid
    world.driver.provider.close()
    assert agent.inside.answers(), "agents are served while the manager is away"
    other = world.another()
    try:
        _, seen = other.list()["bob"]
        assert seen.endpoint == agent.inside.endpoint
        assert other.provider._engine.ssh.pid == pid
        assert agent.inside.id()["start"] == start
    finally:
        other.provider.close()


def test_a_connection_that_breaks_is_made_again(world, sshd):
    agent = run(world, "carol")
    start = agent.inside.id()["start"]
    sshd.stop()
    try:
        began = time.monotonic()
        with pytest.raises(Unavailable):
            world.driver.observe(agent.handle, seconds=5)
        assert time.monotonic() - began < 7
    finally:
        sshd.start()
    assert eventually(lambda: observed(world, agent) is BackendState.RUNNING, 15, 0.2)
    assert eventually(agent.inside.answers, 5)
    assert agent.inside.id()["start"] == start


def observed(world, agent):
    try:
        return world.driver.observe(agent.handle, seconds=5).state
    except Unavailable:
        return None


def test_ssh_that_cannot_connect_says_why(world, sshd, tmp_path):
    (tmp_path / "run").mkdir()
    world.options = world.options.model_validate({"url": f"ssh://nobody-there@127.0.0.1:{sshd.port}"})
    driver = world.another()
    with pytest.raises(Unavailable) as caught:
        driver.check(seconds=10)
    assert "Permission denied" in caught.value.why
    assert "ssh nobody-there@127.0.0.1 true" in caught.value.fix
    driver.provider.close()


@pytest.mark.parametrize("url", ["ssh://-oProxyCommand=x", "ssh://-l@host", "ssh://user:password@host"])
def test_urls_that_are_options_are_refused(world, url):
    world.options = world.options.model_validate({"url": url})
    with pytest.raises(ConfigError):
        world.another()
