"""What this host offers for isolation: bubblewrap (tried once), control groups, private networks."""

from __future__ import annotations

import errno
import os
import re
from dataclasses import dataclass, field, replace
from pathlib import Path

from dispatcher.plugin import (
    Deadline,
    DeadlineExceeded,
    DispatcherError,
    ProviderError,
    Unavailable,
    find_program,
    nft_fault,
    run_command,
)
from dispatcher_subprocess import new_connections
from dispatcher_subprocess.options import Options
from dispatcher_subprocess.processes import procfs
from dispatcher_subprocess.processes.cgroups import Cgroups, discover

_PROBE = ["--unshare-pid", "--unshare-ipc", "--unshare-uts", "--unshare-net", "--ro-bind", "/", "/"]
_PROBE += ["--proc", "/proc", "--dev", "/dev", "--remount-ro", "/"]
_PROBE += ["--perms", "1777", "--tmpfs", "/dev/shm"]  # noqa: S108
_TRIAL = 20.0  # seconds for the first sandbox
#: Option of pasta, from October 2024 on: connect to the loopback interface inside, as earlier versions do.
LOOPBACK = "--host-lo-to-ns-lo"
_TUN = "/dev/net/tun"
#: Of a host that is short of something at the moment, which any user may have brought about.
_SHORTAGES = (errno.EAGAIN, errno.ENOMEM, errno.EMFILE, errno.ENFILE)
_KILLED = re.compile(r"ended with (-\d+|137)$")  # for lack of memory, say
_APPARMOR = "kernel/apparmor_restrict_unprivileged_userns"
#: Settings below /proc/sys with which an ordinary user may not make user namespaces.
_FORBIDDING = {"user/max_user_namespaces": "0", "kernel/unprivileged_userns_clone": "0", _APPARMOR: "1"}


@dataclass(frozen=True, slots=True, kw_only=True)
class Host:
    """The programs and control groups found.

    :ivar bwrap: path of bubblewrap, "" if it is not used; :ivar reason, fix: why not, and what to do.
    :ivar untried: bubblewrap is there, but could not be tried: it is unknown whether it works.
    :ivar sizes: bubblewrap limits the size of temporary files (0.7 or later).
    :ivar setpriv: path or ""; root needs it; :ivar pasta, slirp: paths of the programs for private networks.
    :ivar pasta_loopback: pasta connects to the loopback interface inside only when it is told to.
    :ivar tracks_connections: the kernel has a table of the host's connections, for its firewall.
    :ivar unbounded: why the rate of an agent's new connections is not bounded, and the fix; None if it is.
    """

    privileged: bool
    bwrap: str = ""
    reason: str = ""
    fix: str = ""
    untried: bool = False
    sizes: bool = True
    setpriv: str = ""
    pasta: str = ""
    slirp: str = ""
    pasta_loopback: bool = False
    tracks_connections: bool = False
    unbounded: tuple[str, str] | None = None
    cgroups: Cgroups = field(default_factory=Cgroups)

    @property
    def sandboxed(self) -> bool:
        """Whether agents get a sandbox."""
        return bool(self.bwrap)

    @property
    def own_uid(self) -> bool:
        """Whether each agent gets a host user id of its own."""
        return self.privileged and bool(self.setpriv)

    def limits(self, what: str) -> bool:
        """Whether memory, cpu or pids is limited for an agent as a whole."""
        return self.cgroups.limits(what) or (what == "pids" and self.own_uid)

    @property
    def private_fault(self) -> tuple[str, str] | None:
        """Why private networks do not work, and the fix; None if they work."""
        if not self.sandboxed:
            return self.reason, self.fix
        if not (self.pasta or self.slirp):
            return "neither pasta nor slirp4netns is installed", "install passt"
        if not (find_program("ip") and find_program("nsenter")):
            return "ip or nsenter is not installed", "install iproute2 and util-linux"
        if not os.path.exists(_TUN):
            return f"there is no {_TUN}", "load the kernel's module tun (in a container: --device /dev/net/tun)"
        if not os.access(_TUN, os.R_OK | os.W_OK):
            return f"this user may not open {_TUN}", f"give it the mode 0666: chmod 0666 {_TUN}"
        return None


def examine(options: Options, installation: str, deadline: Deadline) -> Host:
    """Examine the host."""
    bwrap, reason, fix, untried = "", "", "", False
    if options.bubblewrap == "never":
        reason, fix = 'providers.subprocess.bubblewrap is "never"', "remove providers.subprocess.bubblewrap"
    elif not (bwrap := find_program("bwrap")):
        reason, fix = "bubblewrap is not installed", "install bubblewrap"
    else:
        reason, untried = _fault(bwrap, deadline)
        fix = "try again when the host is less busy" if untried else namespaces_fix() if reason else ""
    cgroups = Cgroups()
    if options.cgroups == "auto":
        cgroups = discover(f"dispatcher-{installation}", procfs.read("/proc/self/cgroup").decode())
    pasta = find_program("pasta") if options.private_network != "slirp4netns" else ""
    found = Host(
        privileged=os.geteuid() == 0,
        bwrap="" if reason else bwrap,
        reason=reason,
        fix=fix,
        untried=untried,
        sizes=not bwrap or _knows([bwrap, "--size", "4096"], deadline),
        setpriv=find_program("setpriv"),
        pasta=pasta,
        slirp=find_program("slirp4netns") if options.private_network != "pasta" else "",
        pasta_loopback=bool(pasta) and _knows([pasta, LOOPBACK], deadline),
        tracks_connections=os.path.exists("/proc/sys/net/netfilter/nf_conntrack_max"),
        cgroups=cgroups,
    )
    return found if found.private_fault else replace(found, unbounded=nft_fault(new_connections.RULES, deadline))


def verify(host: Host, options: Options) -> None:
    """Check that the host has what the options and the privileges require.

    A shortage must not open the host's files to agents: with "auto", too, none starts while bubblewrap is untried.

    :raises Unavailable, ProviderError: it has not.
    """
    if host.untried:
        raise Unavailable("bubblewrap could not be tried", why=host.reason, fix=host.fix)
    if options.bubblewrap == "always" and not host.bwrap:
        raise Unavailable(
            'bubblewrap cannot be used, and providers.subprocess.bubblewrap is "always"',
            why=host.reason,
            fix=f'{host.fix}, or set bubblewrap = "auto"',
        )
    if host.privileged and not host.setpriv:
        raise ProviderError(
            "Agents cannot get a user of their own",
            why="setpriv is not installed",
            fix="install util-linux",
        )


def _fault(bwrap: str, deadline: Deadline) -> tuple[str, bool]:
    """Return why bubblewrap does not work here, "" if it works; and whether that may be a shortage only."""
    command = [bwrap, *_PROBE, "/bin/sh", "-c", ":"]
    try:
        run_command(command, "Cannot run bubblewrap", environment={}, deadline=deadline.bounded(_TRIAL))
    except DeadlineExceeded as error:
        return error.why, True
    except DispatcherError as error:
        short = any(os.strerror(number) in error.why for number in _SHORTAGES) or _KILLED.search(error.why)
        return error.why, bool(short)
    return "", False


def _knows(command: list[str], deadline: Deadline) -> bool:
    """Whether a program knows its options; the help that pasta writes to a pipe is cut."""
    try:
        run_command([*command, "--version"], f"Cannot run {command[0]}", environment={}, deadline=deadline)
    except DispatcherError:
        return False
    return True


def namespaces_fix(settings: Path = Path("/proc/sys")) -> str:
    """Return how to let bubblewrap make namespaces."""
    if os.geteuid() != 0:
        for name, value in _FORBIDDING.items():
            if procfs.read(f"{settings}/{name}").decode().strip() == value:
                how = f"change the setting {name.replace('/', '.')}, which is {value} (sysctl)"
                if name == _APPARMOR:
                    how = "allow it by a profile of AppArmor for bwrap that has the rule `userns,`"
                return f"{how}, or run the manager as root"
    return "allow bubblewrap to make namespaces"
