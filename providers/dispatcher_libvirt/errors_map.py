"""The one place where libvirt's errors become the project's.  Touches nothing.

Three things are told apart: a daemon of this host that does not run, a remote host that cannot be reached, and
a backend that answers and refuses.
"""

from __future__ import annotations

from urllib.parse import urlsplit

import libvirt

from dispatcher.plugin import Conflict, DeadlineExceeded, DispatcherError, NotFound, ProviderError, Unavailable

#: Codes after which a connection is of no use any more.
_BROKEN = frozenset(
    {
        libvirt.VIR_ERR_SYSTEM_ERROR,
        libvirt.VIR_ERR_NO_CONNECT,
        libvirt.VIR_ERR_RPC,
        libvirt.VIR_ERR_INTERNAL_ERROR,
        libvirt.VIR_ERR_INVALID_CONN,
    }
)
_REMOTE_DOMAINS = frozenset({libvirt.VIR_FROM_RPC, libvirt.VIR_FROM_REMOTE})
_LIBVIRTD = "start libvirtd: systemctl start libvirtd (or virtqemud), and see its log"


def is_remote(uri: str) -> bool:
    """Whether a connection URI names another host."""
    return bool(urlsplit(uri).hostname)


def lost(error: libvirt.libvirtError) -> bool:
    """Whether an error means that the connection, not the request, failed."""
    return error.get_error_code() in _BROKEN and error.get_error_domain() in _REMOTE_DOMAINS


def gone(error: libvirt.libvirtError) -> bool:
    """Whether an error means that the domain does not exist (any more)."""
    return bool(error.get_error_code() == libvirt.VIR_ERR_NO_DOMAIN)


def message(error: libvirt.libvirtError) -> str:
    """Return libvirt's own words in one line of at most 400 characters."""
    text = " ".join(str(error.get_error_message() or error).split())
    return text if len(text) <= 400 else f"{text[:399]}…"


def port_taken(error: libvirt.libvirtError) -> bool:
    """Whether QEMU did not start because somebody else has the forwarded port."""
    return "host forwarding rule" in message(error)


def unreachable(uri: str, why: str) -> Unavailable:
    """Return the error for a backend that cannot be asked."""
    if is_remote(uri):
        return Unavailable(
            f"The host {urlsplit(uri).hostname} cannot be reached through libvirt",
            why=why,
            fix=f"see whether `virsh --connect {uri} list` works for the manager's user",
        )
    return Unavailable("libvirt does not answer on this host", why=why, fix=_LIBVIRTD)


def too_slow(uri: str, what: str) -> DeadlineExceeded:
    """Return the error for a call that did not end before its deadline."""
    where = f"The host {urlsplit(uri).hostname}" if is_remote(uri) else "libvirt"
    return DeadlineExceeded(
        f"{where} did not answer in time", why=f"no answer to: {what}", fix="see the log of libvirtd, and its load"
    )


def translate(error: libvirt.libvirtError, uri: str, what: str) -> DispatcherError:
    """Return the project's error for libvirt's.

    :param what: what was tried, as the object of a sentence ("starting alice's machine").
    """
    code, why = error.get_error_code(), message(error)
    low = why.lower()
    if code in {libvirt.VIR_ERR_AUTH_FAILED, libvirt.VIR_ERR_AUTH_CANCELLED}:
        return ProviderError(
            f"libvirt refused the manager while {what}",
            why=why,
            fix="let the manager's user manage machines (Debian: the group libvirt), or use qemu:///session",
        )
    if code == libvirt.VIR_ERR_NO_CONNECT or lost(error):
        return unreachable(uri, why)
    if code == libvirt.VIR_ERR_NO_DOMAIN:
        return NotFound(f"The machine does not exist any more while {what}", why=why, fix="start the agent again")
    if code in {libvirt.VIR_ERR_OPERATION_TIMEOUT, libvirt.VIR_ERR_AGENT_UNRESPONSIVE}:
        return Unavailable(f"libvirt is busy while {what}", why=why, fix="try again", retry_after=5.0)
    if code == libvirt.VIR_ERR_NO_NETWORK:
        return ProviderError(
            f"A libvirt network is missing while {what}",
            why=why,
            fix="see `virsh net-list --all`; define or start it",
        )
    if "no space left" in low or "enospc" in low:
        return ProviderError(f"The disk is full while {what}", why=why, fix="free some space on the host")
    if "tc qdisc" in low:
        return ProviderError(
            f"The host's kernel cannot limit a network's bandwidth while {what}",
            why=why,
            fix="load its modules sch_htb, sch_sfq and sch_ingress, or remove the app's network_bandwidth",
        )
    if "permission denied" in low:
        return ProviderError(
            f"QEMU may not use a file while {what}",
            why=why,
            fix="make the file readable, and its directories passable, for the machine's host user",
        )
    if code == libvirt.VIR_ERR_OPERATION_INVALID:
        return Conflict(f"libvirt refused while {what}", why=why, fix="look at the agent's state, then try again")
    if code in {libvirt.VIR_ERR_XML_ERROR, libvirt.VIR_ERR_XML_INVALID_SCHEMA, libvirt.VIR_ERR_XML_DETAIL}:
        return ProviderError(
            f"libvirt does not accept the machine's description while {what}",
            why=why,
            fix="check `xml`, `cpu` and `machine` of the app's libvirt table",
        )
    if "cannot allocate memory" in low or "cannot set up guest memory" in low:
        return ProviderError(
            f"The host has too little memory while {what}", why=why, fix="lower the app's memory, or stop others"
        )
    return ProviderError(f"libvirt failed while {what}", why=why, fix="see the log of libvirtd and of the machine")
