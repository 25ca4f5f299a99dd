"""A supervisor on the kit's reference provider: real database, real directories, pretended agents.

`World` outlives supervisors, as a host does: a test ends one (or crashes it at a step) and makes the next on
the same database, directories and backends.
"""

from __future__ import annotations

import itertools
import os
import shutil
import tempfile
import threading
import time
from importlib.metadata import EntryPoint
from pathlib import Path

from dispatcher.config.host_users import HostAccounts
from dispatcher.plugin.deadline import boottime
from dispatcher.config.load import parse
from dispatcher.plugin.hooks import hookimpl
from dispatcher.manager.storage import agents
from dispatcher.manager.storage.database import Database
from dispatcher.manager.agents.lifecycle import State
from dispatcher.manager.agents.composition import Supervisor
from dispatcher.plugin.names import backend_name
from dispatcher.config.layout import Paths
from dispatcher.config.plugins import GROUP, Plugins
from tests.support.fake_provider import FakeBackend, FakeProvider
from dispatcher.manager.storage.rows import Desired
from tests.support.fake_backend import ALL, EngineDown

_worlds = itertools.count()
UIDS = (300_000, 300_999)


class Away(FakeProvider):
    """A second provider, for moves."""

    name = "away"


class Observer:
    """Collects events as a plugin does."""

    def __init__(self):
        self.seen = []

    @hookimpl
    def dispatcher_agent_event(self, event):
        self.seen.append((event.agent, event.kind, event.detail))


class _Plugin:
    def __init__(self, cls):
        self._cls = cls

    @hookimpl
    def dispatcher_register_providers(self):
        return [self._cls]


fake_plugin, away_plugin = _Plugin(FakeProvider), _Plugin(Away)


class World:
    """One host.  `config` is what the file says; `backend` and `away` are what providers talk to."""

    def __init__(self, directory: Path, **app):
        self.directory = Path(directory)
        self.number = next(_worlds)
        self.run_dir = Path(tempfile.mkdtemp(prefix="dw", dir="/tmp"))
        os.chmod(self.run_dir, 0o755)
        self.backend = FakeBackend.named(f"world-{os.getpid()}-{self.number}")
        self.away = FakeBackend.named(f"away-{os.getpid()}-{self.number}")
        self.away.capabilities = ALL
        self.observer = Observer()
        self.supervisors = []
        self.data = {
            "manager": {
                "state_dir": str(self.directory / "state"),
                "run_dir": str(self.run_dir),
                "reconcile_interval": 60,
                "provider_threads": 8,
            },
            "providers": {
                "fake": {"backend": f"world-{os.getpid()}-{self.number}"},
                "away": {"backend": f"away-{os.getpid()}-{self.number}"},
            },
            "apps": {
                "demo": {"provider": "fake", "start_timeout": 5, "stop_grace": 0.1, "fake": {}, "away": {}, **app}
            },
        }
        (self.directory / "state").mkdir(exist_ok=True)
        os.chmod(self.directory / "state", 0o711)

    def config(self, **changes):
        return parse({**self.data, **changes})

    def app(self, **changes):
        """Change the demo app in the file."""
        self.data = {**self.data, "apps": {**self.data["apps"], "demo": {**self.data["apps"]["demo"], **changes}}}

    def plugins(self):
        plugins = Plugins(
            EntryPoint(name, f"tests.support.manager_world:{name}_plugin", GROUP) for name in ("fake", "away")
        )
        plugins.register("observer", self.observer)
        return plugins

    def database(self):
        database = Database(f"sqlite:///{self.directory}/state/dispatcher.db")
        database.open()
        return database

    def supervisor(self, start=True, database=None):
        config = self.config()
        root = os.geteuid() == 0
        accounts = HostAccounts(
            proxy_uid=UIDS[0] if root else os.geteuid(),
            proxy_gid=UIDS[0] if root else os.getegid(),
            admin_gid=None,
            agent_uids=(UIDS[0] + 1, UIDS[1]) if root else None,
            made_up=True,
        )
        database = database or self.database()
        made = Supervisor(
            config=config,
            paths=Paths.of(config),
            accounts=accounts,
            plugins=self.plugins(),
            database=database,
            clock=agents.steady_clock(database),
        )
        made.database = database
        self.supervisors.append(made)
        if start:
            made.start()
        return made

    def container(self, supervisor, agent="alice", backend=None):
        return (backend or self.backend).containers.get(backend_name(supervisor.installation, agent))

    def kill(self, supervisor, agent="alice", reason="killed by signal 9"):
        self.backend.kill(backend_name(supervisor.installation, agent), reason)

    def close(self):
        for backend in (self.backend, self.away):
            backend.down = backend.silent = False
            backend.release()
        for supervisor in self.supervisors:
            end(supervisor)
        for backend in (self.backend, self.away):
            backend.close()
            for volume in backend.volumes.values():
                shutil.rmtree(volume, ignore_errors=True)
        shutil.rmtree(self.run_dir, ignore_errors=True)


def end(supervisor):
    """Close a supervisor once."""
    if not getattr(supervisor, "ended", False):
        supervisor.ended = True
        supervisor.close()
        supervisor.database.close()


def reach(supervisor, agent, *states, seconds=10):
    """Wait until an agent is in one of some states and nothing is being done to it; return its view."""
    wanted = {State(state) for state in states}
    view = supervisor.queries.wait(agent, lambda view: view is not None and view.state in wanted, seconds)
    assert view is not None, "the agent is gone"
    assert view.state in wanted, (view.state, view.stage, view.detail, view.failure)
    return view


def running(supervisor, name="alice"):
    """Make an agent and wait until it runs."""
    supervisor.commands.create(name, app=None, password_hash="hash")
    supervisor.commands.set_desired(name, Desired.RUNNING)
    return reach(supervisor, name, "running")


def kinds(supervisor, name="alice"):
    """Return what happened to an agent, in order."""
    return [event.kind for event in supervisor.queries.events(name, 100)]


def gone(supervisor, agent, seconds=10):
    """Wait until an agent is gone."""
    view = supervisor.queries.wait(agent, lambda view: view is None, seconds)
    assert view is None, (view.state, view.stage, view.failure)


def until(condition, seconds=10):
    """Wait until a condition holds."""
    end = boottime() + seconds
    while boottime() < end:
        if found := condition():
            return found
        time.sleep(0.005)
    raise AssertionError("it did not come true in time")


class Crash:
    """Stops an operation at a step, as a manager that is killed there: nothing it does later has an effect.

    The old supervisor's database and backends are cut off; its thread is let go at the end of the test.
    """

    def __init__(self, world, supervisor, step, kind=None):
        self.reached = threading.Event()
        self._go_on = threading.Event()
        self._world, self._supervisor, self._step, self._kind = world, supervisor, step, kind
        supervisor.registry.on_step = self._on_step

    def _on_step(self, _agent, kind, step):
        if step == self._step and (self._kind is None or kind.value == self._kind) and not self.reached.is_set():
            self.reached.set()
            self._go_on.wait(60)

    def happen(self):
        assert self.reached.wait(10), f"the step {self._step!r} was not reached"
        cut_off(self._supervisor)

    def release(self):
        self._go_on.set()
        end(self._supervisor)


class _Cut:
    """A backend that nobody can reach any more."""

    def __init__(self, backend):
        self._backend = backend

    def __getattr__(self, name):
        if name in {"capabilities", "is_set"}:
            return getattr(self._backend, name)
        raise EngineDown("this manager was killed")


def cut_off(supervisor):
    """Let whatever an old supervisor still does have no effect: it stands for one that was killed."""
    from dispatcher.plugin.errors import Unavailable

    supervisor._timers.close()
    supervisor._slow_timers.close()

    def dead(*_args, **_more):
        raise Unavailable("this manager was killed")

    for backend in supervisor.backends:
        provider = backend.provider.wrapped
        provider.close()
        provider.backend = _Cut(provider.backend)
    for name in ("save", "add_copy", "remove", "create", "save_backend", "set_copy_directory", "remove_copy"):
        setattr(supervisor.store, name, dead)
    for name in ("reset", "remove", "install", "store_copy", "empty_dir", "prepare"):
        setattr(supervisor.data, name, dead)
