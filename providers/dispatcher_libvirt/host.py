"""Finding out, once and cheaply, what a libvirtd and its host can do.  Touches libvirt and a few files."""

from __future__ import annotations

import functools
import os
import subprocess
import sys
from pathlib import Path

import libvirt

from dispatcher.plugin import Deadline, ProviderError
from dispatcher_libvirt import errors_map, kvm, sandbox
from dispatcher_libvirt.connection import Backend
from dispatcher_libvirt.options import Options
from dispatcher_libvirt.plan import Host

_LIBRARY = "/var/lib/libvirt/qemu"
_OLDEST = 7_000_000  # libvirt 7.0
_BOUNDED_CACHE = 8_000_000  # from libvirt 8.0 on an emulator's cache of translated code has a size
_TOOLS = ("bwrap", "mke2fs", "e2fsck", "resize2fs", "debugfs", "qemu-img", "prlimit", "setpriv")


def examine(backend: Backend, options: Options, *, privileged: bool, deadline: Deadline) -> Host:
    """Return what the backend can do.

    :raises Unavailable: it does not answer; :raises ProviderError: it cannot be used, with what to do.
    """

    def ask(connection: libvirt.virConnect) -> tuple[int, str]:
        # Not getCapabilities: it looks at every emulator of the host again, which may take seconds.
        return connection.getLibVersion(), connection.getInfo()[0]

    version, arch = backend.call(ask, what="asking libvirt what it can do", deadline=deadline)
    if version < _OLDEST:
        raise ProviderError(
            f"libvirt {version // 1_000_000}.{version // 1000 % 1000} is too old", fix="use libvirt 7.0 or later"
        )
    for name in _TOOLS:
        sandbox.tool(name)
    local = not errors_map.is_remote(backend.uri)
    kind, why_no_kvm = _accelerator(options, backend, arch, deadline, local=local)
    if kind == "qemu" and not _offers(backend, arch, "qemu", deadline):
        raise ProviderError(f"libvirt has no QEMU for {arch}", fix="install qemu-system on its host")
    system = backend.uri.split("?", 1)[0].endswith("/system")
    qemu = _qemu_user() if system and local else None
    own, why_not = _own_users(options, qemu, kind, privileged=privileged)
    return Host(
        kind=kind,
        arch=arch,
        qemu=qemu,
        own_users=own,
        why_not=why_not,
        cpu_limits=system and (not local or cpu_controller()),
        vsock=local and os.path.exists("/dev/vhost-vsock"),
        why_no_kvm=why_no_kvm,
        bounded_cache=kind == "qemu" and version >= _BOUNDED_CACHE,
    )


def _offers(backend: Backend, arch: str, kind: str, deadline: Deadline) -> bool:
    """Whether libvirt makes machines of a kind."""

    def ask(connection: libvirt.virConnect) -> bool:
        try:
            connection.getDomainCapabilities(None, arch, None, kind)
        except libvirt.libvirtError as error:
            if errors_map.lost(error):
                raise
            return False
        return True

    return backend.call(ask, what="asking libvirt for QEMU", deadline=deadline)


def _accelerator(
    options: Options, backend: Backend, arch: str, deadline: Deadline, *, local: bool
) -> tuple[str, str]:
    if options.accelerator == "emulation":
        return "qemu", "providers.libvirt.accelerator says so"
    why = _kvm_fault() if local else ""
    if not why and not _offers(backend, arch, "kvm", deadline):
        why = "libvirt does not offer it"
    if why and options.accelerator == "kvm":
        raise ProviderError(
            "KVM does not work on this host",
            why=why,
            fix='enable virtualisation (nested, on a virtual host), or set accelerator = "auto"',
        )
    return ("qemu", why) if why else ("kvm", "")


def _kvm_fault() -> str:
    """Return why KVM cannot run a machine here, "" when it can."""
    try:
        os.close(os.open("/dev/kvm", os.O_RDWR | os.O_CLOEXEC))
    except OSError as error:
        # Without the right to look, libvirt's word counts: its QEMU may be let in where this user is not.
        return "" if isinstance(error, PermissionError) else f"/dev/kvm: {error.strerror}"
    return _tried_kvm()


@functools.cache
def _tried_kvm() -> str:
    """Return why a machine that was made with KVM did not run; tried once."""
    try:
        done = subprocess.run(
            [sys.executable, "-I", "-S", kvm.__file__],
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            check=False,
            timeout=kvm.SECONDS,
        )
    except subprocess.TimeoutExpired:
        return "/dev/kvm makes machines that stand still"
    return (done.stdout.strip() or done.stderr.strip()[-200:] or "it failed") if done.returncode else ""


def _qemu_user() -> tuple[int, int] | None:
    """Return the user and group as whom libvirt runs QEMU: its directory, through which QEMU passes, is theirs."""
    try:
        found = os.stat(_LIBRARY)
    except OSError:
        return None
    passable = found.st_mode & 0o011
    return (found.st_uid, found.st_gid) if found.st_uid != 0 and passable else None


def _own_users(options: Options, qemu: tuple[int, int] | None, kind: str, *, privileged: bool) -> tuple[bool, str]:
    """Return whether machines can run as their agents' own users, and why not."""
    why = ""
    if options.own_users == "never":
        why = "providers.libvirt.own_users says so"
    elif not privileged:
        why = "the manager is not root"
    elif qemu is None:
        why = f"libvirt runs for one user only, or {_LIBRARY} is closed to QEMU's group"
    elif kind == "kvm" and not _kvm_open_to(qemu[1]):
        why = "only some groups may use /dev/kvm, and libvirt gives a machine of another user just one"
    if why and options.own_users == "always":
        raise ProviderError(
            "Machines cannot run as their agents' own users",
            why=why,
            fix='make /dev/kvm open to all (mode 0666, as udev does by default), or set own_users = "auto"',
        )
    return not why, why


def _kvm_open_to(gid: int) -> bool:
    try:
        found = os.stat("/dev/kvm")
    except OSError:
        return False
    return found.st_mode & 0o006 == 0o006 or (found.st_gid == gid and found.st_mode & 0o060 == 0o060)


def cpu_controller() -> bool:
    """Whether a CPU control group exists on this host."""
    unified = Path("/sys/fs/cgroup/cgroup.controllers")
    if unified.exists():
        return "cpu" in unified.read_text(encoding="ascii").split()
    return any(
        " - cgroup " in line and "cpu" in line.rsplit(" ", 1)[-1].split(",")
        for line in Path("/proc/self/mountinfo").read_text(encoding="utf-8", errors="replace").splitlines()
    )
