"""The provider `libvirt`: each agent is a virtual machine."""

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
    Conflict,
    Deadline,
    DeadlineExceeded,
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
    SshMultiplexer,
    Unavailable,
    Usage,
    no_progress,
    read_lines,
)
from dispatcher_libvirt import domain_xml, errors, explain, host, logs, observe, stop
from dispatcher_libvirt.connection import Backend
from dispatcher_libvirt.disks.pool import PoolStorage
from dispatcher_libvirt.disks.storage import LocalStorage, Storage
from dispatcher_libvirt.domains import DomainInfo, Domains
from dispatcher_libvirt.network import NetworkFilters, ssh_arguments
from dispatcher_libvirt.new_connections import NewConnections
from dispatcher_libvirt.observe import Watch
from dispatcher_libvirt.options import AppOptions, Options, options_of, unsupported_network
from dispatcher_libvirt.start import Starter

_SSH = 15.0  # seconds for a command of ssh
_EXAMINE = 10.0  # seconds for the first examination of the host in `explain`
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
    """Virtual machines of a libvirtd on this host or another."""

    name: ClassVar[str] = domain_xml.PROVIDER
    isolation: ClassVar[Isolation] = Isolation.VM
    Options: ClassVar[type[BaseModel]] = Options
    AppOptions: ClassVar[type[BaseModel]] = AppOptions

    def __init__(self, *, context: ProviderContext, options: BaseModel) -> None:
        super().__init__(context=context, options=options)
        assert isinstance(options, Options)
        self._options = own = options
        uri = own.uri or ("qemu:///system" if os.geteuid() == 0 else "qemu:///session")
        self._remote = errors.is_remote(uri)
        self._backend = Backend(uri, connections=own.connections, keepalive=own.keepalive)
        self._domains = Domains(self._backend, context.installation)
        self._ssh: SshMultiplexer | None = None
        if self._remote:
            program, arguments, there = ssh_arguments(uri)
            self._ssh = SshMultiplexer(there, context.run_dir / "ssh", options=arguments, program=program)
        self._storage: Storage = (
            PoolStorage(context, own, self._backend) if self._remote else LocalStorage(context, own)
        )
        self._rates = NewConnections(context.installation, local=not self._remote, privileged=context.privileged)
        self._filters = NetworkFilters(self._backend, context.installation, self._rates)
        self._starter = Starter(own, self._domains, self._storage, self._filters)
        self._host: host.Host | None = None
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
            if self._options.network:
                self._rates.fault(deadline, again=True)

    def explain(self, app: App | None) -> Sequence[Finding]:
        with contextlib.suppress(DispatcherError):  # `check` reports a backend that does not answer
            self._examined(Deadline(_EXAMINE))
        if app is None:
            return list(explain.backend(self._host))
        unbounded = self._rates.fault(Deadline(_EXAMINE)) if self._options.network else None
        findings = list(explain.application(app, self._options, self._host, unbounded))
        try:
            reader = self._host.reader() if self._host else None
            self._starter.check_image(app, reader, Deadline(60), no_progress)
            findings.append(Finding(level=Level.OK, what="The files that it boots from are present and valid"))
        except DispatcherError as error:
            findings.append(Finding(level=Level.ERROR, what=f"{error.what}: {error.why}", fix=error.fix))
        return findings

    def faults(self, app: App) -> Iterator[str]:
        own, key = options_of(app), f"apps.{app.name}"
        if why := unsupported_network(app, self._options):
            yield f"{key}.network: {app.network.value!r} is not available: {why}"
        if any("{socket}" in text for text in (*own.command, *app.environment.values())):
            yield f"{key}.libvirt.command: a machine has no {{socket}}; write {{port}}, the port of the app in it"
        if not self._remote:
            for name in ("image", "kernel", "initrd"):
                path = getattr(own, name)
                if path and not os.path.lexists(path) and os.access(path.parent, os.X_OK):
                    yield f"{key}.libvirt.{name}: there is no {path}"

    def prepare(self, app: App, *, deadline: Deadline, progress: Progress) -> None:
        self._starter.check_image(app, self._examined(deadline).reader(), deadline, progress)

    def handle(self, spec: AgentSpec) -> Handle:
        return domain_xml.handle_of(spec, remote=self._remote)

    def ensure(self, spec: AgentSpec, *, deadline: Deadline, progress: Progress) -> Handle:
        return self._starter.ensure(spec, self._examined(deadline), deadline, progress)

    def observe(self, handle: Handle, *, deadline: Deadline) -> Observation:
        return self._tunneled(handle, observe.observation(self._domains.find(handle.name, deadline)), deadline)

    def stop(self, handle: Handle, *, grace: float, deadline: Deadline, progress: Progress) -> None:
        def wake(found: DomainInfo) -> None:
            self._starter.wake(handle, found, deadline, progress)

        found = self._domains.find(handle.name, deadline)
        stop.stop(self._domains, handle, wake=wake, grace=grace, deadline=deadline, progress=progress)
        self._release_address(handle, found, deadline)
        self._remove_tunnel(handle)
        self._storage.remove_cloud_init(handle.name, deadline)

    def destroy(self, handle: Handle, *, data: bool, deadline: Deadline, progress: Progress) -> None:
        found = self._domains.find(handle.name, deadline)
        if found is not None and not data:  # the data disk stays, so the guest must write it
            self.stop(handle, grace=stop.FLUSH, deadline=deadline, progress=progress)
        progress("removing the machine")
        self._domains.remove(handle.name, deadline)
        self._release_address(handle, found, deadline)
        self._remove_tunnel(handle)
        self._storage.remove_cloud_init(handle.name, deadline)
        self._storage.remove(handle.name, data=data, deadline=deadline)

    def list(self, *, deadline: Deadline) -> Iterable[tuple[Handle, Observation]]:
        # Read before the machines: one that ends meanwhile is not added again.
        bounded = self._rates.addresses(deadline) if self._bounds_rates(deadline) else None
        found = list(self._domains.all(deadline))
        if bounded is not None:
            try:
                self._rates.add({one.label.address for one in found if one.label.address} - bounded, deadline)
            except ProviderError as error:
                self.context.log.warning("%s", error)
        return [(one.handle, self._tunneled(one.handle, observe.observation(one), deadline)) for one in found]

    def suspend(self, handle: Handle, *, depth: Depth, deadline: Deadline, progress: Progress) -> None:
        stop.suspend(self._domains, handle, depth, deadline, progress)

    def resume(self, handle: Handle, *, deadline: Deadline, progress: Progress) -> None:
        found = self._domains.find(handle.name, deadline)
        if found is None:
            raise NotFound(f"The machine {handle.name} does not exist", fix="start the agent")
        self._starter.wake(handle, found, deadline, progress)

    def logs(self, handle: Handle, *, tail: int, follow: bool, deadline: Deadline) -> Iterator[bytes]:
        if self._remote:
            raise self.unsupported(Capability.LOGS)
        directory = domain_xml.log_dir_of(handle)
        if directory is None:
            return iter(())
        return read_lines(directory / logs.NAME, newest=0, tail=tail, follow=follow, deadline=deadline)

    def listeners(self, handle: Handle, *, deadline: Deadline) -> Sequence[str]:
        log_dir = domain_xml.log_dir_of(handle)
        return logs.listeners(log_dir) if log_dir else ()

    def usage(self, handles: Sequence[Handle], *, deadline: Deadline) -> Mapping[str, Usage]:
        names = [handle.name for handle in handles]
        return observe.usage(self._backend, names, deadline, local=not self._remote)

    def watch(self, on_change: Callable[[str], None]) -> Closeable:
        return Watch(self._backend, f"dispatcher-{self.context.installation}-", on_change)

    def export_data(self, handle: Handle, directory: Path, *, deadline: Deadline, progress: Progress) -> None:
        self._check_stopped(handle, deadline)
        self._storage.export_data(handle, directory, deadline, progress)

    def import_data(self, handle: Handle, directory: Path, *, deadline: Deadline, progress: Progress) -> None:
        self._check_stopped(handle, deadline)
        self._storage.import_data(handle, directory, deadline, progress)

    def close(self) -> None:
        self._backend.close()

    def _tunneled(self, handle: Handle, seen: Observation, deadline: Deadline) -> Observation:
        """Return an observation with an endpoint of this host."""
        if self._ssh is None or "socket" not in handle.data:
            return seen
        return self._ssh.redirect(seen, handle.data["socket"], deadline.bounded(_SSH))

    def _remove_tunnel(self, handle: Handle) -> None:
        """Remove an agent's tunnel, and with the last one the connection.  Absent is success."""
        if self._ssh and "socket" in handle.data:
            with contextlib.suppress(Unavailable, DeadlineExceeded):
                self._ssh.cancel(handle.data["socket"], Deadline(_SSH))
                if not self._ssh.forwards:
                    self._ssh.close(Deadline(_SSH))

    def _bounds_rates(self, deadline: Deadline) -> bool:
        """Whether there may be machines whose new connections are bounded by rules of this host."""
        return bool(self._options.network) and self._rates.fault(deadline) is None

    def _release_address(self, handle: Handle, found: DomainInfo | None, deadline: Deadline) -> None:
        """Free the address that a machine may have on a libvirt network."""
        address = found.label.address if found else ""
        if network := found.label.network if found else self._options.network:
            self._filters.release(network, handle.name, deadline, address=address)

    def _examined(self, deadline: Deadline) -> host.Host:
        """Return the backend's capabilities, examined once, and again by each `check`."""
        if self._host is None:
            self.check(deadline=deadline)
        assert self._host is not None
        return self._host

    def _check_stopped(self, handle: Handle, deadline: Deadline) -> None:
        """Ensure that no machine uses an agent's data disk.

        :raises Conflict: a machine uses it.
        """
        found = self._domains.find(handle.name, deadline)
        if found is not None and observe.observation(found).state is not BackendState.STOPPED:
            raise Conflict(
                f"The machine {handle.name} uses its data disk",
                why="it runs or sleeps",
                fix="stop the agent first",
            )
