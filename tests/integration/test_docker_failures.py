"""Starts that fail, containers that die, names that are taken, crashes in the middle: each told, nothing left over."""

import time

import pytest

from dispatcher.plugin.errors import ConfigError, NotFound, ProviderError, StartFailed
from dispatcher.plugin.model import BackendState, Limits, Network
from dispatcher.testing.kit import eventually
from tests.support.docker_tools import PORTED, docker, inspect, leftovers

pytestmark = [pytest.mark.docker, pytest.mark.root]


@pytest.fixture
def world(docker_world):
    return docker_world


def ended(world, agent, seconds=10):
    assert eventually(lambda: world.observe(agent).state is BackendState.STOPPED, seconds)
    return world.observe(agent)


@pytest.mark.parametrize("program", ["no-such-program", "/no-such-program"])
def test_a_program_that_is_not_in_the_image(world, program):
    spec = world.make("typo", options={"command": [program], "init": False})
    with pytest.raises(StartFailed) as caught:
        world.driver.ensure(spec)
    assert "no-such-program" in caught.value.why
    assert "no such program" in caught.value.fix
    assert not leftovers(world.installation)
    world.run("typo")


def test_an_app_that_ends_at_once_leaves_its_last_words(world):
    spec = world.make("short", environment={"PROBE_EXIT": "7"})
    handle = world.driver.ensure(spec)
    world.fresh(handle)
    seen = ended(world, handle)
    assert seen.exit_reason == "exit code 7"
    assert "last words" in seen.detail
    assert b"last words" in world.driver.logs(handle)
    _, listed = world.driver.list()["short"]
    assert listed.exit_reason == "exit code 7"


def test_out_of_memory_is_told_as_that(world):
    agent = world.run("greedy", limits=Limits(memory=48 << 20, swap=0))
    with pytest.raises(OSError):
        agent.inside.post("/memory", bytes=200 << 20)
    assert ended(world, agent).exit_reason == "out of memory"
    assert world.driver.list()["greedy"][1].exit_reason == "out of memory"
    again = world.run("greedy", limits=Limits(memory=48 << 20, swap=0))
    assert again.inside.answers()


def test_killed_from_outside_is_told_with_its_signal(world):
    agent = world.run("victim")
    docker("kill", "--signal", "KILL", agent.handle.name)
    assert ended(world, agent).exit_reason == "killed by signal 9"


def test_stopped_on_purpose_is_no_failure(world):
    agent = world.run("tidy")
    world.driver.stop(agent.handle, grace=5)
    seen = world.observe(agent)
    assert (seen.state, seen.exit_reason) == (BackendState.STOPPED, "")
    assert world.driver.list()["tidy"][1].exit_reason == ""
    assert b"probe is ready" in world.driver.logs(agent.handle)


def test_a_stopped_container_is_used_again_and_keeps_its_log(world):
    agent = world.run("again")
    agent.inside.post("/log", b"before the stop")
    world.driver.stop(agent.handle, grace=5)
    first = inspect(agent.handle.name)["Id"]
    agent = world.run("again")
    assert inspect(agent.handle.name)["Id"] == first
    assert b"before the stop" in world.driver.logs(agent.handle)


@pytest.mark.parametrize("anew", [False, True])
def test_a_network_that_was_removed_while_nothing_used_it(world, anew):
    """`docker network prune`, or `docker compose down` and `up`: the stopped container names an id that is gone."""
    name = f"kit-{world.installation}" if anew else ""
    options = PORTED | ({"network": name} if anew else {})
    if anew:
        docker("network", "create", name)
    try:
        agent = world.run("pruned", options=options, network=Network.PRIVATE)
        agent.inside.write(agent.within("kept"), b"kept\n")
        world.driver.stop(agent.handle, grace=5)
        (network,) = inspect(agent.handle.name)["NetworkSettings"]["Networks"]
        docker("network", "rm", network)
        if anew:
            docker("network", "create", name)
        again = world.run("pruned", options=options, network=Network.PRIVATE)
        assert again.inside.read(again.within("kept")) == b"kept\n"
        world.end_check()
    finally:
        if anew:
            docker("network", "rm", name)


def test_a_foreign_container_under_the_name_is_never_touched(world):
    spec = world.make("taken")
    name = spec.backend_name
    docker("run", "-d", "--name", name, "dispatcher-test/busybox", "sleep", "600")
    try:
        with pytest.raises(ProviderError, match="of another owner") as caught:
            world.driver.ensure(spec)
        assert f"docker rm -f {name}" in caught.value.fix
        handle = world.driver.handle(spec)
        assert world.observe(handle).state is BackendState.ABSENT
        world.driver.stop(handle)
        world.driver.destroy(handle)
        assert "taken" not in world.driver.list()
        assert inspect(name)["State"]["Running"]
    finally:
        docker("rm", "-f", name)


def test_a_start_that_a_crash_cut_short_is_finished_by_the_next(world):
    agent = world.run("crash")
    agent.inside.write(agent.within("kept"), b"kept\n")
    found = inspect(agent.handle.name)
    docker("rm", "-f", agent.handle.name)
    # As if the manager had been killed between create and start:
    labels = [f"--label={key}={value}" for key, value in found["Config"]["Labels"].items()]
    docker("create", "--name", agent.handle.name, *labels, "dispatcher-test/busybox", "true")
    assert world.observe(agent).state is BackendState.STOPPED
    again = world.run("crash")
    assert again.inside.read(again.within("kept")) == b"kept\n"


def test_a_handle_that_a_restarted_manager_reads_is_enough(world):
    agent = world.run("adopted")
    start = agent.inside.id()["start"]
    other = world.another()
    try:
        handle, seen = other.list()["adopted"]
        assert handle == agent.handle
        other.ensure(agent.spec)
        assert agent.inside.id()["start"] == start
        assert seen.endpoint == agent.inside.endpoint
    finally:
        other.provider.close()


def test_a_mount_that_does_not_exist(world):
    spec = world.make("mounts", options={"mounts": [{"source": "/nonexistent/dir", "target": "/x"}]})
    with pytest.raises(ProviderError, match="does not exist"):
        world.driver.ensure(spec)
    assert not leftovers(world.installation)


def test_a_port_without_a_network_is_refused_before_anything_is_made(world):
    spec = world.make("ports", options={"image": "dispatcher-test/probe", "port": 8080}, network=Network.NONE)
    with pytest.raises(ConfigError, match='network = "private"'):
        world.driver.ensure(spec)
    with pytest.raises(ConfigError):
        world.driver.prepare(spec.app)
    assert not leftovers(world.installation)


def test_a_device_that_does_not_exist(world):
    spec = world.make("device", options={"devices": ["/dev/no-such-device"]})
    with pytest.raises(ProviderError, match="no-such-device|no such file"):
        world.driver.ensure(spec)
    assert not leftovers(world.installation)


def test_gpus_that_are_not_there(world):
    spec = world.make("gpu", options={"gpus": "all"})
    with pytest.raises(ProviderError) as caught:
        world.driver.ensure(spec)
    assert "GPU" in caught.value.fix
    assert not leftovers(world.installation)


def test_removed_behind_our_back_is_absent(world):
    agent = world.run("gone")
    docker("rm", "-f", agent.handle.name)
    assert world.observe(agent).state is BackendState.ABSENT
    for call in (world.driver.suspend, world.driver.resume):
        with pytest.raises(NotFound):
            call(agent.handle)
    assert list(world.driver.logs(agent.handle)) == []
    world.run("gone")


def test_paused_and_unpaused_behind_our_back(world):
    agent = world.run("sleepy")
    docker("pause", agent.handle.name)
    assert world.observe(agent).state is BackendState.SUSPENDED
    world.driver.suspend(agent.handle)
    world.driver.resume(agent.handle)
    assert agent.inside.answers()
    world.driver.resume(agent.handle)


def test_labels_and_environment_of_an_image_do_no_harm(world, tmp_path):
    (tmp_path / "Dockerfile").write_text(
        "FROM dispatcher-test/probe\n"
        'ENV HOME=/evil DISPATCHER_USER=mallory\nLABEL dispatcher.installation=ffffffff dispatcher.agent="x"\n'
        "HEALTHCHECK CMD false\nVOLUME /data\n"
    )
    docker("build", "-q", "-t", "dispatcher-test/odd", str(tmp_path))
    try:
        agent = world.run(
            "odd",
            options={"image": "dispatcher-test/odd"} | {"command": ["python3", "/probe.py", "--unix", "{socket}"]},
        )
        environment = agent.inside.environment()
        assert (environment["HOME"], environment["DISPATCHER_USER"]) == ("/data", "odd")
        assert world.driver.list()["odd"][0] == agent.handle
        assert "Health" not in inspect(agent.handle.name)["State"]
        world.end_check()
        assert not leftovers(world.installation)
    finally:
        docker("rmi", "-f", "dispatcher-test/odd")


def test_many_agents_cost_one_list(world):
    """What `list` asks does not grow with the agents."""
    world.run("one")
    asked = []
    engine = world.driver.provider._engine
    original = engine.call
    engine.call = lambda doing, deadline: asked.append(doing) or original(doing, deadline)
    try:
        world.driver.list()
        one = len(asked)
        world.together([lambda n=n: world.run(f"many{n}") for n in range(5)])
        asked.clear()
        world.driver.list()
        assert len(asked) == one <= 2
        asked.clear()
        handles = [handle for handle, _ in world.driver.list().values()]
        asked.clear()
        assert len(world.driver.usage(handles)) == 6
        assert len(asked) == 1
    finally:
        engine.call = original


def test_the_log_is_bounded_by_the_engine(world):
    agent = world.run("chatty")
    config = inspect(agent.handle.name)["HostConfig"]["LogConfig"]
    assert config["Config"] == {"max-size": str(10 << 20), "max-file": "2"}
    began = time.monotonic()
    agent.inside.post("/log", b"z" * 1000, repeat=40_000)
    agent.inside.post("/log", b"the end")
    assert eventually(lambda: world.driver.logs(agent.handle, tail=1) == [b"the end"], 30, 0.2)
    kept = len(world.driver.logs(agent.handle, tail=100_000))
    assert kept < 30_000, "forty megabytes were written, twenty may be kept"
    assert time.monotonic() - began < 40


def test_the_handle_holds_nothing_that_changes(world):
    spec = world.make("stable")
    assert world.driver.handle(spec) == world.driver.handle(world.make("stable"))
