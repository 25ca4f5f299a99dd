"""What `doctor` looks at on the machine: programs, kernel, backends.  Reads the machine; changes nothing."""

from __future__ import annotations

import fcntl
import importlib.util
import os
import resource
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from dispatcher.plugin.model import Finding, Level

MIN_PYTHON = (3, 10)
RELEASED = 1_764_000_000  # Unix time before this release: a clock that says less is wrong
WANTED_FILES = 4096
#: Where the provider `subprocess` looks, whatever PATH says: never in a user's own directories.
_SEARCH = "/usr/local/bin:/usr/bin:/bin:/usr/local/sbin:/usr/sbin:/sbin"
_KVM = Path("/dev/kvm")
_KVM_CREATE_VM = 0xAE01  # linux/kvm.h: the device may be there and refuse


def ok(what: str) -> Finding:
    """Return good news."""
    return Finding(level=Level.OK, what=what)


def info(what: str, fix: str = "") -> Finding:
    """Return what is worth knowing."""
    return Finding(level=Level.INFO, what=what, fix=fix)


def warning(what: str, fix: str) -> Finding:
    """Return what works worse than it could."""
    return Finding(level=Level.WARNING, what=what, fix=fix)


def error(what: str, fix: str) -> Finding:
    """Return what does not work."""
    return Finding(level=Level.ERROR, what=what, fix=fix)


def python() -> Iterator[Finding]:
    """Check the interpreter."""
    version = ".".join(map(str, sys.version_info[:3]))
    if sys.version_info < MIN_PYTHON:
        yield error(f"Python {version} is too old", "use Python 3.10 or later")
    else:
        yield ok(f"Python {version}")


def clock() -> Iterator[Finding]:
    """Check that the wall clock can be right: certificates and sessions depend on it."""
    if time.time() < RELEASED:
        yield error(f"the clock says {time.strftime('%Y-%m-%d')}, which is past", "set the clock (timedatectl)")
    else:
        yield ok(f"the clock says {time.strftime('%Y-%m-%d %H:%M %Z')}")


def open_files() -> Iterator[Finding]:
    """Check the limit of open files: each connection is two."""
    hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    if hard != resource.RLIM_INFINITY and hard < WANTED_FILES:
        yield warning(
            f"at most {hard} open files",
            f"raise it to {WANTED_FILES} or more (LimitNOFILE= of the unit, or limits.conf)",
        )
    else:
        shown = "any number of" if hard == resource.RLIM_INFINITY else str(hard)
        yield ok(f"up to {shown} open files")


def bubblewrap() -> Iterator[Finding]:
    """Check the sandbox of the subprocess provider by running it."""
    program = shutil.which("bwrap", path=_SEARCH)
    if program is None:
        yield warning(
            "bubblewrap is not installed: subprocess agents see this machine's files and processes",
            "apt-get install bubblewrap",
        )
        return
    command = [program, "--ro-bind", "/", "/", "--unshare-pid", "--unshare-ipc", "--unshare-uts", "--dev", "/dev"]
    done = _run([*command, "/bin/sh", "-c", ":"])  # by its path: PATH may lead nowhere
    if done == "":
        yield ok("bubblewrap works")
    else:
        yield error(f"bubblewrap is installed and does not work here: {done}", _userns_fix())


def user_namespaces() -> Iterator[Finding]:
    """Check whether unprivileged user namespaces are allowed; an ordinary user's sandbox needs them."""
    closed = _userns_fix()
    if not closed:
        yield ok("unprivileged user namespaces are allowed")
    elif os.geteuid() == 0:
        yield info(
            "unprivileged user namespaces are restricted; the manager runs as root and does not need them", closed
        )
    else:
        yield warning("unprivileged user namespaces are restricted: no sandbox for an ordinary user", closed)


def _userns_fix() -> str:
    """Return the setting that would allow unprivileged user namespaces, "" when they are allowed."""
    wanted: dict[str, Callable[[int], bool]] = {
        "user/max_user_namespaces": lambda value: value > 0,
        "kernel/unprivileged_userns_clone": lambda value: value == 1,
        "kernel/apparmor_restrict_unprivileged_userns": lambda value: value == 0,
    }
    for name, good in wanted.items():
        try:
            value = int(Path("/proc/sys", name).read_text(encoding="ascii"))
        except (OSError, ValueError):
            continue
        if not good(value):
            return f"sysctl {name.replace('/', '.')} is {value}"
    return ""


def private_network() -> Iterator[Finding]:
    """Check the helpers that give agents a network of their own."""
    found = [name for name in ("pasta", "slirp4netns") if shutil.which(name, path=_SEARCH)]
    if found:
        yield ok(f'network = "private" works for subprocess agents ({", ".join(found)})')
    else:
        yield info(
            'network = "private" does not work for subprocess agents: neither pasta nor slirp4netns is there',
            "apt-get install passt",
        )


def cgroups(top: Path = Path("/sys/fs/cgroup")) -> Iterator[Finding]:
    """Check where limits on memory and CPU can be had: version 2, or a controller of version 1 beside it.

    :param top: where control groups are mounted.
    """
    wanted = {"memory", "cpu", "pids"}
    legacy = {name for name in wanted if (top / name / "cgroup.procs").exists()}
    if legacy == wanted:
        yield ok("cgroup v1 with memory, cpu and pids")
        return
    for root in (top, top / "unified"):
        try:
            found = set((root / "cgroup.controllers").read_text(encoding="ascii").split())
        except OSError:
            continue
        lacking = sorted(wanted - found - legacy)
        if lacking:
            yield info(
                f"cgroup v2 at {root} has no controller {', '.join(lacking)}: subprocess agents get rlimits",
                "boot with systemd.unified_cgroup_hierarchy=1",
            )
        else:
            yield ok("cgroup v2 with memory, cpu and pids")
        return
    yield info(
        "no cgroup v2: subprocess agents get rlimits, and are found by their namespaces", "mount -t cgroup2"
    )


def docker(*, wanted: bool) -> Iterator[Finding]:
    """Check the engine; loudly only where the configuration uses it."""
    say = error if wanted else info
    if importlib.util.find_spec("docker") is None:
        yield say("the Docker client library is not installed", _extra("docker"))
    host = os.environ.get("DOCKER_HOST", "unix:///var/run/docker.sock")
    if not host.startswith("unix://"):
        yield info(f"Docker is reached at {host}", "dispatcher providers check docker")
        return
    answer = _ask_unix(host.removeprefix("unix://"), b"GET /_ping HTTP/1.0\r\nHost: docker\r\n\r\n")
    if b" 200 " in answer[:32]:
        yield ok("the Docker engine answers")
    else:
        yield say(f"no Docker engine answers at {host}", "apt-get install docker.io, and start dockerd")


def libvirt(*, wanted: bool) -> Iterator[Finding]:
    """Check libvirt and QEMU; loudly only where the configuration uses it."""
    say = error if wanted else info
    if importlib.util.find_spec("libvirt") is None:
        yield say("libvirt's Python module is not installed", _extra("libvirt"))
    if shutil.which("qemu-system-x86_64") is None and shutil.which("qemu-system-aarch64") is None:
        yield say("QEMU is not installed", "apt-get install qemu-system-x86 qemu-utils")
    if any(_connects(path) for path in ("/run/libvirt/libvirt-sock", "/run/libvirt/virtqemud-sock")):
        yield ok("libvirtd answers")
    else:
        yield say("no libvirtd answers", "apt-get install libvirt-daemon-system, and start libvirtd")
    yield from kvm()


def _extra(name: str) -> str:
    """Return the command that installs an extra where this program is: another `pip` would do so elsewhere."""
    return f"{sys.executable} -m pip install 'agent-dispatcher[{name}]'"


def kvm() -> Iterator[Finding]:
    """Check hardware virtualisation."""
    if not _KVM.exists():
        yield info("no /dev/kvm: virtual machines are emulated, many times slower", "enable virtualisation")
        return
    try:
        device = os.open(_KVM, os.O_RDWR | os.O_CLOEXEC)
        try:
            os.close(fcntl.ioctl(device, _KVM_CREATE_VM, 0))
        finally:
            os.close(device)
    except OSError as problem:
        yield info(f"/dev/kvm cannot be used ({problem.strerror}): machines are emulated", "join the group kvm")
    else:
        yield ok("/dev/kvm can make machines (`dispatcher providers check libvirt` says whether they run)")


def _run(command: list[str]) -> str:
    """Return "" when a program succeeds, else its complaint in one line."""
    try:
        done = subprocess.run(command, capture_output=True, timeout=20, check=False, stdin=subprocess.DEVNULL)
    except (OSError, subprocess.TimeoutExpired) as problem:
        return str(problem)
    if done.returncode == 0:
        return ""
    return done.stderr.decode("utf-8", "replace").strip().replace("\n", " ") or f"exit code {done.returncode}"


def _ask_unix(path: str, request: bytes) -> bytes:
    try:
        with socket.socket(socket.AF_UNIX) as sock:
            sock.settimeout(5)
            sock.connect(path)
            sock.sendall(request)
            return sock.recv(4096)
    except OSError:
        return b""


def _connects(path: str) -> bool:
    try:
        with socket.socket(socket.AF_UNIX) as sock:
            sock.settimeout(5)
            sock.connect(path)
    except OSError:
        return False
    return True
