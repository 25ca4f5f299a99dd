"""Capabilities of a libvirt daemon and its host: accelerator, users, CPU limits, vsock."""

from __future__ import annotations

import functools
import os
import signal
import subprocess
from dataclasses import dataclass
from pathlib import Path

import libvirt

from dispatcher.plugin import Deadline, ProviderError
from dispatcher_libvirt import errors
from dispatcher_libvirt.connection import Backend
from dispatcher_libvirt.disks import sandbox
from dispatcher_libvirt.disks.images import Reader
from dispatcher_libvirt.options import Options
from dispatcher_libvirt.xml_input import parse_xml

_QEMU_DIRECTORY = "/var/lib/libvirt/qemu"
_OLDEST = 7_000_000  # libvirt 7.0
_TB_CACHE_SINCE = 8_000_000  # libvirt 8.0 sets the size of an emulator's translation cache
_TOOLS = ("bwrap", "mke2fs", "e2fsck", "resize2fs", "debugfs", "qemu-img", "prlimit", "setpriv")

#: A guest of firmware alone: it finds nothing to boot, resets, and QEMU exits.
_TEST_GUEST = ["-accel", "kvm", "-m", "32M", "-nodefaults", "-display", "none"]
_TEST_GUEST += ["-no-reboot", "-boot", "reboot-timeout=1"]
_TEST_CPU = 1  # seconds of processor time; KVM needs a tenth of that
_TEST_SECONDS = 10.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Host:
    """Capabilities of the backend.

    :ivar kind: domain type, ``kvm`` or ``qemu``; :ivar qemu: user and group that libvirt runs QEMU as.
    :ivar own_users: each machine's QEMU runs as its agent's own user; :ivar why_not: the reason where it does not.
    :ivar cpu_limits: there is a CPU control group; :ivar vsock: the host has vhost-vsock.
    :ivar bounded_cache: machines are emulated, and the memory for translated code can be limited.
    """

    kind: str
    arch: str
    qemu: tuple[int, int] | None
    own_users: bool
    why_not: str
    cpu_limits: bool
    vsock: bool
    why_no_kvm: str = ""
    bounded_cache: bool = False

    def reader(self, uid: int = -1) -> Reader | None:
        """Return the user that a machine's QEMU reads images as; None where libvirt makes them readable.

        :param uid: of the agent; by default a user that owns no image.
        """
        return Reader(uid, self.qemu[1]) if self.own_users and self.qemu else None


def examine(backend: Backend, options: Options, *, privileged: bool, deadline: Deadline) -> Host:
    """Return the capabilities of the backend.

    :raises Unavailable: it does not answer; :raises ProviderError: it is not usable, with the remedy.
    """

    def query(connection: libvirt.virConnect) -> tuple[int, str]:
        # Not getCapabilities: that examines every emulator of the host, which may take seconds.
        return connection.getLibVersion(), connection.getInfo()[0]

    version, arch = backend.call(query, what="querying libvirt's capabilities", deadline=deadline)
    if version < _OLDEST:
        raise ProviderError(
            f"libvirt {version // 1_000_000}.{version // 1000 % 1000} is too old", fix="use libvirt 7.0 or later"
        )
    for name in _TOOLS:
        sandbox.tool(name)
    local = not errors.is_remote(backend.uri)
    why_no_kvm = _kvm_problem(options, backend, arch, deadline, local=local)
    kind = "qemu" if why_no_kvm else "kvm"
    if kind == "qemu" and not _emulator(backend, arch, "qemu", deadline):
        raise ProviderError(f"libvirt has no QEMU for {arch}", fix="install qemu-system on its host")
    system = backend.uri.split("?", 1)[0].endswith("/system")
    qemu = _qemu_user() if system and local else None
    why_not = _shared_user_reason(options, qemu, kind, privileged=privileged)
    return Host(
        kind=kind,
        arch=arch,
        qemu=qemu,
        own_users=not why_not,
        why_not=why_not,
        cpu_limits=system and (not local or cpu_controller()),
        vsock=local and os.path.exists("/dev/vhost-vsock"),
        why_no_kvm=why_no_kvm,
        bounded_cache=kind == "qemu" and version >= _TB_CACHE_SINCE,
    )


def _emulator(backend: Backend, arch: str, kind: str, deadline: Deadline) -> str:
    """Return the path of the emulator for domains of a type, "" where libvirt offers none."""

    def query(connection: libvirt.virConnect) -> str:
        try:
            text = connection.getDomainCapabilities(None, arch, None, kind)
        except libvirt.libvirtError as error:
            if errors.connection_lost(error):
                raise
            return ""
        return parse_xml(text).findtext("path") or ""

    return backend.call(query, what="querying libvirt's emulators", deadline=deadline)


def _kvm_problem(options: Options, backend: Backend, arch: str, deadline: Deadline, *, local: bool) -> str:
    """Return why machines cannot use KVM, "" when they can.

    :raises ProviderError: they cannot, and the configuration demands it.
    """
    if options.accelerator == "emulation":
        return 'accelerator = "emulation" in providers.libvirt'
    why, testable = "", local and arch == "x86_64"
    if local:
        try:
            os.close(os.open("/dev/kvm", os.O_RDWR | os.O_CLOEXEC))
        except PermissionError:  # libvirt's QEMU may have the access that this user lacks
            testable = False
        except OSError as error:
            why = f"/dev/kvm: {error.strerror}"
    if not why:
        emulator = _emulator(backend, arch, "kvm", deadline)
        if not emulator:
            why = "libvirt does not offer it"
        elif testable:
            why = kvm_test(emulator)
    if why and options.accelerator == "kvm":
        raise ProviderError(
            "KVM does not work on this host",
            why=why,
            fix='enable virtualisation (nested, on a virtual host), or set accelerator = "auto"',
        )
    return why


@functools.cache
def kvm_test(emulator: str, seconds: float = _TEST_SECONDS) -> str:
    """Return why a small guest does not run with KVM, "" when it does; tried once.

    On some virtual hosts /dev/kvm exists, and its guests hang or run slower than emulated ones.
    """
    command = [sandbox.tool("prlimit"), f"--cpu={_TEST_CPU}", "--core=0", "--", emulator, *_TEST_GUEST]
    try:
        done = subprocess.run(
            command, stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False, timeout=seconds
        )
    except subprocess.TimeoutExpired:
        return f"a test guest with KVM did not end within {seconds:g} s"
    if -done.returncode in {signal.SIGXCPU, signal.SIGKILL}:
        return f"a test guest with KVM took over {_TEST_CPU} s of processor time"
    if done.returncode:
        return f"a test guest with KVM failed: {' '.join(done.stderr.split())[-200:]}"
    return ""


def _qemu_user() -> tuple[int, int] | None:
    """Return the user and group that libvirt runs QEMU as: the owner of QEMU's directory."""
    try:
        found = os.stat(_QEMU_DIRECTORY)
    except OSError:
        return None
    passable = found.st_mode & 0o011
    return (found.st_uid, found.st_gid) if found.st_uid != 0 and passable else None


def _shared_user_reason(options: Options, qemu: tuple[int, int] | None, kind: str, *, privileged: bool) -> str:
    """Return why machines cannot run as their agents' own users, "" when they can.

    :raises ProviderError: they cannot, and the configuration demands it.
    """
    why = ""
    if options.own_users == "never":
        why = 'own_users = "never" in providers.libvirt'
    elif not privileged:
        why = "the manager is not root"
    elif qemu is None:
        why = f"libvirt runs for one user only, or {_QEMU_DIRECTORY} is closed to QEMU's group"
    elif kind == "kvm" and not _kvm_open_to(qemu[1]):
        why = "only some groups may use /dev/kvm, and libvirt gives another user's machine just one group"
    if why and options.own_users == "always":
        raise ProviderError(
            "Machines cannot run as their agents' own users",
            why=why,
            fix='make /dev/kvm open to all (mode 0666, as udev does by default), or set own_users = "auto"',
        )
    return why


def _kvm_open_to(gid: int) -> bool:
    try:
        found = os.stat("/dev/kvm")
    except OSError:
        return False
    return found.st_mode & 0o006 == 0o006 or (found.st_gid == gid and found.st_mode & 0o060 == 0o060)


def cpu_controller() -> bool:
    """Whether this host has a CPU control group."""
    unified = Path("/sys/fs/cgroup/cgroup.controllers")
    if unified.exists():
        return "cpu" in unified.read_text(encoding="ascii").split()
    return any(
        " - cgroup " in line and "cpu" in line.rsplit(" ", 1)[-1].split(",")
        for line in Path("/proc/self/mountinfo").read_text(encoding="utf-8", errors="replace").splitlines()
    )
