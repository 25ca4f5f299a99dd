"""The libvirt domains of one installation.

A domain belongs to the installation when its name has the installation's prefix *and* its metadata carries the
label.  A domain of such a name without the label is foreign and is never touched.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, TypeVar

import libvirt

from dispatcher.plugin import Deadline, Handle, ProviderError
from dispatcher_libvirt import domain_xml, errors
from dispatcher_libvirt.connection import Backend, Lane, Tick
from dispatcher_libvirt.domain_xml import Label

_T = TypeVar("_T")
Key = tuple[str, int]
_MAX_CACHED = 50_000


@dataclass(frozen=True, slots=True, kw_only=True)
class DomainInfo:
    """One domain of the installation.

    :ivar id: of the running domain, -1 otherwise; :ivar saved: its memory is saved on disk.
    :ivar state, reason: libvirt's codes.
    :ivar no_space: it is paused because a disk's file cannot grow.
    :ivar cid: vsock context id of the running domain, 0 without one.
    """

    name: str
    uuid: str
    id: int
    state: int
    reason: int
    saved: bool
    label: Label
    no_space: bool = False
    cid: int = 0

    @property
    def handle(self) -> Handle:
        """The handle of its agent."""
        return self.label.handle(self.name)

    @property
    def active(self) -> bool:
        """Whether it has a QEMU process."""
        return self.id >= 0


class Domains:
    """The domains of one installation on one libvirtd."""

    def __init__(self, backend: Backend, installation: str) -> None:
        self.backend = backend
        self._prefix = f"dispatcher-{installation}-"
        self._installation = installation
        self._lock = threading.Lock()
        # Neither changes under one UUID and id: each start defines a new UUID, each wake has another id.
        self._labels: dict[Key, Label | None] = {}
        self._cids: dict[Key, int] = {}

    def find(self, name: str, deadline: Deadline, *, refuse_foreign: bool = False) -> DomainInfo | None:
        """Return a domain by its name, None when there is none or it is foreign.

        :param refuse_foreign: raise ProviderError for a foreign domain.
        :raises Unavailable: libvirt does not answer.
        """

        def look(domain: libvirt.virDomain) -> DomainInfo | None:
            state, reason = domain.state()
            saved = not domain.isActive() and bool(domain.hasManagedSaveImage())
            found = self._info(domain, state, reason, saved=saved)
            if found is None and refuse_foreign:
                raise _foreign(name)
            return found

        return self.act(name, look, what="looking at", deadline=deadline, lane=Lane.QUERY)

    def all(self, deadline: Deadline) -> list[DomainInfo]:
        """Return all domains of this installation in two calls (and one for each new domain)."""

        def look(connection: libvirt.virConnect) -> list[DomainInfo]:
            saved = {one.name() for one in connection.listAllDomains(libvirt.VIR_CONNECT_LIST_DOMAINS_MANAGEDSAVE)}
            found = []
            for domain, stats in connection.getAllDomainStats(libvirt.VIR_DOMAIN_STATS_STATE):
                name = domain.name()
                if not name.startswith(self._prefix):
                    continue
                try:
                    state, reason = stats["state.state"], stats["state.reason"]
                    found.append(self._info(domain, state, reason, saved=name in saved and domain.ID() < 0))
                except libvirt.libvirtError as error:
                    if not errors.domain_missing(error):
                        raise
            return [one for one in found if one is not None]

        return self.backend.call(look, what="listing machines", deadline=deadline)

    def define(self, xml: str, name: str, deadline: Deadline) -> None:
        """Define a domain; it replaces an inactive one of the same name.

        :raises ProviderError: a domain of that name is foreign, or libvirt does not accept the description.
        """

        def define(connection: libvirt.virConnect) -> None:
            domain = _lookup(connection, name)
            if domain is not None:
                if self._label(domain) is None:
                    raise _foreign(name)
                _undefine(domain)
            connection.defineXMLFlags(xml, libvirt.VIR_DOMAIN_DEFINE_VALIDATE)

        self.backend.call(define, what=f"describing {name}", deadline=deadline, lane=Lane.WORK)

    def start(self, name: str, deadline: Deadline, tick: Tick) -> bool:
        """Start a defined or saved domain; False when its forwarded port is in use."""

        def start(connection: libvirt.virConnect) -> bool:
            try:
                connection.lookupByName(name).create()
            except libvirt.libvirtError as error:
                if errors.port_taken(error):
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
        lane: Lane = Lane.WORK,
        tick: Tick | None = None,
    ) -> _T | None:
        """Return the result of `action` on a domain; None when there is none."""

        def run(connection: libvirt.virConnect) -> _T | None:
            domain = _lookup(connection, name)
            if domain is None:
                return None
            try:
                return action(domain)
            except libvirt.libvirtError as error:
                if errors.domain_missing(error):
                    return None
                raise

        return self.backend.call(run, what=f"{what} {name}", deadline=deadline, tick=tick, lane=lane)

    def remove(self, name: str, deadline: Deadline) -> None:
        """Force a domain off and undefine it with its saved memory.  Absent is success; a foreign one stays."""

        def remove(domain: libvirt.virDomain) -> None:
            if self._label(domain) is None:
                return
            if domain.isActive():
                act_if_active(domain.destroy)
            _undefine(domain)

        self.act(name, remove, what="removing", deadline=deadline)

    def _info(self, domain: libvirt.virDomain, state: int, reason: int, *, saved: bool) -> DomainInfo | None:
        key = (domain.UUIDString(), domain.ID())
        with self._lock:
            known, label = key in self._labels, self._labels.get(key)
        if not known:
            label = self._label(domain)
            self._cache(self._labels, key, label)
        if label is None:
            return None
        found = DomainInfo(
            name=domain.name(), uuid=key[0], id=key[1], state=state, reason=reason, saved=saved, label=label
        )
        if (state, reason) == (libvirt.VIR_DOMAIN_PAUSED, libvirt.VIR_DOMAIN_PAUSED_IOERROR):
            full = libvirt.VIR_DOMAIN_DISK_ERROR_NO_SPACE in domain.diskErrors().values()
            found = replace(found, no_space=full)
        reached_by_vsock = found.active and not label.port and not label.network
        return self._with_cid(domain, key, found) if reached_by_vsock else found

    def _with_cid(self, domain: libvirt.virDomain, key: Key, found: DomainInfo) -> DomainInfo:
        with self._lock:
            cid = self._cids.get(key, 0)
        if not cid:
            cid = domain_xml.vsock_cid(domain.XMLDesc())
            self._cache(self._cids, key, cid)
        return replace(found, cid=cid)

    def _cache(self, cache: dict[Key, Any], key: Key, value: object) -> None:
        with self._lock:
            if len(cache) > _MAX_CACHED:
                cache.clear()
            cache[key] = value

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


def act_if_active(action: Callable[[], object]) -> None:
    """Call a function of a domain; success if it has just ended."""
    try:
        action()
    except libvirt.libvirtError as error:
        if error.get_error_code() != libvirt.VIR_ERR_OPERATION_INVALID:
            raise


def _foreign(name: str) -> ProviderError:
    return ProviderError(
        f"A machine called {name} exists already and is not the dispatcher's",
        why="it does not carry this installation's label",
        fix=f"look at it (virsh dumpxml {name}); rename or undefine it",
    )


def _lookup(connection: libvirt.virConnect, name: str) -> libvirt.virDomain | None:
    try:
        return connection.lookupByName(name)
    except libvirt.libvirtError as error:
        if errors.domain_missing(error):
            return None
        raise


def _undefine(domain: libvirt.virDomain) -> None:
    if domain.isPersistent():
        domain.undefineFlags(
            libvirt.VIR_DOMAIN_UNDEFINE_MANAGED_SAVE
            | libvirt.VIR_DOMAIN_UNDEFINE_NVRAM
            | libvirt.VIR_DOMAIN_UNDEFINE_SNAPSHOTS_METADATA
        )
