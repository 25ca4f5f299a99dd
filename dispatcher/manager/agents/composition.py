"""Composes the modules of this package: starts and stops their threads, recovers stored agents, reloads."""

from __future__ import annotations

import dataclasses
import logging
import secrets
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from dispatcher.common.timers import Timers
from dispatcher.config.host_users import HostAccounts
from dispatcher.config.layout import Paths
from dispatcher.config.load import Config
from dispatcher.config.plugins import Plugins
from dispatcher.config.plugins_used import configured
from dispatcher.manager.agents.access import Access
from dispatcher.manager.agents.commands import Commands
from dispatcher.manager.agents.idle import check_interval
from dispatcher.manager.agents.idle_monitor import IdleMonitor
from dispatcher.manager.agents.kernel_memory_guard import INTERVAL, KernelMemoryGuard
from dispatcher.manager.agents.lifecycle import DEAD, NO_OPERATION
from dispatcher.manager.agents.observers import Observers
from dispatcher.manager.agents.operations.kept_data import Copies
from dispatcher.manager.agents.operations.provider_move import Mover
from dispatcher.manager.agents.operations.runner import Runner
from dispatcher.manager.agents.queries import Queries
from dispatcher.manager.agents.reconciler import Reconciler
from dispatcher.manager.agents.registry import Registry
from dispatcher.manager.agents.specs import Memberships, Specs, app_changes, group_changes, provider_changes
from dispatcher.manager.backends.backend import Backend, Backends, Contact, Made
from dispatcher.manager.backends.logs import LogCollector
from dispatcher.manager.files.agent_dirs import AgentData
from dispatcher.manager.files.host_uids import HostUids
from dispatcher.manager.files.space import low_space
from dispatcher.manager.storage.agents import Store
from dispatcher.manager.storage.database import Database
from dispatcher.manager.storage.rows import AgentRow, Desired
from dispatcher.plugin.deadline import Deadline, SteadyWallClock, boot_id
from dispatcher.plugin.errors import DispatcherError
from dispatcher.plugin.names import printable

BOOT = 2.0  # seconds that a boot waits for slow backends
LAST_USED = 30.0  # seconds between writes of when agents were last used
TRIM = 3600.0  # seconds between deletions of old events
OLD_PROVIDER = 60.0  # seconds until a provider whose options changed is closed
DISK_FIRST, DISK = 3.0, 60.0  # seconds until and between checks of the free space
CLOSE = 3.0  # seconds that a close waits for operations in progress

_log = logging.getLogger("dispatcher.manager")


@contextmanager
def restoring() -> Iterator[None]:
    """Tell that the earlier configuration could not be restored, if the block fails.

    :raises DispatcherError: it failed.
    """
    try:
        yield
    except Exception as error:
        raise DispatcherError(
            "The new configuration is applied in part",
            why=f"{type(error).__name__}: {error}",
            fix="restart the manager; agents continue to run",
        ) from error


class Supervisor:
    """The lifecycle of all agents: `commands` change it, `queries` read it.

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
        self._timers = Timers("dispatcher-timers")  # quick calls
        self._slow_timers = Timers("dispatcher-slow-timers")  # idle checks, writes, trimming
        self._guard_timers = Timers("dispatcher-memory-guard")  # nothing else may delay it
        self.observers = Observers(plugins)
        self._log_collector = LogCollector()
        self.data = AgentData(paths, accounts)
        self.backends = Backends(
            config=config, plugins=plugins, paths=paths, accounts=accounts, installation=self.installation
        )
        self._memberships = Memberships()
        self.registry = Registry(
            store=self.store,
            clock=clock,
            specs=self._specs(config),
            backends=self.backends,
            observers=self.observers,
            timers=self._timers,
            installation=self.installation,
            data=self.data,
        )
        self.access = Access(self.registry, self._memberships)
        self.copies = Copies(self.registry, self.data)
        runner = Runner(self.registry, self.data, Mover(self.registry, self.data), self.copies, accounts)
        self.registry.submit = runner.submit
        self.reconciler = Reconciler(self.registry, runner)
        uids = HostUids(accounts, self.store, self.data, self.installation)
        self.commands = Commands(self.registry, self.data, uids)
        self.queries = Queries(self.registry, self._log_collector)
        self.idle_monitor = IdleMonitor(self.registry)
        self._closed = threading.Event()
        self._disk_is_low = False

    def _specs(self, config: Config) -> Specs:
        return Specs(
            config=config,
            plugins=self._plugins,
            data=self.data,
            installation=self.installation,
            proxy_gid=self._accounts.proxy_gid,
            memberships=self._memberships,
        )

    def start(self) -> None:
        """Recover the stored agents, adopt those that run, begin to reconcile.  Returns once in control."""
        config, boot = self.registry.specs.config, boot_id()
        host_restarted = self._database.meta("boot", boot) != boot
        if host_restarted:
            self._database.set_meta("boot", boot)
        self.data.begin(new_boot=host_restarted)
        self.reconciler.host_restarted = host_restarted
        known = self.store.backends()
        self.backends.load_all(self._wanted_providers())
        for name in self._wanted_providers():
            backend = self.backends.get(name)
            if name in known:
                backend.last_contact = known[name].contact
        self.access.load()
        for row in self.store.agents():
            self._recover(row, host_restarted=host_restarted)
        for part in (self._timers, self._slow_timers, self._guard_timers, self.observers):
            part.start()
        self._sweep_all()
        self.access.enforce()
        for backend in self.backends:
            self._watch(backend)
        self._timers.every(1.0, self.backends.check_overdue)
        if self._accounts.agent_uids is not None:
            self._guard_timers.every(INTERVAL, KernelMemoryGuard(self.registry).check)
        self._slow_timers.every(1.0, self.registry.flush)
        self._slow_timers.every(60.0, self._database.checkpoint)
        self._slow_timers.every(check_interval([config.defaults, *config.apps.values()]), self.idle_monitor.check)
        self._slow_timers.every(LAST_USED, self.registry.write_last_used)
        self._slow_timers.every(TRIM, self.store.trim_events)
        self._slow_timers.every(DISK, self.queries.measure_machines)
        self._slow_timers.after(1.0, self._empty_trash)
        self._slow_timers.after(DISK_FIRST, self._check_disk)
        self._timers.after(self._interval, self.reconcile)

    def _wanted_providers(self) -> set[str]:
        """Those of the configuration, and those that still have agents, kept data or old copies."""
        config = self.registry.specs.config
        return {app.provider for app in config.apps.values()} | set(config.providers) | self.store.providers()

    def _recover(self, row: AgentRow, *, host_restarted: bool) -> None:
        """Take over an agent from an earlier manager: no operation is in flight; a boot forgets past attempts."""
        registry, stored = self.registry, row
        if row.operation is not None:
            _log.warning(
                "%s: the manager ended at the step %r of a %s", printable(row.name), row.step, row.operation.value
            )
            row = dataclasses.replace(row, version=row.version + 1, **NO_OPERATION)
        if host_restarted:
            row = dataclasses.replace(row, attempts=(), version=row.version + 1)
            if row.failure is not None and row.desired is Desired.RUNNING:
                row = dataclasses.replace(row, retry_at=registry.clock.now())
        agent = registry.add(row)
        if stored.operation is not None:
            registry.buffer.add(row)
        if stored.retry_at is not None:
            self._timers.after(stored.retry_at - registry.clock.now(), lambda: registry.reevaluate(agent))

    def _sweep_all(self) -> None:
        """Sweep all backends at the same time; continue without those that are slow."""
        backends = list(self.backends)
        answered = threading.Semaphore(0)
        for backend in backends:
            self.reconciler.sweep_soon(backend, done=answered.release)
        deadline = Deadline(BOOT)
        for _ in backends:
            answered.acquire(timeout=deadline.remaining())

    def _watch(self, backend: Backend) -> None:
        def run() -> None:
            try:
                backend.watch(lambda name: self.reconciler.on_event(backend, name))
            except DispatcherError as error:
                _log.warning("The events of %s are not available: %s", backend.name, error)
                if not self._closed.is_set():
                    self._timers.after(self._interval, lambda: self._watch(backend))

        if backend.usable:
            backend.pool.submit(run, urgent=False)

    def reconcile(self) -> None:
        """Sweep all backends, now and then regularly."""
        for backend in self.backends:
            self.reconciler.sweep_soon(backend)
        self._timers.after(self._interval, self.reconcile)

    def _empty_trash(self) -> None:
        for problem in self.data.empty_trash():
            _log.warning("The remains of an interrupted deletion cannot be deleted: %s", problem)

    def _check_disk(self) -> None:
        """Reserve space for the database while there is some, and warn before the disk is full; regularly."""
        try:
            problem = low_space(self.data.paths.state_dir)
            if problem and not self._disk_is_low:
                _log.warning("%s: stop, reset or remove agents (`dispatcher top`), or add space", problem)
            self._disk_is_low = bool(problem)
            if not problem:
                self._database.reserve()
        except DispatcherError as error:
            _log.warning("%s", error)
        finally:
            self._slow_timers.after(DISK, self._check_disk)

    @property
    def _interval(self) -> float:
        return max(0.1, self.registry.specs.config.manager.reconcile_interval)

    def every(self, seconds: float, call: Callable[[], object]) -> None:
        """Call regularly, from a thread for quick calls."""
        self._timers.every(seconds, call)

    def close(self) -> None:
        """Stop all threads.  Agents continue to run."""
        self._closed.set()
        self._timers.close()
        self._guard_timers.close()
        self._slow_timers.close()
        self._log_collector.close()
        self.registry.flush()
        for backend in self.backends:
            backend.close(CLOSE)
        self.registry.write_last_used()
        self.reconciler.save()
        self.observers.close()
        agents = self.registry.agents.values()
        if all(agent.row.observed in DEAD and agent.operation is None for agent in agents):
            self.data.sockets.close()

    def apply_config(self, config: Config) -> list[str]:
        """Use a new configuration from now on; return in sentences what changed.

        :raises ConfigError: it is invalid; after this or any other exception the earlier one is in use.
        """
        old = self.registry.specs.config
        changed, made = self._prepare(config)
        try:
            return [*changed, *self._commit(config, made)]
        except Exception:
            with restoring():
                self._commit(old, self.backends.make(made, old))
            raise

    def _prepare(self, config: Config) -> tuple[list[str], dict[str, Made]]:
        """Check a new configuration; return what will change, and new instances of providers by name."""
        changed = self._plugins.refresh()
        self._plugins.load_all(configured(config))
        config.validate_providers(self._plugins)
        for name in config.plugins:
            self._plugins.load(name)
        old = self.registry.specs.config
        new_options = provider_changes(old, config)
        made = self.backends.make(
            [each.name for each in self.backends if each.name in new_options or not each.usable], config
        )
        return [*changed, *app_changes(old, config), *group_changes(old, config)], made

    def _commit(self, config: Config, made: dict[str, Made]) -> list[str]:
        changed: list[str] = []
        new_options = provider_changes(self.registry.specs.config, config)
        self.backends.config = config
        outdated = self.registry.use_specs(self._specs(config))
        if stopped := self.access.enforce():
            changed.append(f"agents that are stopped, as their users may not use the app: {stopped}")
        for name, instance in made.items():
            backend = self.backends.get(name)
            was_usable = backend.usable
            self._timers.after(OLD_PROVIDER, backend.use(instance))
            self._watch(backend)
            if instance.provider is None and was_usable:
                changed.append(f"The provider {name} keeps its earlier options: {instance.problem}")
            elif name in new_options:
                changed.append(f"The provider {name} has new options.")
            elif backend.usable:
                changed.append(f"The provider {name} can be used now.")
        self.observers.update()
        for name in self._wanted_providers():
            backend = self.backends.get(name)
            if backend.contact is Contact.NOT_CALLED or (name in made and name not in new_options):
                self.reconciler.sweep_soon(backend)
                self._watch(backend)
        if outdated:
            changed.append(f"outdated agents, which a restart renews: {outdated}")
        return changed
