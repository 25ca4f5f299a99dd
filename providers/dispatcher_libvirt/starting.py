"""Bringing an agent's machine up: image, disks, seed, description, start; and undoing what a failure leaves.

Touches libvirt through `Machines`, disks through a `Storage`.
"""

from __future__ import annotations

import logging
import time

import libvirt

from dispatcher.plugin import (
    AgentSpec,
    App,
    BackendState,
    Conflict,
    Deadline,
    DeadlineExceeded,
    DispatcherError,
    Handle,
    NotFound,
    Progress,
    ProviderContext,
    ProviderError,
    SpecConflict,
)
from dispatcher_libvirt import domain_xml, errors_map, observing, plan, seed
from dispatcher_libvirt.filters import Filters
from dispatcher_libvirt.images import Reader
from dispatcher_libvirt.machines import Found, Machines, clash
from dispatcher_libvirt.network import Ports
from dispatcher_libvirt.options import Options, options_of
from dispatcher_libvirt.plan import Host, Paths
from dispatcher_libvirt.storage import Made, Storage

_PORT_TRIES = 8
_CLEANING = 20.0  # seconds for undoing a start that failed, whatever its own deadline said
_SET_CLOCK = 5.0

_log = logging.getLogger("dispatcher.plugin.provider.libvirt")


class Starter:
    """Starts and wakes machines."""

    def __init__(
        self, context: ProviderContext, options: Options, machines: Machines, storage: Storage, filters: Filters
    ) -> None:
        self._context, self._options = context, options
        self._machines, self._storage, self._filters = machines, storage, filters
        self._remote = errors_map.is_remote(machines.backend.uri)
        self._ports = Ports(*options.ports, here=not self._remote)

    def ensure(self, spec: AgentSpec, host: Host, deadline: Deadline, progress: Progress) -> Handle:
        """See `Provider.ensure`."""
        if deadline.expired:
            raise DeadlineExceeded(f"No time was left to start {spec.backend_name}")
        plan.check_spec(spec, self._options, host)
        handle = plan.handle_of(spec, remote=self._remote)
        progress("looking for the machine")
        found = self._machines.find(handle.name, deadline)
        if found is not None and found.label is None:
            raise clash(handle.name)
        state = observing.observation(found).state
        if found is not None and state is not BackendState.STOPPED:
            assert found.label is not None
            if found.label.spec != spec.hash:
                raise SpecConflict(
                    f"The machine {handle.name} is of another specification",
                    why="its app has changed since it was started",
                    fix="stop the agent, then start it again",
                )
            self.wake(handle, found, deadline, progress)
            if state is BackendState.STARTING:
                progress("booting")
            return handle
        progress("checking the image")
        self.check_image(spec.app, self._reader(spec, host), deadline, progress)
        made = Made()
        defined, network = False, ""
        try:
            progress("making the disks")
            root, data = self._storage.make(spec, made, deadline, progress)
            network = self._options.network if spec.app.network.value == "private" else ""
            seed_disk = self._storage.write_seed(spec, self._seed(spec, static=not network), deadline)
            progress("describing the machine")
            paths = Paths(root=root, data=data, seed=seed_disk)
            defined = True
            with self._filters.on(network, deadline) as network_filter:
                self._start(spec, host, paths, network, network_filter, deadline, progress)
        except BaseException:
            self._undo(handle.name, made, network, defined=defined)
            raise
        return handle

    def check_image(self, app: App, reader: Reader | None, deadline: Deadline, progress: Progress) -> None:
        """See that everything that an app boots from is there.

        :raises DispatcherError: something is missing, unreadable, damaged or of another format.
        """
        seed.read_user_data(options_of(app).user_data)
        self._storage.check(app, reader, deadline, progress)

    def _seed(self, spec: AgentSpec, *, static: bool) -> dict[str, bytes]:
        options = options_of(spec.app)
        return seed.contents(
            spec,
            instance=f"{spec.backend_name}-{spec.hash[:12]}",
            user_data=seed.read_user_data(options.user_data),
            static=static and options.endpoint != "vsock",
        )

    def _start(
        self,
        spec: AgentSpec,
        host: Host,
        paths: Paths,
        network: str,
        network_filter: str,
        deadline: Deadline,
        progress: Progress,
    ) -> None:
        name = spec.backend_name
        forwarded = not network and options_of(spec.app).endpoint != "vsock"
        taken: set[int] = set()
        for _ in range(_PORT_TRIES):
            machine = plan.machine_of(
                spec,
                host=host,
                paths=paths,
                console=self._storage.begin_log(spec),
                port=self._ports.take(avoid=taken) if forwarded else 0,
                started=time.time(),
                network=network,
                network_filter=network_filter,
            )
            self._machines.define(domain_xml.build(machine), name, deadline)
            progress("starting the machine", "QEMU")
            if self._machines.start(name, deadline, lambda: progress("starting the machine", "QEMU")):
                progress("booting")
                return
            taken.add(machine.label.port)
        raise self._no_port()

    def _undo(self, name: str, made: Made, network: str, *, defined: bool) -> None:
        """Remove what a start that failed has made; what cannot be removed now is left to `destroy`."""
        deadline = Deadline(_CLEANING)
        try:
            if defined:
                self._machines.remove(name, deadline)
            if network:
                self._filters.remove(network, deadline)
        except DispatcherError as error:  # perhaps it runs: its disks must stay
            _log.warning("%s: what a failed start left: %s", name, error)
            return
        self._storage.undo(name, made, deadline)

    def wake(self, handle: Handle, found: Found, deadline: Deadline, progress: Progress) -> None:
        """Make a sleeping machine run; one that runs stays as it is.

        :raises NotFound: it ended; :raises ProviderError: its saved memory cannot be used.
        """
        if found.saved and not found.active:
            self._restore(handle, found, deadline, progress)
        elif found.state == libvirt.VIR_DOMAIN_PAUSED:
            progress("waking the machine")
            self._machines.act(handle.name, lambda domain: domain.resume(), what="waking", deadline=deadline)
        elif found.state == libvirt.VIR_DOMAIN_PMSUSPENDED:
            progress("waking the machine")
            self._machines.act(handle.name, lambda domain: domain.pMWakeup(), what="waking", deadline=deadline)
        elif not found.active:
            raise NotFound(f"The machine {handle.name} has ended", fix="start the agent again")
        else:
            return
        if found.label is not None and found.label.guest_agent:
            self._set_clock(handle.name)

    def _restore(self, handle: Handle, found: Found, deadline: Deadline, progress: Progress) -> None:
        name = handle.name
        progress("loading its memory")
        self._storage.keep_seed(handle, deadline)
        taken: set[int] = set()
        for _ in range(_PORT_TRIES):
            try:
                if self._machines.start(name, deadline, lambda: progress("loading its memory")):
                    return
            except (ProviderError, Conflict) as error:
                raise ProviderError(
                    f"The saved memory of {name} cannot be used",
                    why=error.why or error.what,
                    fix="stop the agent and start it again: it then boots, its data is kept",
                ) from error
            if found.label is None or not found.label.port:
                break
            taken.add(found.label.port)
            port = self._ports.take(avoid=taken)
            taken.add(port)
            self._machines.change_saved_port(name, port, deadline)
        raise self._no_port()

    def _set_clock(self, name: str) -> None:
        """Let the guest agent set the clock of a guest that slept, if it answers."""
        try:
            self._machines.act(
                name,
                lambda domain: domain.setTime(flags=libvirt.VIR_DOMAIN_TIME_SYNC),
                what="setting the clock of",
                deadline=Deadline(_SET_CLOCK),
            )
        except DispatcherError as error:
            _log.info("%s: its guest agent does not set the clock: %s", name, error)

    @staticmethod
    def _reader(spec: AgentSpec, host: Host) -> Reader | None:
        """Return who reads a machine's files, None where libvirt makes them readable."""
        return Reader(spec.uid, host.qemu[1]) if host.own_users and host.qemu else None

    @staticmethod
    def _no_port() -> ProviderError:
        return ProviderError(
            "No port on 127.0.0.1 could be had for the machine",
            why=f"{_PORT_TRIES} of them were taken by others at the moment QEMU started",
            fix="widen providers.libvirt.ports, or see who takes them",
        )
