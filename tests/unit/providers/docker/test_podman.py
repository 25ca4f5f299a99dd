"""What Podman answers otherwise than Docker, without an engine."""

from contextlib import contextmanager
from types import SimpleNamespace

import docker.errors
import pytest

from dispatcher.plugin import Deadline, ProviderError, Unavailable
from dispatcher_docker import engine, observe
from dispatcher_docker.errors import NameTaken, NoSuchObject, translated
from dispatcher_docker.options import DockerOptions
from dispatcher_docker.usage import from_cgroup, oom_kills


def test_a_container_that_is_gone_is_no_failure():
    response = SimpleNamespace(status_code=500, reason="Internal Server Error", url="/containers/x/json")
    text = "container 12ab does not exist in database: no such container"
    with pytest.raises(NoSuchObject), translated("look for the container", "unix:///s", Deadline(5)):
        raise docker.errors.APIError("500", response=response, explanation=text)


def test_a_container_that_ends_while_it_is_inspected_is_inspected_again():
    errors = [ProviderError("It could not", why="read /proc/824/cgroup: no such process")]

    class Engine:
        is_podman = False

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


def refusal(text, status=500):
    response = SimpleNamespace(status_code=status, reason="", url="")
    return docker.errors.APIError(str(status), response=response, explanation=text)


class Client:
    """Podman's answers: errors first, then these containers."""

    is_podman = True

    def __init__(self, *errors, containers=()):
        self.errors, self.found, self.bodies = list(errors), list(containers), []

    def containers(self, **_):
        if self.errors:
            raise self.errors.pop()
        return self.found

    def create_container_from_config(self, body, **_):
        self.bodies.append(body)
        return {"Id": "12ab"}


def connected(tmp_path, client, url="unix:///run/podman/podman.sock"):
    found = engine.Engine(DockerOptions(url=url), tmp_path)
    found._client = client
    return found


def test_a_list_is_requested_again_when_a_container_of_anybody_is_removed_meanwhile(tmp_path):
    gone = 'getting container from store "2ebe": container not known'
    assert connected(tmp_path, Client(*[refusal(gone)] * 3)).containers("i", Deadline(5)) == []
    with pytest.raises(ProviderError, match="container not known"):
        connected(tmp_path, Client(*[refusal(gone)] * 50)).containers("i", Deadline(5))


def test_its_configuration_gives_agents_no_other_namespaces(tmp_path):
    client = Client()
    connected(tmp_path, client).make({"HostConfig": {"Privileged": False}}, "x", Deadline(5))
    own = client.bodies[0]["HostConfig"]
    assert own == {"Privileged": False, "UsernsMode": "host", "PidMode": "private", "UTSMode": "private"}


def test_its_errors_name_it_and_what_to_do_with_it(tmp_path):
    away = engine.Engine(DockerOptions(url=f"unix://{tmp_path}/podman/podman.sock"), tmp_path)
    with pytest.raises(Unavailable, match=r"The Podman engine .*systemctl start podman\.socket"):
        away.containers("i", Deadline(5))
    with pytest.raises(ProviderError, match=r"Podman could not list .*journalctl -u podman"):
        connected(tmp_path, Client(refusal("broken"))).containers("i", Deadline(5))


def test_a_name_that_only_its_storage_knows_is_taken():
    text = 'the container name "x" is already in use by 2c63. You have to remove it: that name is already in use'
    with pytest.raises(NameTaken), translated("create it", "unix:///s", Deadline(5), "Podman"):
        raise refusal(text)


def test_its_words_for_events_are_asked_for():
    assert {"die", "died", "remove", "destroy"} <= set(observe.CHANGES)
