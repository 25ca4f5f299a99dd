"""The provider `libvirt`: each agent a virtual machine.  Ties the parts together; touches nothing by itself."""

from __future__ import annotations

import contextlib
import os
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import ClassVar

from pydantic import BaseModel

from dispatcher.plugin import (
    AgentSpec,
    App,
    BackendState,
    Capability,
    Closeable,
    ConfigError,
    Conflict,
    Deadline,
    Depth,
    DispatcherError,
    Finding,
    Handle,
    Isolation,
    Level,
    NotFound,
    Observation,
    Progress,
    Provider,
    ProviderContext,
    ProviderError,
    Usage,
    no_progress,
)
from dispatcher_libvirt import console, ending, errors_map, explaining, host, observing, options, plan
from dispatcher_libvirt.connection import Backend
from dispatcher_libvirt.filters import Filters
from dispatcher_libvirt.images import Reader
from dispatcher_libvirt.machines import Found, Machines
from dispatcher_libvirt.pool import PoolStorage
from dispatcher_libvirt.starting import Starter
from dispatcher_libvirt.storage import LocalStorage, Storage
from dispatcher_libvirt.tunnel import Tunnels
from dispatcher_libvirt.watching import Watch

_EXAMINE = 10.0  # seconds for a look at the host, where nobody had one before
_ALWAYS = frozenset(
    {
        Capability.SUSPEND,
        Capability.HIBERNATE,
        Capability.LOGS,
        Capability.USAGE,
        Capability.MEMORY_LIMIT,
        Capability.DISK_LIMIT,
        Capability.EVENTS,
        Capability.OWN_DATA,
        Capability.CREDENTIALS,
        Capability.NETWORK_NONE,
    }
)


class LibvirtProvider(Provider):
    """Virtual machines of a libvirtd, of this host or another."""

    name: ClassVar[str] = plan.PROVIDER
    isolation: ClassVar[Isolation] = Isolation.VM
    Options: ClassVar[type[BaseModel]] = options.Options
    AppOptions: ClassVar[type[BaseModel]] = options.AppOptions

    def __init__(self, *, context: ProviderContext, options: BaseModel) -> None:
        super().__init__(context=context, options=options)
        own = _options(options)
        self._options = own
        uri = own.uri or ("qemu:///system" if os.geteuid() == 0 else "qemu:///session")
        self._remote = errors_map.is_remote(uri)
        self._backend = Backend(uri, connections=own.connections, keepalive=own.keepalive)
        self._machines = Machines(self._backend, context.installation)
        self._tunnels = Tunnels(uri, context.run_dir) if self._remote else None
        self._storage: Storage = (
            PoolStorage(context, own, self._backend) if self._remote else LocalStorage(context, own)
        )
        self._filters = Filters(self._backend, context.installation)
        self._starter = Starter(context, own, self._machines, self._storage, self._filters)
        self._host: plan.Host | None = None
        self._examining = threading.Lock()
        system = uri.split("?", 1)[0].endswith("/system")
        self._cpu_limits = system and (self._remote or host.cpu_controller())

    @property
    def capabilities(self) -> frozenset[Capability]:
        found = set(_ALWAYS)
        if self._remote:
            found.discard(Capability.LOGS)
        if self._options.network:
            found.add(Capability.NETWORK_PRIVATE)
        if self._cpu_limits:
            found.add(Capability.CPU_LIMIT)
        return frozenset(found)

    def check(self, *, deadline: Deadline) -> None:
        with self._examining:
            self._host = host.examine(
                self._backend, self._options, privileged=self.context.privileged, deadline=deadline
            )

    def explain(self, app: App | None) -> Sequence[Finding]:
        with contextlib.suppress(DispatcherError):  # that libvirt does not answer is for `check` to say
            self._examined(Deadline(_EXAMINE))
        if app is None:
            return list(explaining.backend(self._host))
        findings = list(explaining.application(app, self._options, self._host))
        try:
            self._starter.check_image(app, self._reader(app), Deadline(60), no_progress)
            findings.append(Finding(level=Level.OK, what="What it boots from is there and whole"))
        except DispatcherError as error:
            findings.append(Finding(level=Level.ERROR, what=f"{error.what}: {error.why}", fix=error.fix))
        return findings

    def prepare(self, app: App, *, deadline: Deadline, progress: Progress) -> None:
        self._examined(deadline)
        self._starter.check_image(app, self._reader(app), deadline, progress)

    def handle(self, spec: AgentSpec) -> Handle:
        return plan.handle_of(spec, remote=self._remote)

    def ensure(self, spec: AgentSpec, *, deadline: Deadline, progress: Progress) -> Handle:
        return self._starter.ensure(spec, self._examined(deadline), deadline, progress)

    def observe(self, handle: Handle, *, deadline: Deadline) -> Observation:
        return self._near(handle, observing.observation(self._machines.find(handle.name, deadline)), deadline)

    def stop(self, handle: Handle, *, grace: float, deadline: Deadline, progress: Progress) -> None:
        def wake(found: Found) -> None:
            self._starter.wake(handle, found, deadline, progress)

        ending.stop(self._machines, handle, wake=wake, grace=grace, deadline=deadline, progress=progress)
        if self._tunnels:
            self._tunnels.remove(handle)
        self._storage.remove_seed(handle.name, deadline)

    def destroy(self, handle: Handle, *, data: bool, deadline: Deadline, progress: Progress) -> None:
        found = self._machines.ours(self._machines.find(handle.name, deadline))
        if found is not None and not data:  # the data disk stays, so the guest must have written it
            self.stop(handle, grace=ending.FLUSH, deadline=deadline, progress=progress)
        progress("removing the machine")
        self._machines.remove(handle.name, deadline)
        if self._tunnels:
            self._tunnels.remove(handle)
        self._storage.remove_seed(handle.name, deadline)
        self._storage.remove(handle.name, data=data, deadline=deadline)
        if found is not None and found.label is not None and found.label.network:
            self._filters.remove(found.label.network, deadline)

    def list(self, *, deadline: Deadline) -> Iterable[tuple[Handle, Observation]]:
        found = [
            (plan.handle_from(one.name, one.label), observing.observation(one))
            for one in self._machines.all(deadline)
            if one.label is not None
        ]
        return [(handle, self._near(handle, seen, deadline)) for handle, seen in found]

    def suspend(self, handle: Handle, *, depth: Depth, deadline: Deadline, progress: Progress) -> None:
        ending.suspend(self._machines, handle, depth, deadline, progress)

    def resume(self, handle: Handle, *, deadline: Deadline, progress: Progress) -> None:
        found = self._machines.ours(self._machines.find(handle.name, deadline))
        if found is None:
            raise NotFound(f"The machine {handle.name} does not exist", fix="start the agent")
        self._starter.wake(handle, found, deadline, progress)

    def logs(self, handle: Handle, *, tail: int, follow: bool, deadline: Deadline) -> Iterator[bytes]:
        if self._remote:
            raise self.unsupported(Capability.LOGS)
        directory = plan.log_dir_of(handle)
        if directory is None:
            return iter(())
        return console.lines(directory, tail=tail, follow=follow, deadline=deadline)

    def usage(self, handles: Sequence[Handle], *, deadline: Deadline) -> Mapping[str, Usage]:
        if not handles:
            return {}
        return self._machines.usage([handle.name for handle in handles], deadline)

    def watch(self, on_change: Callable[[str], None]) -> Closeable:
        return Watch(self._backend, f"dispatcher-{self.context.installation}-", on_change)

    def export_data(self, handle: Handle, directory: Path, *, deadline: Deadline, progress: Progress) -> None:
        self._at_rest(handle, deadline)
        self._storage.export(handle, directory, deadline, progress)

    def import_data(self, handle: Handle, directory: Path, *, deadline: Deadline, progress: Progress) -> None:
        self._at_rest(handle, deadline)
        self._storage.bring(handle, directory, deadline, progress)

    def close(self) -> None:
        self._backend.close()

    # -- parts -------------------------------------------------------------------------------------------

    def _near(self, handle: Handle, seen: Observation, deadline: Deadline) -> Observation:
        """Return an observation with the endpoint as it is reached from here."""
        return self._tunnels.apply(handle, seen, deadline) if self._tunnels else seen

    def _examined(self, deadline: Deadline) -> plan.Host:
        """Return what the backend can do; looked at once, and again by each `check`."""
        if self._host is None:
            self.check(deadline=deadline)
        assert self._host is not None
        return self._host

    def _at_rest(self, handle: Handle, deadline: Deadline) -> None:
        """Make sure that no machine uses an agent's data disk, and that it is known whose it is.

        :raises Conflict: one does, or sleeps; :raises ProviderError: the handle does not say whose it is.
        """
        found = self._machines.ours(self._machines.find(handle.name, deadline))
        if found is not None and observing.observation(found).state is not BackendState.STOPPED:
            raise Conflict(
                f"The machine {handle.name} uses its data disk",
                why="it runs or sleeps",
                fix="stop the agent first",
            )
        if plan.user_of(handle) is None:
            raise ProviderError(f"The handle of {handle.name} does not say whose data it is")

    def _reader(self, app: App) -> Reader | None:
        """Return somebody like the users as whom the app's machines read their files."""
        found = self._host
        return Reader(-1, found.qemu[1]) if found and found.own_users and found.qemu else None


def _options(given: BaseModel) -> options.Options:
    if not isinstance(given, options.Options):
        raise ConfigError("providers.libvirt is no table of the provider libvirt")
    return given
