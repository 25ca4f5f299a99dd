"""Domains of one installation: finding them, and what libvirt does to them.  Touches libvirt through `Backend`.

A domain belongs to this installation when its name has the installation's prefix *and* it carries the label in
its metadata.  One of that name without the label is somebody else's and is never touched.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any, TypeVar

import libvirt

from dispatcher.plugin import Deadline, ProviderError, Usage
from dispatcher_libvirt import domain_xml, errors_map, network
from dispatcher_libvirt.connection import Backend, Lane, Tick
from dispatcher_libvirt.domain import Label

_T = TypeVar("_T")
Key = tuple[str, int]
_MOST_KNOWN = 50_000


@dataclass(frozen=True, slots=True, kw_only=True)
class Found:
    """One domain as libvirt told of it.

    :ivar id: of the running domain, -1 when it does not run; :ivar saved: its memory lies on disk.
    :ivar label: None when the domain is somebody else's.
    :ivar host, cid: where its app is reached, for other networks than QEMU's own; "" and 0 when not known (yet).
    """

    name: str
    uuid: str
    id: int
    state: int
    reason: int
    saved: bool
    label: Label | None
    host: str = ""
    cid: int = 0

    @property
    def active(self) -> bool:
        """Whether there is a QEMU for it."""
        return self.id >= 0


class Machines:
    """The domains of one installation on one libvirtd."""

    def __init__(self, backend: Backend, installation: str) -> None:
        self.backend = backend
        self._prefix = f"dispatcher-{installation}-"
        self._installation = installation
        self._lock = threading.Lock()
        # Labels never change under one uuid and id: each start defines anew, each wake has another id.
        self._labels: dict[Key, Label | None] = {}
        self._places: dict[Key, tuple[str, int]] = {}

    # -- looking -----------------------------------------------------------------------------------------

    def find(self, name: str, deadline: Deadline) -> Found | None:
        """Return a domain by its name, None when there is none.

        :raises Unavailable: libvirt cannot be asked.
        """

        def look(connection: libvirt.virConnect) -> Found | None:
            domain = _lookup(connection, name)
            if domain is None:
                return None
            try:
                state, reason = domain.state()
                saved = not domain.isActive() and bool(domain.hasManagedSaveImage())
                return self._found(connection, domain, state, reason, saved=saved)
            except libvirt.libvirtError as error:
                if errors_map.gone(error):
                    return None
                raise

        return self.backend.call(look, what=f"looking at {name}", deadline=deadline)

    def all(self, deadline: Deadline) -> list[Found]:
        """Return all domains of this installation in two calls (and one for each that was not seen before)."""

        def look(connection: libvirt.virConnect) -> list[Found]:
            saved = {one.name() for one in connection.listAllDomains(libvirt.VIR_CONNECT_LIST_DOMAINS_MANAGEDSAVE)}
            found = []
            for domain, stats in connection.getAllDomainStats(libvirt.VIR_DOMAIN_STATS_STATE):
                name = domain.name()
                if not name.startswith(self._prefix):
                    continue
                try:
                    state, reason = stats["state.state"], stats["state.reason"]
                    asleep = name in saved and domain.ID() < 0
                    found.append(self._found(connection, domain, state, reason, saved=asleep))
                except libvirt.libvirtError as error:
                    if not errors_map.gone(error):
                        raise
            return [one for one in found if one.label is not None]

        return self.backend.call(look, what="listing machines", deadline=deadline)

    def usage(self, names: Iterable[str], deadline: Deadline) -> Mapping[str, Usage]:
        """Return what running domains use, all in one call."""
        wanted = set(names)
        kinds = (
            libvirt.VIR_DOMAIN_STATS_CPU_TOTAL | libvirt.VIR_DOMAIN_STATS_BALLOON | libvirt.VIR_DOMAIN_STATS_BLOCK
        )
        # A domain that is busy (being saved, say) is left out rather than waited for.
        flags = libvirt.VIR_CONNECT_GET_ALL_DOMAINS_STATS_ACTIVE | libvirt.VIR_CONNECT_GET_ALL_DOMAINS_STATS_NOWAIT

        def ask(connection: libvirt.virConnect) -> dict[str, Usage]:
            found = {}
            for domain, stats in connection.getAllDomainStats(kinds, flags):
                if (name := domain.name()) in wanted:
                    found[name] = _usage(stats)
            return found

        return self.backend.call(ask, what="asking what machines use", deadline=deadline)

    def ours(self, found: Found | None) -> Found | None:
        """Return `found` if it is this installation's, None otherwise."""
        return found if found is not None and found.label is not None else None

    # -- doing -------------------------------------------------------------------------------------------

    def define(self, xml: str, name: str, deadline: Deadline) -> None:
        """Define a domain, in place of an inactive one of the same name that is this installation's.

        :raises ProviderError: a domain of that name is somebody else's, or the description is not accepted.
        """

        def define(connection: libvirt.virConnect) -> None:
            domain = _lookup(connection, name)
            if domain is not None:
                if self._label(domain) is None:
                    raise clash(name)
                _undefine(domain)
            connection.defineXMLFlags(xml, libvirt.VIR_DOMAIN_DEFINE_VALIDATE)

        self.backend.call(define, what=f"describing {name}", deadline=deadline, lane=Lane.WORK)

    def start(self, name: str, deadline: Deadline, tick: Tick) -> bool:
        """Start a defined or saved domain; False when somebody else has its port."""

        def start(connection: libvirt.virConnect) -> bool:
            try:
                connection.lookupByName(name).create()
            except libvirt.libvirtError as error:
                if errors_map.port_taken(error):
                    return False
                raise
            return True

        return self.backend.call(start, what=f"starting {name}", deadline=deadline, lane=Lane.WORK, tick=tick)

    def change_saved_port(self, name: str, port: int, deadline: Deadline) -> None:
        """Give a saved domain another forwarded port, in its saved state too."""

        def change(connection: libvirt.virConnect) -> None:
            domain = connection.lookupByName(name)
            text = domain.managedSaveGetXMLDesc(libvirt.VIR_DOMAIN_SAVE_IMAGE_XML_SECURE)
            domain.managedSaveDefineXML(domain_xml.with_port(text, port), libvirt.VIR_DOMAIN_SAVE_RUNNING)

        self.backend.call(change, what=f"moving {name} to another port", deadline=deadline, lane=Lane.WORK)

    def act(
        self,
        name: str,
        action: Callable[[libvirt.virDomain], _T],
        *,
        what: str,
        deadline: Deadline,
        tick: Tick | None = None,
        lane: Lane = Lane.WORK,
    ) -> _T | None:
        """Return what `action` returns on a domain; None when there is none."""

        def run(connection: libvirt.virConnect) -> _T | None:
            domain = _lookup(connection, name)
            if domain is None:
                return None
            try:
                return action(domain)
            except libvirt.libvirtError as error:
                if errors_map.gone(error):
                    return None
                raise

        return self.backend.call(run, what=f"{what} {name}", deadline=deadline, tick=tick, lane=lane)

    def remove(self, name: str, deadline: Deadline) -> None:
        """End a domain by force if it runs, and forget it with its saved memory.  Absent is success.

        Somebody else's domain of that name is left alone.
        """

        def remove(domain: libvirt.virDomain) -> None:
            if self._label(domain) is None:
                return
            if domain.isActive():
                try:
                    domain.destroy()
                except libvirt.libvirtError as error:
                    if error.get_error_code() != libvirt.VIR_ERR_OPERATION_INVALID:  # ended meanwhile
                        raise
            _undefine(domain)

        self.act(name, remove, what="removing", deadline=deadline)

    # -- parts -------------------------------------------------------------------------------------------

    def _found(
        self, connection: libvirt.virConnect, domain: libvirt.virDomain, state: int, reason: int, *, saved: bool
    ) -> Found:
        key = (domain.UUIDString(), domain.ID())
        with self._lock:
            known, label = key in self._labels, self._labels.get(key)
        if not known:
            label = self._label(domain)
            self._remember(self._labels, key, label)
        found = Found(
            name=domain.name(), uuid=key[0], id=key[1], state=state, reason=reason, saved=saved, label=label
        )
        if label is None or not found.active or label.port:
            return found
        return self._place(domain, key, found)

    def _place(self, domain: libvirt.virDomain, key: Key, found: Found) -> Found:
        """Add where the app of a domain without a forwarded port is reached."""
        assert found.label is not None
        with self._lock:
            place = self._places.get(key)
        if place is None:
            if found.label.network:
                place = (_address(domain, network.mac_address(found.name)), 0)
            else:
                place = ("", _cid(domain))
            if place != ("", 0):
                self._remember(self._places, key, place)
        return replace(found, host=place[0], cid=place[1])

    def _remember(self, where: dict[Key, Any], key: Key, value: object) -> None:
        with self._lock:
            if len(where) > _MOST_KNOWN:
                where.clear()
            where[key] = value

    def _label(self, domain: libvirt.virDomain) -> Label | None:
        try:
            text = domain.metadata(libvirt.VIR_DOMAIN_METADATA_ELEMENT, domain_xml.NAMESPACE)
            label = domain_xml.parse_label(text)
        except libvirt.libvirtError as error:
            if error.get_error_code() == libvirt.VIR_ERR_NO_DOMAIN_METADATA:
                return None
            raise
        except ValueError:
            return None
        return label if label.installation == self._installation else None


def clash(name: str) -> ProviderError:
    """Return the error for a domain of an agent's name that is not its."""
    return ProviderError(
        f"A machine called {name} exists already and is not the dispatcher's",
        why="it does not carry this installation's label",
        fix=f"look at it (virsh dumpxml {name}); rename or undefine it",
    )


def _lookup(connection: libvirt.virConnect, name: str) -> libvirt.virDomain | None:
    try:
        return connection.lookupByName(name)
    except libvirt.libvirtError as error:
        if errors_map.gone(error):
            return None
        raise


def _undefine(domain: libvirt.virDomain) -> None:
    if not domain.isPersistent():
        return
    flags = (
        libvirt.VIR_DOMAIN_UNDEFINE_MANAGED_SAVE
        | libvirt.VIR_DOMAIN_UNDEFINE_NVRAM
        | libvirt.VIR_DOMAIN_UNDEFINE_SNAPSHOTS_METADATA
    )
    domain.undefineFlags(flags)


def _address(domain: libvirt.virDomain, mac: str) -> str:
    """Return the IPv4 address that the interface with this MAC has: the DHCP server's word, never the guest's."""
    try:
        interfaces = domain.interfaceAddresses(libvirt.VIR_DOMAIN_INTERFACE_ADDRESSES_SRC_LEASE)
    except libvirt.libvirtError as error:
        if errors_map.lost(error):
            raise
        return ""  # one machine's network is gone, say: no reason not to tell of the others
    for interface in interfaces.values():
        if interface.get("hwaddr") == mac:
            for one in interface.get("addrs") or ():
                if one["type"] == libvirt.VIR_IP_ADDR_TYPE_IPV4:
                    return str(one["addr"])
    return ""


def _cid(domain: libvirt.virDomain) -> int:
    return domain_xml.vsock_cid(domain.XMLDesc())


def _usage(stats: Mapping[str, Any]) -> Usage:
    memory = stats.get("balloon.rss") or stats.get("balloon.current")
    disk = sum(int(stats.get(f"block.{index}.allocation", 0)) for index in range(int(stats.get("block.count", 0))))
    cpu = stats.get("cpu.time")
    return Usage(
        memory=None if memory is None else int(memory) * 1024,
        cpu_seconds=None if cpu is None else int(cpu) / 1e9,
        disk=disk,
    )
