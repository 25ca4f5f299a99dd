"""Starting and waking machines: image, disks, description, start; and the cleanup after a failure."""

from __future__ import annotations

import logging
import time
from dataclasses import replace
from functools import partial

import libvirt

from dispatcher.plugin import (
    AgentSpec,
    App,
    BackendState,
    ConfigError,
    Conflict,
    Deadline,
    DeadlineExceeded,
    DispatcherError,
    Handle,
    Network,
    NotFound,
    Progress,
    ProviderError,
    SpecConflict,
    Unsupported,
)
from dispatcher_libvirt import domain_xml, errors, logs, observe
from dispatcher_libvirt.disks import cloud_init
from dispatcher_libvirt.disks.images import Reader
from dispatcher_libvirt.disks.storage import Storage, Undo
from dispatcher_libvirt.domain_xml import Start
from dispatcher_libvirt.domains import DomainInfo, Domains
from dispatcher_libvirt.host import Host
from dispatcher_libvirt.network import NetworkFilters, Ports
from dispatcher_libvirt.options import Options, disk_of, memory_of, options_of, unsupported_network

_PORT_ATTEMPTS = 8
_CLEANUP = 20.0  # seconds for the cleanup after a failed start, independent of its deadline
_SET_CLOCK = 5.0

_log = logging.getLogger("dispatcher.plugin.provider.libvirt")


class Starter:
    """Starts and wakes machines."""

    def __init__(self, options: Options, domains: Domains, storage: Storage, filters: NetworkFilters) -> None:
        self._options = options
        self._domains, self._storage, self._filters = domains, storage, filters
        self._remote = errors.is_remote(domains.backend.uri)
        self._ports = Ports(*options.ports, local=not self._remote)

    def ensure(self, spec: AgentSpec, host: Host, deadline: Deadline, progress: Progress) -> Handle:
        """See `Provider.ensure`."""
        if deadline.expired:
            raise DeadlineExceeded(f"No time was left to start {spec.backend_name}")
        check_spec(spec, self._options, host)
        handle = domain_xml.handle_of(spec, remote=self._remote)
        progress("looking for the machine")
        found = self._domains.find(handle.name, deadline, refuse_foreign=True)
        state = observe.observation(found).state
        if found is not None and state is not BackendState.STOPPED:
            if found.label.spec != spec.hash:
                raise SpecConflict(
                    f"The machine {handle.name} has another specification",
                    why="its app has changed since it was started",
                    fix="stop the agent, then start it again",
                )
            self.wake(handle, found, deadline, progress)
            if state is BackendState.STARTING:
                progress("booting")
            return handle
        if found is not None and found.label.network:  # it has ended, and its next network may be another
            self._filters.release(found.label.network, handle.name, deadline, address=found.label.address)
        progress("checking the image")
        self.check_image(spec.app, host.reader(spec.uid), deadline, progress)
        network = self._options.network if spec.app.network is Network.PRIVATE else ""
        undo: Undo = []
        try:
            progress("creating the disks")
            root, data = self._storage.prepare(spec, undo, deadline, progress)
            undo.append(partial(self._storage.remove_cloud_init, handle.name))
            progress("defining the machine")
            interface = None
            if network:
                undo.append(partial(self._filters.release, network, handle.name))
                others = {one.label.address for one in self._domains.all(deadline) if one.name != handle.name}
                interface = self._filters.claim(network, handle.name, others, deadline)
            image = cloud_init.iso_image(cloud_init.files(spec, interface))
            iso = self._storage.write_cloud_init(spec, image, deadline)
            undo.append(partial(self._domains.remove, handle.name))
            start = Start(host=host, root=root, data=data, cloud_init=iso, interface=interface)
            forwarded = interface is None and options_of(spec.app).endpoint != "vsock"
            self._start(spec, start, deadline, progress, forwarded=forwarded)
        except BaseException:
            _undo(handle.name, undo)
            raise
        return handle

    def check_image(self, app: App, reader: Reader | None, deadline: Deadline, progress: Progress) -> None:
        """Check the files that an app boots from.

        :raises DispatcherError: one is missing, unreadable, damaged or of another format.
        """
        cloud_init.read_user_data(options_of(app).user_data)
        self._storage.check(app, reader, deadline, progress)

    def wake(self, handle: Handle, found: DomainInfo, deadline: Deadline, progress: Progress) -> None:
        """Resume a sleeping machine; a running one is left as it is.

        :raises NotFound: it ended; :raises ProviderError: its saved memory is not usable.
        """
        if found.saved and not found.active:
            self._restore(handle, found, deadline, progress)
        elif found.state == libvirt.VIR_DOMAIN_PAUSED:
            progress("waking the machine")
            self._domains.act(handle.name, libvirt.virDomain.resume, what="waking", deadline=deadline)
        elif found.state == libvirt.VIR_DOMAIN_PMSUSPENDED:
            progress("waking the machine")
            self._domains.act(handle.name, libvirt.virDomain.pMWakeup, what="waking", deadline=deadline)
        elif not found.active:
            raise NotFound(f"The machine {handle.name} has ended", fix="start the agent again")
        else:
            return
        if found.label.guest_agent:
            self._set_clock(handle.name)

    def _start(
        self, spec: AgentSpec, start: Start, deadline: Deadline, progress: Progress, *, forwarded: bool
    ) -> None:
        """Define and start a machine; another port where QEMU finds its own in use."""
        name = spec.backend_name
        tried: set[int] = set()
        for _ in range(_PORT_ATTEMPTS):
            port = self._ports.allocate(avoid=tried) if forwarded else 0
            console = None if self._remote else logs.begin(spec.log_dir)
            start = replace(start, console=console, started=time.time(), port=port)
            self._domains.define(domain_xml.build(spec, start), name, deadline)
            progress("starting the machine", "QEMU")
            if self._domains.start(name, deadline, partial(progress, "starting the machine", "QEMU")):
                progress("booting")
                return
            tried.add(port)
        raise _no_port()

    def _restore(self, handle: Handle, found: DomainInfo, deadline: Deadline, progress: Progress) -> None:
        name = handle.name
        progress("loading its memory")
        self._storage.keep_cloud_init(handle, deadline)
        tried: set[int] = set()
        for _ in range(_PORT_ATTEMPTS):
            try:
                if self._domains.start(name, deadline, partial(progress, "loading its memory")):
                    return
            except (ProviderError, Conflict) as error:
                raise ProviderError(
                    f"The saved memory of {name} is not usable",
                    why=error.why or error.what,
                    fix="stop the agent and start it again: it then boots, and its data is kept",
                ) from error
            if not found.label.port:
                break
            tried.add(found.label.port)
            port = self._ports.allocate(avoid=tried)
            tried.add(port)
            self._domains.change_saved_port(name, port, deadline)
        raise _no_port()

    def _set_clock(self, name: str) -> None:
        """Set the clock of a guest that slept, through its guest agent."""
        try:
            self._domains.act(
                name,
                lambda domain: domain.setTime(flags=libvirt.VIR_DOMAIN_TIME_SYNC),
                what="setting the clock of",
                deadline=Deadline(_SET_CLOCK),
            )
        except DispatcherError as error:
            _log.info("%s: its guest agent did not set the clock: %s", name, error)


def _undo(name: str, actions: Undo) -> None:
    """Remove the remains of a failed start; `destroy` removes what cannot be removed now."""
    deadline = Deadline(_CLEANUP)
    try:
        for action in reversed(actions):
            action(deadline)
    except (DispatcherError, OSError) as error:  # the machine may be running: its disks must stay
        _log.warning("%s: cleanup after a failed start: %s", name, error)


def _no_port() -> ProviderError:
    return ProviderError(
        "No port on 127.0.0.1 was available for the machine",
        why=f"{_PORT_ATTEMPTS} of them were in use at the moment QEMU started",
        fix="widen providers.libvirt.ports, or check which processes use them",
    )


def check_spec(spec: AgentSpec, options: Options, host: Host) -> None:
    """Refuse a specification that no machine can satisfy.

    :raises Unsupported: the network is not available; :raises ConfigError: options contradict each other.
    """
    app, own = spec.app, options_of(spec.app)
    if why := unsupported_network(app, options):
        raise Unsupported(f'apps.{app.name}.network = "{app.network.value}" is not available', why=why)
    on_network = app.network is Network.PRIVATE
    if own.network_bandwidth and not on_network:
        raise ConfigError(
            f"apps.{app.name}.libvirt.network_bandwidth has no effect",
            why="QEMU's user network cannot be limited",
            fix='use network = "private" with providers.libvirt.network, or remove it',
        )
    if own.endpoint == "vsock":
        if on_network:
            raise ConfigError(f'apps.{app.name}.libvirt.endpoint = "vsock" excludes a network')
        if not host.vsock:
            raise Unsupported(
                f'apps.{app.name}.libvirt.endpoint = "vsock" is not available',
                why="the host has no /dev/vhost-vsock",
                fix='load the kernel module vhost_vsock, or use endpoint = "tcp"',
            )
    for text in (spec.agent, spec.user, own.cmdline, own.announce, *own.command):
        if any(not (char.isprintable() or char in "\t\n") for char in text):
            raise ConfigError(f"apps.{app.name}.libvirt: control characters are not allowed")
    memory_of(app)
    disk_of(app)
