"""What Podman answers otherwise than Docker, without an engine."""

from contextlib import contextmanager
from types import SimpleNamespace

import docker.errors
import pytest

from dispatcher.plugin import Deadline, ProviderError
from dispatcher_docker import observe
from dispatcher_docker.errors import NoSuchObject, translated
from dispatcher_docker.usage import from_cgroup, oom_kills


def test_a_container_that_is_gone_is_no_failure():
    response = SimpleNamespace(status_code=500, reason="Internal Server Error", url="/containers/x/json")
    text = "container 12ab does not exist in database: no such container"
    with pytest.raises(NoSuchObject), translated("look for the container", "unix:///s", Deadline(5)):
        raise docker.errors.APIError("500", response=response, explanation=text)


def test_a_container_that_ends_while_it_is_inspected_is_inspected_again():
    errors = [ProviderError("It could not", why="read /proc/824/cgroup: no such process")]

    class Engine:
        @contextmanager
        def call(self, doing, deadline):
            if errors:
                raise errors.pop()
            yield SimpleNamespace(inspect_container=lambda name: {"Name": name})

    assert observe.inspect(Engine(), "x", Deadline(5)) == {"Name": "x"}
    errors.append(ProviderError("It could not", why="no space left"))
    with pytest.raises(ProviderError):
        observe.inspect(Engine(), "x", Deadline(5))


@pytest.mark.parametrize(
    ("code", "memory", "podman", "told"),
    [
        (137, 1 << 26, True, "killed by signal 9, perhaps for its memory, which Podman does not always tell"),
        (137, 0, True, "killed by signal 9"),
        (137, 1 << 26, False, "killed by signal 9"),
        (3, 1 << 26, True, "exit code 3"),
    ],
)
def test_a_kill_under_a_limit_may_be_for_memory(code, memory, podman, told):
    found = {"State": {"Status": "exited", "ExitCode": code}, "HostConfig": {"Memory": memory}}
    assert observe.reason(found, podman=podman) == told


def test_its_control_groups_are_found(tmp_path):
    group = tmp_path / "machine.slice/libpod-12ab.scope"
    group.mkdir(parents=True)
    (group / "memory.events").write_text("oom 1\noom_kill 2\n")
    (group / "memory.current").write_text("3000\n")
    (group / "memory.stat").write_text("inactive_file 1000\n")
    (group / "cpu.stat").write_text("usage_usec 2000000\n")
    assert oom_kills("12ab", tmp_path) == 2
    assert (from_cgroup("12ab", tmp_path).memory, from_cgroup("12ab", tmp_path).cpu_seconds) == (2000, 2.0)


def test_its_words_for_events_are_asked_for():
    assert {"die", "died", "remove", "destroy"} <= set(observe.CHANGES)
