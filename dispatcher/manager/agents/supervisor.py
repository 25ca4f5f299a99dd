"""The supervisor: what the REST interface and the feed may ask of the agents' lifecycle.

It puts the parts together and keeps their threads: the work is done by `intents`, `operations`, `reconciler`,
`idle` and `moves`, all of them through `engine`.
"""

from __future__ import annotations

import logging
import secrets
import threading
from collections.abc import Callable, Mapping
from typing import Any

from dispatcher.config.host_users import HostAccounts
from dispatcher.config.layout import Paths
from dispatcher.config.load import Config
from dispatcher.config.plugins import Plugins
from dispatcher.manager.agents.commands import Intents
from dispatcher.manager.agents.copies import Copies
from dispatcher.manager.agents.idle import Idleness, check_interval
from dispatcher.manager.agents.lifecycle import DEAD
from dispatcher.manager.agents.migration import Mover
from dispatcher.manager.agents.observers import History
from dispatcher.manager.agents.operations import Operations
from dispatcher.manager.agents.queries import Inspection
from dispatcher.manager.agents.reconciler import Reconciler
from dispatcher.manager.agents.registry import Engine
from dispatcher.manager.agents.reload import app_changes, provider_changes, renew
from dispatcher.manager.agents.specs import Specs
from dispatcher.manager.agents.timers import Timers
from dispatcher.manager.agents.views import AgentView
from dispatcher.manager.backends.backend import Backend, Backends
from dispatcher.manager.backends.logs import Tails
from dispatcher.manager.backends.usage import Usages
from dispatcher.manager.files.agent_dirs import AgentData
from dispatcher.manager.storage.agents import AgentRow, Store
from dispatcher.manager.storage.database import Database
from dispatcher.plugin.deadline import Deadline, SteadyWallClock, boot_id
from dispatcher.plugin.errors import DispatcherError
from dispatcher.plugin.model import AgentEvent, Finding
from dispatcher.plugin.names import printable

BOOT = 2.0  # seconds that a boot waits for slow backends before it goes on without them
LAST_USED = 30.0  # seconds between writes of when agents were last used
TRIM = 3600.0  # seconds between looks at how many events there are
OLD_PROVIDER = 60.0  # seconds that a provider whose options changed has for the calls that it is in
CLOSE = 3.0  # seconds that a close waits for what is being done

_log = logging.getLogger("dispatcher.manager")


class Supervisor:
    """Keeps every agent as it is desired.  All methods may be called from any thread.

    The database must have been opened with `dispatcher.manager.storage.agents` imported.  `clock` should come from
    `dispatcher.manager.storage.agents.steady_clock`, so that times of an earlier process of this boot agree.
    """

    def __init__(
        self,
        *,
        config: Config,
        paths: Paths,
        accounts: HostAccounts,
        plugins: Plugins,
        database: Database,
        clock: SteadyWallClock,
    ) -> None:
        self.store = Store(database)
        self.installation = database.meta("installation", secrets.token_hex(4))
        self._database = database
        self._plugins = plugins
        self._accounts = accounts
        self._data = AgentData(paths, accounts)
        self._timers = Timers("dispatcher-timers")  # quick calls
        self._keeper = Timers("dispatcher-keeper")  # calls that may take a while: idleness, writing, trimming
        self._history = History(plugins)
        self._backends = Backends(
            config=config, plugins=plugins, paths=paths, accounts=accounts, installation=self.installation
        )
        self.engine = Engine(
            store=self.store,
            clock=clock,
            specs=self._specs(config),
            backends=self._backends,
            history=self._history,
            timers=self._timers,
            installation=self.installation,
        )
        self._mover = Mover(self.engine, self._data)
        self._copies = Copies(self.engine, self._data)
        self._operations = Operations(self.engine, self._data, self._mover, self._copies, accounts)
        self.engine.submit = self._operations.submit
        self._reconciler = Reconciler(self.engine, self._operations)
        self._intents = Intents(self.engine, self._data, accounts)
        self._idleness = Idleness(self.engine, self._intents)
        self._usages = Usages(self.engine)
        self._tails = Tails(self.engine)
        self._inspection = Inspection(self.engine, self._usages, self._data.endpoints)
        self._closed = False

    def _specs(self, config: Config) -> Specs:
        return Specs(
            config=config,
            plugins=self._plugins,
            data=self._data,
            installation=self.installation,
            proxy_gid=self._accounts.proxy_gid,
        )

    def start(self) -> None:
        """Take control: recover, adopt, begin to reconcile.  Returns once in control."""
        boot = boot_id()
        host_restarted = self._database.meta("boot", boot) != boot
        if host_restarted:
            self._database.set_meta("boot", boot)
        self._data.begin(new_boot=host_restarted)
        self._reconciler.host_restarted = host_restarted
        known = self.store.backends()
        for name in self._wanted_providers():
            backend = self._backends.get(name)
            if name in known:
                backend.contact = known[name].contact
        for row in self.store.agents():
            self._recover(row, host_restarted=host_restarted)
        for part in (self._timers, self._keeper, self._history):
            part.start()
        self._sweep_all()
        for backend in self._backends:
            self._watch(backend)
        self._timers.every(1.0, self._tend)
        self._keeper.every(1.0, self.engine.flush)
        self._keeper.every(check_interval(self._policies()), self._idleness.check)
        self._keeper.every(LAST_USED, self.engine.write_last_used)
        self._keeper.every(TRIM, self.store.trim_events)
        self._keeper.after(1.0, self._empty_trash)
        self._timers.after(self._interval, self._reconcile)

    def _wanted_providers(self) -> set[str]:
        """Those of the configuration, and those that still own agents, kept data or old copies."""
        config = self.engine.specs.config
        return {app.provider for app in config.apps.values()} | set(config.providers) | self.store.providers()

    def _recover(self, row: AgentRow, *, host_restarted: bool) -> None:
        """Take an agent over from the manager before: what was being done is decided anew."""
        if row.operation is not None:
            _log.warning(
                "%s: the manager ended at the step %r of a %s", printable(row.name), row.step, row.operation.value
            )
        agent = self.engine.add(self.engine.recovered(row, host_restarted=host_restarted))
        agent.dirty = row.operation is not None
        if row.retry_at is not None:
            delay = row.retry_at - self.engine.clock.now()
            self._timers.after(delay, lambda: self.engine.poke(agent))

    def _sweep_all(self) -> None:
        """Ask every backend, beside each other; go on without those that are slow."""
        backends = list(self._backends)
        answered = threading.Semaphore(0)
        for backend in backends:
            self._reconciler.kick(backend, done=answered.release)
        deadline = Deadline(BOOT)
        for _ in backends:
            answered.acquire(timeout=deadline.remaining())

    def _watch(self, backend: Backend) -> None:
        def run() -> None:
            try:
                backend.watch(lambda name: self._reconciler.changed(backend, name))
            except DispatcherError as error:
                _log.warning("The events of %s cannot be had: %s", backend.name, error)
                if not self._closed:
                    self._timers.after(self._interval, lambda: self._watch(backend))

        if backend.usable:
            backend.pool.submit(run, urgent=False)

    def _tend(self) -> None:
        for backend in self._backends:
            backend.tend()

    def _reconcile(self) -> None:
        for backend in self._backends:
            self._reconciler.kick(backend)
        self._timers.after(self._interval, self._reconcile)

    def _empty_trash(self) -> None:
        for problem in self._data.empty_trash():
            _log.warning("What an interrupted deletion left cannot be deleted: %s", problem)

    @property
    def _interval(self) -> float:
        return max(0.1, self.engine.specs.config.manager.reconcile_interval)

    def _policies(self) -> list[Any]:
        config = self.engine.specs.config
        return [config.defaults, *config.apps.values()]

    def close(self) -> None:
        """Stop all threads.  Agents go on."""
        self._closed = True
        self._timers.close()
        self._keeper.close()
        self._tails.close()
        self.engine.flush()
        for backend in self._backends:
            backend.close(CLOSE)
        self.engine.write_last_used()
        self._reconciler.remember()
        self._history.close()
        if all(agent.row.observed in DEAD and agent.operation is None for agent in self.engine.agents.values()):
            self._data.endpoints.close()

    # --- intents: written before anything is done, return at once

    def create(self, name: str, *, app: str | None, password_hash: str | None) -> AgentRow:
        """Make an agent, stopped, and its user when that is new.

        `name` is ``USER`` or ``USER:APP``.  A user's first agent is called as the user, a further one
        ``USER:APP``: `create("alice", app="lab")` makes ``alice:lab`` when ``alice`` is of another app.

        :param password_hash: of a new user; None where an external authenticator knows it.
        :raises Conflict: it exists, is being removed, or a password came for a user who exists.
        :raises BadRequest: a bad name, or no app was named and none is the default.
        """
        return self._intents.create(name, app=app, password_hash=password_hash)

    def remove(self, agent: str, *, keep_data: bool) -> None:
        """Let an agent go, with its user when it was the last one.

        :raises NotFound: there is no such agent.
        """
        self._intents.remove(self.engine.find(agent), keep_data=keep_data)

    def set_desired(self, agent: str, state: str, *, stdin: bytes | None = None) -> None:
        """Say what an agent shall be: running, suspended, hibernated or stopped.  The newest intent wins.

        "running" also forgets a failure and the count of restarts.

        :param stdin: the login's credentials for apps that take them; kept in memory only.
        :raises NotFound: there is no such agent.
        :raises BadRequest: no such state.
        :raises Unsupported: its provider cannot do that.
        :raises Conflict: it is being removed, or shall sleep and does not run.
        """
        self._intents.set_desired(self.engine.find(agent), state, stdin=stdin)

    def restart(self, agent: str) -> None:
        """Stop an agent, renew it when it is outdated, start it."""
        self._intents.restart(self.engine.find(agent))

    def reset_data(self, agent: str) -> None:
        """Stop an agent, delete its data, and start it again if it shall run."""
        self._intents.reset_data(self.engine.find(agent))

    def wake(self, agent: str) -> None:
        """Somebody sent a request: start or resume the agent.  Cheap and idempotent; unknown names are ignored.

        An agent that has failed is left alone until its back-off is over, or somebody starts it on purpose.
        """
        if found := self.engine.agents.get(agent):
            self._intents.wake(found)

    def touch(self, agent: str, activity: Mapping[str, int]) -> None:
        """Count activity by class (feed.md); unknown names are ignored."""
        if found := self.engine.agents.get(agent):
            self._intents.touch(found, activity)

    def suspect(self, agent: str) -> None:
        """The edge could not connect: observe the agent now; unknown names are ignored."""
        if found := self.engine.agents.get(agent):
            self._reconciler.suspect(found)

    # --- what is

    def view(self, agent: str) -> AgentView:
        """Return an agent as it is; never blocks.

        :raises NotFound: there is no such agent.
        """
        return self.engine.view(self.engine.find(agent))

    def views(self, *, user: str | None = None) -> list[AgentView]:
        """Return all agents, or a user's (the oldest first); never blocks."""
        agents = [
            agent
            for _, agent in sorted(self.engine.agents.copy().items())
            if user is None or agent.row.user == user
        ]
        if user is not None:
            agents.sort(key=lambda agent: agent.row.id)
        return [self.engine.view(agent) for agent in agents]

    def wait(self, agent: str, done: Callable[[AgentView | None], bool], seconds: float) -> AgentView | None:
        """Wait until `done(view)` is true (None: the agent is gone) or `seconds` are over; return the last view.

        `done` must be quick and must not call the supervisor; it is not asked for mere progress (stage, detail).

        :raises NotFound: there is no such agent at the beginning.
        """
        found = self.engine.find(agent)
        deadline = Deadline(seconds)
        with found.lock:
            while True:
                view = None if found.gone else self.engine.view(found)
                if done(view) or deadline.expired:
                    return view
                found.changed.wait(deadline.remaining())

    def subscribe(self, on_change: Callable[[str], None]) -> None:
        """Call `on_change(agent name)` whenever a view changed or an agent is gone: from any thread; be quick."""
        self.engine.subscribe(on_change)

    def runtime(self, agent: str) -> dict[str, Any]:
        """Return handle, endpoint, uid, provider, started_at, spec hash and usage."""
        return self._inspection.runtime(self.engine.find(agent))

    def logs(self, agent: str, *, tail: int, after: str | None) -> tuple[list[str], str]:
        """Return the last lines, or those after a cursor, and the cursor for the next call.

        :raises Unsupported: the provider keeps no logs.
        """
        return self._tails.lines(self.engine.find(agent), tail=tail, after=after)

    def events(self, agent: str, limit: int) -> list[AgentEvent]:
        """Return the last events, newest last."""
        return self.store.events(self.engine.find(agent).row.id, limit)

    def why(self, agent: str) -> list[str]:
        """Say in plain sentences why an agent is in its state and what happens next."""
        return self._inspection.why(self.engine.find(agent))

    def memory_usage(self) -> dict[str, Any]:
        """Return ``{"total", "average", "agents": [{"name", "memory"}]}`` in bytes."""
        return self._usages.memory()

    def top(self) -> list[dict[str, Any]]:
        """Return ``[{"name", "state", "memory", "cpu_percent", "cpu_seconds", "last_used"}]``."""
        return self._usages.top()

    def copies(self, agent: str) -> list[dict[str, Any]]:
        """Return the data kept of an agent, or of a removed agent of this name (rest.md).

        :raises NotFound: there is no such agent, and nothing was kept of an earlier one.
        """
        return self._copies.list(agent)

    def purge_copies(self, agent: str) -> int:
        """Delete that data and return how many copies there were.

        :raises NotFound: as `copies`; :raises Conflict: an operation on the agent is in progress.
        """
        return self._copies.purge(agent)

    def providers(self) -> list[dict[str, Any]]:
        """Return ``[{"name", "isolation", "capabilities", "distribution", "usable", "error"}]``."""
        return self._inspection.providers()

    def check_provider(self, name: str, app: str | None) -> list[Finding]:
        """Return what a provider isolates and what not, for one app or as a whole.

        :raises NotFound: there is no such provider or app.
        """
        return self._inspection.check_provider(name, app)

    def apply_config(self, config: Config) -> list[str]:
        """Use a new configuration from now on; return in sentences what changed.

        :raises ConfigError: it is wrong; nothing was changed.
        """
        config.validate_providers(self._plugins)
        for name in config.plugins:
            self._plugins.load(name)
        old = self.engine.specs.config
        changed = list(app_changes(old, config))
        self._backends.config = config
        for name in provider_changes(old, config):
            replaced = self._backends.reload(name)
            self._timers.after(OLD_PROVIDER, replaced)
            self._watch(self._backends.get(name))
            changed.append(f"The provider {name} has new options.")
        outdated = renew(self.engine, self._specs(config))
        for name in self._wanted_providers():
            backend = self._backends.get(name)
            if backend.since is None:
                self._reconciler.kick(backend)
                self._watch(backend)
        if outdated:
            changed.append(f"{outdated} agents are outdated: a restart renews each.")
        return changed
