"""The limit `disk` on data in the host's directories: set at a start, shown, named when data is full."""

import pytest

from dispatcher.manager.files.quota import DiskUse
from dispatcher.manager.storage.rows import Desired
from dispatcher.plugin.errors import StartFailed, Unsupported
from dispatcher.plugin.model import Capability
from tests.support.manager_world import kinds, reach, running, until

MIB = 1 << 20


class Quotas:
    """Stands for the file system's quotas."""

    def __init__(self):
        self.used, self.limit, self.enforced = 5 * MIB, None, True

    def apply(self, directory, project, limit, tick):
        if not self.enforced:
            raise Unsupported("The limit `disk` cannot be enforced", why="no quotas", fix="mount with prjquota")
        self.limit = limit
        tick()

    def usage(self, directory, project):
        return DiskUse(self.used, self.limit)

    def forget(self, project):
        self.limit = None


@pytest.fixture
def supervisor(world):
    world.app(disk=64 * MIB, max_restarts=0)
    return world.supervisor()


@pytest.fixture
def quotas(supervisor):
    backend = supervisor.registry.backends.get("fake")
    backend.capabilities -= {Capability.OWN_DATA, Capability.DISK_LIMIT}
    supervisor.data.quotas = Quotas()
    return supervisor.data.quotas


def test_a_start_sets_the_limit_and_use_is_shown(supervisor, quotas):
    running(supervisor)
    assert quotas.limit == 64 * MIB
    (view,) = supervisor.queries.views(user="alice")
    assert view.to_json()["disk"] == {"used": 5 * MIB, "limit": 64 * MIB, "full": False}
    assert supervisor.queries.runtime("alice")["usage"]["disk_limit"] == 64 * MIB
    quotas.used = 6 * MIB
    assert supervisor.queries.measured("alice").to_json()["disk"]["used"] == 6 * MIB
    quotas.used = 5 * MIB
    assert [(row["disk"], row["disk_limit"]) for row in supervisor.queries.top()] == [(5 * MIB, 64 * MIB)]
    supervisor.commands.set_desired("alice", Desired.STOPPED)
    reach(supervisor, "alice", "stopped")
    assert supervisor.queries.runtime("alice")["usage"]["disk"] == 5 * MIB, "data stays"
    assert not any("full" in sentence for sentence in supervisor.queries.why("alice"))


def test_a_death_with_full_data_says_so(world, supervisor, quotas):
    running(supervisor)
    quotas.used = 64 * MIB
    world.kill(supervisor, reason="exit code 1")
    until(lambda: "died" in kinds(supervisor))
    died = next(event for event in supervisor.queries.events("alice", 10) if event.kind == "died")
    assert died.detail == "exit code 1; its data is full: 64.0 MiB of 64.0 MiB"
    assert any(
        "Its data is full (64.0 MiB of 64.0 MiB)" in sentence for sentence in supervisor.queries.why("alice")
    )


def test_a_start_that_fails_with_full_data_says_so(world, supervisor, quotas):
    quotas.used = 64 * MIB
    supervisor.commands.create("alice", app=None, password_hash="h")
    world.backend.inject("ensure", error=StartFailed("The app ended", why="exit code 1"), agent="alice")
    supervisor.commands.set_desired("alice", Desired.RUNNING)
    view = reach(supervisor, "alice", "failed")
    assert view.failure.why == "exit code 1; its data is full: 64.0 MiB of 64.0 MiB"


def test_a_limit_that_cannot_be_enforced_is_a_failure_without_retry(supervisor, quotas):
    quotas.enforced = False
    supervisor.commands.create("alice", app=None, password_hash="h")
    supervisor.commands.set_desired("alice", Desired.RUNNING)
    view = reach(supervisor, "alice", "failed")
    assert (view.failure.fix, view.failure.final) == ("mount with prjquota", True)
