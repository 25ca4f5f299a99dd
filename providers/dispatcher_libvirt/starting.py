"""Bringing an agent's machine up: image, disks, seed, description, start; and undoing what a failure leaves.

Touches libvirt through `Machines`, disks through `Disks`.
"""

from __future__ import annotations

import contextlib
import logging
import secrets
import threading
import time
from dataclasses import dataclass
from pathlib import Path

import libvirt

from dispatcher.clock import Deadline
from dispatcher.errors import Conflict, DeadlineExceeded, DispatcherError, NotFound, ProviderError, SpecConflict
from dispatcher.model import AgentSpec, App, BackendState, Handle
from dispatcher.provider import Progress, ProviderContext
from dispatcher_libvirt import console, domain_xml, errors_map, images, network, observing, plan, seed
from dispatcher_libvirt.connection import Lane
from dispatcher_libvirt.disks import BOOTED, Disks, User
from dispatcher_libvirt.images import Images, Reader
from dispatcher_libvirt.machines import Found, Machines, clash
from dispatcher_libvirt.network import Ports
from dispatcher_libvirt.options import Options, disk_of, options_of
from dispatcher_libvirt.plan import Host, Paths

_PORT_TRIES = 8
_CLEANING = 20.0  # seconds for undoing a start that failed, whatever its own deadline said

_log = logging.getLogger("dispatcher.provider.libvirt")


@dataclass
class Made:
    """What a start has made so far and a failure removes again."""

    directory: bool = False
    data: bool = False
    root: Path | None = None
    domain: bool = False


class Starter:
    """Starts and wakes machines."""

    def __init__(self, context: ProviderContext, options: Options, machines: Machines, disks: Disks) -> None:
        self._context, self._options = context, options
        self._machines, self._disks = machines, disks
        self._images = Images()
        self._ports = Ports(*options.ports)
        self._seeds = threading.Lock()
        self._filters: dict[str, str] = {}  # as this instance last defined them

    # -- starting ----------------------------------------------------------------------------------------

    def ensure(self, spec: AgentSpec, host: Host, deadline: Deadline, progress: Progress) -> Handle:
        """See `Provider.ensure`."""
        if deadline.expired:
            raise DeadlineExceeded(f"No time was left to start {spec.backend_name}")
        plan.check_spec(spec, self._options, host)
        handle = plan.handle_of(spec)
        progress("looking for the machine")
        found = self._machines.find(handle.name, deadline)
        if found is not None and found.label is None:
            raise clash(handle.name)
        if found is not None and observing.observation(found).state is not BackendState.STOPPED:
            assert found.label is not None
            if found.label.spec != spec.hash:
                raise SpecConflict(
                    f"The machine {handle.name} is of another specification",
                    why="its app has changed since it was started",
                    fix="stop the agent, then start it again",
                )
            self.wake(handle, found, deadline, progress)
            return handle
        progress("checking the image")
        self.check_image(spec.app, self._reader(spec, host), deadline, progress)
        made = Made()
        try:
            self._start(spec, host, made, deadline, progress)
        except BaseException:
            self._undo(handle.name, made)
            raise
        return handle

    def check_image(
        self, app: App, reader: Reader | None, deadline: Deadline, progress: Progress
    ) -> tuple[str, str]:
        """Return the fingerprints of the base image and of everything that boots.

        :raises ProviderError: something is missing, unreadable, damaged or of another format.
        """
        options = options_of(app)
        seed.read_user_data(options.user_data)
        self._disks.prepare()
        if reader is not None and (command := images.passable(self._disks.top / "x", reader)):
            raise ProviderError(
                f"Machines cannot reach their disks in {self._disks.top}",
                why=f"their QEMU runs as user {reader.uid}, and a directory above does not let it pass",
                fix=command,
            )
        tick = lambda: progress("checking the image")  # noqa: E731
        return self._images.check(options, reader, deadline=deadline, tick=tick)

    def _start(self, spec: AgentSpec, host: Host, made: Made, deadline: Deadline, progress: Progress) -> None:
        name, options = spec.backend_name, options_of(spec.app)
        user = self._user(spec.uid, spec.gid)
        progress("making the disks")
        made.directory = self._disks.make_directory(name)
        root = self._root_disk(spec, user, made, deadline, progress)
        self._data_disk(spec, user, made, deadline, progress)
        static = options.endpoint != "vsock" and spec.app.network.value == "none"
        paths = Paths(root=root, data=self._disks.data(name), seed=self.write_seed(spec, user, static=static))
        net = self._options.network if spec.app.network.value == "private" else ""
        filter_name = self._network(net, deadline) if net else ""
        progress("describing the machine")
        taken: set[int] = set()
        for _ in range(_PORT_TRIES):
            port = 0 if net or options.endpoint == "vsock" else self._ports.take(avoid=taken)
            machine = plan.machine_of(
                spec,
                host=host,
                paths=paths,
                port=port,
                started=time.time(),
                network=net,
                network_filter=filter_name,
            )
            made.domain = True
            self._begin_log(spec)
            self._machines.define(domain_xml.build(machine), name, deadline)
            progress("starting the machine", "QEMU")
            if self._machines.start(name, deadline, lambda: progress("starting the machine", "QEMU")):
                progress("booting")
                return
            taken.add(port)
        raise self._no_port()

    @staticmethod
    def _begin_log(spec: AgentSpec) -> None:
        try:
            console.begin(spec.log_dir)
        except OSError as error:
            raise ProviderError(
                f"The log in {spec.log_dir} cannot be written",
                why=error.strerror or str(error),
                fix="see that the disk has space and that the directory is the manager's",
            ) from error

    def _data_disk(self, spec: AgentSpec, user: User, made: Made, deadline: Deadline, progress: Progress) -> None:
        name, options, size = spec.backend_name, options_of(spec.app), disk_of(spec.app)
        full = options.data_allocation == "full"
        tick = lambda: progress("making the disks", "data")  # noqa: E731
        if not self._disks.data(name).exists():
            self._disks.create_data(name, size, user, full=full, deadline=deadline, tick=tick)
            made.data = True
        else:
            self._disks.claim(name, user)
            self._disks.grow_data(name, size, user, full=full, deadline=deadline, tick=tick)
            self._disks.repair(name, user, deadline=deadline, tick=tick)

    def _root_disk(
        self, spec: AgentSpec, user: User, made: Made, deadline: Deadline, progress: Progress
    ) -> Path | None:
        """Return the overlay of the app's base image; before it changes, keep what was."""
        name, options = spec.backend_name, options_of(spec.app)
        tick = lambda: progress("making the disks", "snapshot")  # noqa: E731
        base, boots = self._images.check(options, None, deadline=deadline, tick=tick)
        marker = self._disks.directory(name) / BOOTED
        before = marker.read_text(encoding="ascii").strip() if marker.exists() else ""
        if before and before != boots and self._disks.data(name).exists():
            self._disks.claim(name, user)
            self._disks.snapshot(name, before, options.snapshots, deadline=deadline, tick=tick)
        path = None
        if options.image is not None:
            known = self._disks.roots(name)
            if options.root == "fresh" and base in known:
                known.pop(base).unlink()
            path = self._disks.create_root(name, base, options.image, options.format, user)
            if base not in known:
                made.root = path
            self._disks.forget_roots(name, base, options.snapshots)
        with self._disks.errors("making a machine's directory"):
            temporary = marker.with_name(f".{secrets.token_hex(4)}.new")
            temporary.write_text(boots, encoding="ascii")
            temporary.replace(marker)
        return path

    def _undo(self, name: str, made: Made) -> None:
        """Remove what a start that failed has made; what cannot be removed now is left to `destroy`."""
        deadline = Deadline(_CLEANING)
        try:
            if made.domain:
                self._machines.remove(name, deadline)
            self.remove_seed(name)
            if made.data:
                self._disks.remove(name, data=True)
                return
            if made.root is not None:
                made.root.unlink(missing_ok=True)
            if made.directory:
                self._disks.remove(name, data=True)
        except (DispatcherError, OSError) as error:
            _log.warning("%s: what a failed start left: %s", name, error)

    # -- waking ------------------------------------------------------------------------------------------

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

    def _restore(self, handle: Handle, found: Found, deadline: Deadline, progress: Progress) -> None:
        name = handle.name
        progress("loading its memory")
        with self._seeds:
            seed.placeholder(self._seed_path(name), self._owner(plan.user_of(handle)))
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

    # -- seeds -------------------------------------------------------------------------------------------

    def write_seed(self, spec: AgentSpec, user: User, *, static: bool) -> Path:
        """Write an agent's seed disk, in memory."""
        options = options_of(spec.app)
        files = seed.contents(
            spec,
            instance=f"{spec.backend_name}-{spec.hash[:12]}",
            user_data=seed.read_user_data(options.user_data),
            static=static,
        )
        with self._seeds:
            path = self._seed_path(spec.backend_name)
            seed.write(path, seed.image(files), self._owner(user))
        return path

    def remove_seed(self, name: str) -> None:
        """Remove an agent's seed disk, and the directory with the last one."""
        with self._seeds:
            path = self._seed_path(name)
            path.unlink(missing_ok=True)
            with contextlib.suppress(OSError):  # not the last one
                path.parent.rmdir()

    def _seed_path(self, name: str) -> Path:
        return seed.memory_directory(self._context.installation, self._context.run_dir) / f"{name}.iso"

    # -- networks ----------------------------------------------------------------------------------------

    def _network(self, name: str, deadline: Deadline) -> str:
        """See that a libvirt network is up and its guests' filter current; return the filter's name.

        :raises ProviderError: there is no such network, or it cannot keep guests apart.
        """
        filter_name = f"dispatcher-{self._context.installation}-{name}"
        remote = errors_map.is_remote(self._machines.backend.uri)
        host = set() if remote else network.host_networks()

        def prepare(connection: libvirt.virConnect) -> network.NetworkInfo:
            found = connection.networkLookupByName(name)
            if not found.isActive():
                found.create()
            info = network.parse_network(found.XMLDesc())
            wanted = network.guest_filter(filter_name, info, host)
            if self._filters.get(filter_name) != wanted:
                connection.nwfilterDefineXML(wanted)
                self._filters[filter_name] = wanted
            return info

        info = self._machines.backend.call(
            prepare, what=f"preparing the network {name}", deadline=deadline, lane=Lane.WORK
        )
        if info.forward not in {"nat", "route", "open", ""} or info.gateway is None:
            raise ProviderError(
                f"The libvirt network {name} cannot be used",
                why=f"its mode is {info.forward or 'isolated'!r}, and libvirt gives out no addresses on it",
                fix='use one with forward mode "nat" or "route" and DHCP',
            )
        return filter_name

    def remove_filter(self, name: str, deadline: Deadline) -> None:
        """Remove the filter of a network's guests if no machine uses it any more."""
        filter_name = f"dispatcher-{self._context.installation}-{name}"

        def remove(connection: libvirt.virConnect) -> None:
            with contextlib.suppress(libvirt.libvirtError):  # in use, or gone
                connection.nwfilterLookupByName(filter_name).undefine()
                self._filters.pop(filter_name, None)

        self._machines.backend.call(remove, what=f"removing the filter {filter_name}", deadline=deadline)

    # -- parts -------------------------------------------------------------------------------------------

    def _reader(self, spec: AgentSpec, host: Host) -> Reader | None:
        """Return who reads a machine's files, None where libvirt makes them readable."""
        return Reader(spec.uid, host.qemu[1]) if host.own_users and host.qemu else None

    def _user(self, uid: int, gid: int) -> User:
        return (uid, gid) if self._context.privileged else None

    def _owner(self, user: User) -> User:
        return user if self._context.privileged else None

    def _no_port(self) -> ProviderError:
        return ProviderError(
            "No port on 127.0.0.1 could be had for the machine",
            why=f"{_PORT_TRIES} of them were taken by others at the moment QEMU started",
            fix="widen providers.libvirt.ports, or see who takes them",
        )
