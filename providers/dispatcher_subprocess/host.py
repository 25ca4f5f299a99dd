"""What this host offers for isolation: bubblewrap (tried once), control groups, private networks."""

from __future__ import annotations

import os
import subprocess
from dataclasses import dataclass, field, replace

from dispatcher.plugin import Deadline, ProviderError, Unavailable, nft_fault
from dispatcher_subprocess import new_connections
from dispatcher_subprocess.errors import last_line
from dispatcher_subprocess.options import Options
from dispatcher_subprocess.processes import procfs
from dispatcher_subprocess.processes.cgroups import Cgroups, discover
from dispatcher_subprocess.processes.procfs import which

_PROBE = ["--unshare-pid", "--unshare-ipc", "--unshare-uts", "--unshare-net", "--ro-bind", "/", "/"]
_PROBE += ["--proc", "/proc", "--dev", "/dev", "--remount-ro", "/"]
_PROBE += ["--size", "4096", "--perms", "1777", "--tmpfs", "/dev/shm"]  # noqa: S108
_TUN = "/dev/net/tun"


@dataclass(frozen=True, slots=True, kw_only=True)
class Host:
    """The programs and control groups found.

    :ivar bwrap: path of bubblewrap, "" if it is not used; :ivar reason: why not.
    :ivar setpriv: path or ""; root needs it; :ivar pasta, slirp: paths of the programs for private networks.
    :ivar tracks_connections: the kernel has a table of the host's connections, for its firewall.
    :ivar unbounded: why the rate of an agent's new connections is not bounded, and the fix; None if it is.
    """

    privileged: bool
    bwrap: str = ""
    reason: str = ""
    setpriv: str = ""
    pasta: str = ""
    slirp: str = ""
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
            return self.reason, "install bubblewrap, or allow it to make namespaces"
        if not (self.pasta or self.slirp):
            return "neither pasta nor slirp4netns is installed", "install passt"
        if not (which("ip") and which("nsenter")):
            return "ip or nsenter is not installed", "install iproute2 and util-linux"
        if not os.path.exists(_TUN):
            return f"there is no {_TUN}", "load the kernel's module tun (in a container: --device /dev/net/tun)"
        if not os.access(_TUN, os.R_OK | os.W_OK):
            return f"this user may not open {_TUN}", f"give it the mode 0666: chmod 0666 {_TUN}"
        return None


def examine(options: Options, installation: str, deadline: Deadline) -> Host:
    """Examine the host."""
    bwrap, reason = "", ""
    if options.bubblewrap == "never":
        reason = 'providers.subprocess.bubblewrap is "never"'
    else:
        bwrap = which("bwrap")
        reason = _fault(bwrap, deadline) if bwrap else "bubblewrap is not installed"
    cgroups = Cgroups()
    if options.cgroups == "auto":
        cgroups = discover(f"dispatcher-{installation}", procfs.read("/proc/self/cgroup").decode())
    found = Host(
        privileged=os.geteuid() == 0,
        bwrap="" if reason else bwrap,
        reason=reason,
        setpriv=which("setpriv"),
        pasta=which("pasta") if options.private_network != "slirp4netns" else "",
        slirp=which("slirp4netns") if options.private_network != "pasta" else "",
        tracks_connections=os.path.exists("/proc/sys/net/netfilter/nf_conntrack_max"),
        cgroups=cgroups,
    )
    return found if found.private_fault else replace(found, unbounded=nft_fault(new_connections.RULES, deadline))


def verify(host: Host, options: Options) -> None:
    """Check that the host has what the options and the privileges require.

    :raises Unavailable, ProviderError: it has not.
    """
    if options.bubblewrap == "always" and not host.bwrap:
        raise Unavailable(
            'bubblewrap cannot be used, and providers.subprocess.bubblewrap is "always"',
            why=host.reason,
            fix='install bubblewrap, allow it to make namespaces, or set bubblewrap = "auto"',
        )
    if host.privileged and not host.setpriv:
        raise ProviderError(
            "Agents cannot get a user of their own",
            why="setpriv is not installed",
            fix="install util-linux",
        )


def _fault(bwrap: str, deadline: Deadline) -> str:
    """Return why bubblewrap does not work here, "" if it works."""
    seconds = deadline.bounded(20).remaining()
    try:
        done = subprocess.run(
            [bwrap, *_PROBE, "/bin/sh", "-c", ":"],
            check=False,
            capture_output=True,
            stdin=subprocess.DEVNULL,
            timeout=max(seconds, 0.1),
            env={},
            cwd="/",
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        return f"{bwrap} does not run: {error}"
    return (last_line(done.stderr) or f"bwrap ended with {done.returncode}") if done.returncode else ""
