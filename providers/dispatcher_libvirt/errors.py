"""Translation of libvirt's errors into the dispatcher's.

Three cases are distinguished: the daemon of this host is down, a remote host is unreachable, and a backend that
answers refuses the request.
"""

from __future__ import annotations

import errno
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from urllib.parse import urlsplit

import libvirt

from dispatcher.plugin import Conflict, DeadlineExceeded, DispatcherError, NotFound, ProviderError, Unavailable

#: Codes that, from the RPC layer, mean that the connection is unusable.
_CONNECTION_CODES = frozenset(
    {
        libvirt.VIR_ERR_SYSTEM_ERROR,
        libvirt.VIR_ERR_NO_CONNECT,
        libvirt.VIR_ERR_RPC,
        libvirt.VIR_ERR_INTERNAL_ERROR,
        libvirt.VIR_ERR_INVALID_CONN,
    }
)
_RPC_DOMAINS = frozenset({libvirt.VIR_FROM_RPC, libvirt.VIR_FROM_REMOTE})
_AUTH_CODES = frozenset({libvirt.VIR_ERR_AUTH_FAILED, libvirt.VIR_ERR_AUTH_CANCELLED})
_BUSY_CODES = frozenset({libvirt.VIR_ERR_OPERATION_TIMEOUT, libvirt.VIR_ERR_AGENT_UNRESPONSIVE})
_NONE: frozenset[int] = frozenset()
#: Codes, words in messages of libvirt and QEMU, the problem that either reports, and its remedy.
_CAUSES: tuple[tuple[frozenset[int], tuple[str, ...], str, str], ...] = (
    (
        frozenset({libvirt.VIR_ERR_NO_NETWORK}),
        (),
        "A libvirt network is missing",
        "check `virsh net-list --all`; define or start it",
    ),
    (_NONE, ("no space left", "enospc"), "The disk is full", "free some space on the host"),
    (
        _NONE,
        ("tc qdisc",),
        "The host's kernel cannot limit a network's bandwidth",
        "load the modules sch_htb, sch_sfq and sch_ingress, or remove the app's network_bandwidth",
    ),
    (
        _NONE,
        ("permission denied",),
        "QEMU may not use a file",
        "make the file readable and its directories passable for the machine's host user",
    ),
    (
        frozenset({libvirt.VIR_ERR_XML_ERROR, libvirt.VIR_ERR_XML_INVALID_SCHEMA, libvirt.VIR_ERR_XML_DETAIL}),
        (),
        "libvirt does not accept the machine's description",
        "check `xml`, `cpu` and `machine` of the app's libvirt table",
    ),
    (
        _NONE,
        ("cannot allocate memory", "cannot set up guest memory"),
        "The host has too little memory",
        "lower the app's memory, or stop other agents",
    ),
)


@contextmanager
def disk_errors(what: str, place: Path) -> Iterator[None]:
    """Translate an OSError into a ProviderError with a remedy; the disk is full only where the error says so."""
    try:
        yield
    except OSError as error:
        problem, fix = "The host refused", f"check {place} and its file system"
        if error.errno in {errno.ENOSPC, errno.EDQUOT}:
            problem, fix = "The disk is full", f"free some space at {place}"
        elif error.errno in {errno.EACCES, errno.EPERM, errno.EROFS}:
            fix = f"check the permissions of {place}, and that it is not read-only or immutable"
        elif error.errno == errno.EFBIG:
            fix = f"the file system at {place} takes no file of that size: choose a smaller `disk`"
        why = f"{error.strerror or error} ({error.filename or place})"
        raise ProviderError(f"{problem} while {what}", why=why, fix=fix) from error


def is_remote(uri: str) -> bool:
    """Whether a connection URI names another host."""
    return bool(urlsplit(uri).hostname)


def connection_lost(error: libvirt.libvirtError) -> bool:
    """Whether the connection failed, not the request."""
    return error.get_error_code() in _CONNECTION_CODES and error.get_error_domain() in _RPC_DOMAINS


def authentication_failed(error: libvirt.libvirtError) -> bool:
    """Whether the daemon refused the manager's user."""
    return error.get_error_code() in _AUTH_CODES


def domain_missing(error: libvirt.libvirtError) -> bool:
    """Whether the domain does not exist (any more)."""
    return bool(error.get_error_code() == libvirt.VIR_ERR_NO_DOMAIN)


def message(error: libvirt.libvirtError) -> str:
    """Return libvirt's message in one line of at most 400 characters."""
    text = " ".join(str(error.get_error_message() or error).split())
    return text if len(text) <= 400 else f"{text[:399]}…"


def port_taken(error: libvirt.libvirtError) -> bool:
    """Whether QEMU failed to start because the forwarded port is in use."""
    return "host forwarding rule" in message(error)


def unreachable(uri: str, why: str) -> Unavailable:
    """Return the error for a backend that does not answer."""
    if is_remote(uri):
        return Unavailable(
            f"The host {urlsplit(uri).hostname} cannot be reached through libvirt",
            why=why,
            fix=f"check that `virsh --connect {uri} list` works for the manager's user",
        )
    return Unavailable(
        "libvirt does not answer on this host",
        why=why,
        fix="start libvirtd: systemctl start libvirtd (or virtqemud), and check its log",
    )


def timed_out(uri: str, what: str) -> DeadlineExceeded:
    """Return the error for a call that exceeded its deadline."""
    where = f"The host {urlsplit(uri).hostname}" if is_remote(uri) else "libvirt"
    return DeadlineExceeded(
        f"{where} did not answer in time",
        why=f"no answer while {what}",
        fix="check the log and the load of libvirtd",
    )


def translate(error: libvirt.libvirtError, uri: str, what: str) -> DispatcherError:
    """Return the dispatcher's error for libvirt's.

    :param what: the attempted action, as a participle ("starting alice's machine").
    """
    code, why = error.get_error_code(), message(error)
    if authentication_failed(error):
        return ProviderError(
            f"libvirt refused the manager while {what}",
            why=why,
            fix="allow the manager's user to manage machines (Debian: the group libvirt), or use qemu:///session",
        )
    if code == libvirt.VIR_ERR_NO_CONNECT or connection_lost(error):
        return unreachable(uri, why)
    if code == libvirt.VIR_ERR_NO_DOMAIN:
        return NotFound(f"The machine no longer exists while {what}", why=why, fix="start the agent again")
    if code in _BUSY_CODES:
        return Unavailable(f"libvirt is busy while {what}", why=why, fix="try again", retry_after=5.0)
    if code == libvirt.VIR_ERR_OPERATION_INVALID:
        return Conflict(f"libvirt refused while {what}", why=why, fix="check the agent's state, then try again")
    problem, fix = "libvirt failed", "check the logs of libvirtd and of the machine"
    for codes, words, *cause in _CAUSES:
        if code in codes or any(word in why.lower() for word in words):
            problem, fix = cause
            break
    return ProviderError(f"{problem} while {what}", why=why, fix=fix)
