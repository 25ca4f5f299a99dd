"""libvirt networks and the filter that keeps guests on them from the host.  Touches libvirt through `Backend`.

One filter per installation and network, made with the first machine that needs it and removed with the last.
"""

from __future__ import annotations

import contextlib
import threading
from collections import Counter
from collections.abc import Iterator

import libvirt

from dispatcher.plugin import Deadline, ProviderError
from dispatcher_libvirt import errors_map, network
from dispatcher_libvirt.connection import Backend, Lane

_FORWARDS = frozenset({"nat", "route", "open", ""})


class Filters:
    """The filters of one installation."""

    def __init__(self, backend: Backend, installation: str) -> None:
        self._backend = backend
        self._prefix = f"dispatcher-{installation}-"
        self._lock = threading.Lock()
        self._starting: Counter[str] = Counter()  # by network: machines that are about to use its filter
        self._defined: dict[str, str] = {}  # by name: as this instance last defined it

    @contextlib.contextmanager
    def on(self, name: str, deadline: Deadline) -> Iterator[str]:
        """See that a network is up and its filter current, and yield the filter's name; "" for no network.

        :raises ProviderError: there is no such network, or it cannot keep guests apart.
        """
        if not name:
            yield ""
            return
        with self._lock:
            self._starting[name] += 1
        try:
            yield self._prepare(name, deadline)
        finally:
            with self._lock:
                self._starting[name] -= 1

    def remove(self, name: str, deadline: Deadline) -> None:
        """Remove a network's filter if no machine uses it any more."""
        filter_name = self._prefix + name

        def remove(connection: libvirt.virConnect) -> None:
            with self._lock:
                if self._starting[name]:
                    return
                with contextlib.suppress(libvirt.libvirtError):  # in use, or gone
                    connection.nwfilterLookupByName(filter_name).undefine()

        self._backend.call(remove, what=f"removing the filter {filter_name}", deadline=deadline)

    def _prepare(self, name: str, deadline: Deadline) -> str:
        filter_name = self._prefix + name
        host = set() if errors_map.is_remote(self._backend.uri) else network.host_networks()

        def prepare(connection: libvirt.virConnect) -> network.NetworkInfo:
            found = connection.networkLookupByName(name)
            if not found.isActive():
                found.create()
            info = network.parse_network(found.XMLDesc())
            wanted = network.guest_filter(filter_name, info, host)
            with self._lock:
                if self._defined.get(filter_name) != wanted or not _exists(connection, filter_name):
                    connection.nwfilterDefineXML(wanted)
                    self._defined[filter_name] = wanted
            return info

        what = f"preparing the network {name}"
        info = self._backend.call(prepare, what=what, deadline=deadline, lane=Lane.WORK)
        if info.forward not in _FORWARDS or info.gateway is None:
            raise ProviderError(
                f"The libvirt network {name} cannot be used",
                why=f"its mode is {info.forward or 'isolated'!r}, and libvirt gives out no addresses on it",
                fix='use one with forward mode "nat" or "route" and DHCP',
            )
        return filter_name


def _exists(connection: libvirt.virConnect, name: str) -> bool:
    try:
        connection.nwfilterLookupByName(name)
    except libvirt.libvirtError as error:
        if error.get_error_code() == libvirt.VIR_ERR_NO_NWFILTER:
            return False
        raise
    return True
