"""Findings about the isolation of agents on this host, and its capabilities."""

from __future__ import annotations

import grp
import stat
from collections.abc import Iterator

from dispatcher.plugin import App, Capability, Finding, Network
from dispatcher_subprocess import sandbox, seccomp
from dispatcher_subprocess.host import Host
from dispatcher_subprocess.options import AppOptions, endpoint_kind, options_of

#: Controller -> key of the configuration, capability, and the effect of a limit that is not enforced.
_LIMITS = {
    "memory": ("memory", Capability.MEMORY_LIMIT, "each process of an agent is limited, not their sum"),
    "cpu": ("cpus", Capability.CPU_LIMIT, "an agent may use all cores"),
    "pids": ("pids", Capability.PIDS_LIMIT, "an agent may have as many processes as its user"),
}


def capabilities(host: Host) -> frozenset[Capability]:
    """Return the capabilities on this host."""
    found = {
        Capability.SUSPEND,
        Capability.LOGS,
        Capability.USAGE,
        Capability.EVENTS,
        Capability.CREDENTIALS,
        Capability.NETWORK_HOST,
    }
    if host.sandboxed:
        found.add(Capability.NETWORK_NONE)
        if host.private_fault is None:
            found.add(Capability.NETWORK_PRIVATE)
    found |= {capability for what, (_, capability, _) in _LIMITS.items() if host.limits(what)}
    return frozenset(found)


def findings(host: Host, app: App | None) -> list[Finding]:
    """Return the findings for the host, or for one app on it."""
    return list(_host(host) if app is None else _app(host, app))


def _host(host: Host) -> Iterator[Finding]:
    if host.sandboxed:
        yield Finding.ok(
            "Agents run in bubblewrap sandboxes: own mount, pid, ipc and uts namespaces, no new privileges"
        )
        yield Finding.ok(
            "Of the host's files an agent sees /usr, /etc and its program's own, read-only; data is writable"
        )
    elif host.untried:
        yield Finding.error(f"No agent can start: bubblewrap could not be tried: {host.reason}", host.fix)
    else:
        what = f"Agents run without a sandbox: {host.reason}. They see the host's files, processes, network"
        yield Finding.warning(what, host.fix)
    if host.sandboxed and not seccomp.program():
        yield Finding.warning(
            "No system call is refused: there is no filter for this processor. AF_VSOCK is open to all agents",
            f"use a processor among {', '.join(seccomp.MACHINES)}",
        )
    if host.own_uid:
        yield Finding.ok("Each agent has a host user id of its own")
    else:
        rest = "; only the sandbox separates them" if host.sandboxed else ", and can read each other's data"
        yield Finding.warning(
            f"All agents run as the user that runs the manager{rest}",
            "run the manager as root for a user id per agent",
        )
    if host.sandboxed and not host.sizes:
        yield Finding.warning(
            "bubblewrap is older than 0.7: temporary files are limited by the agent's memory, not by tmp_size",
            "install bubblewrap 0.7 or later",
        )
    for what, (key, _, instead) in _LIMITS.items():
        if host.cgroups.limits(what):
            yield Finding.ok(f"The limit {key} is enforced by the kernel's {what} controller")
        elif host.limits(what):
            yield Finding.ok(f"The limit {key} is enforced by counting the processes of each agent's own user id")
        else:
            yield _unlimited(key, instead)
    if host.cgroups.directory is None:
        yield Finding.info("Agents are suspended by SIGSTOP, as there are no control groups")
    if host.sandboxed and host.private_fault:
        why, fix = host.private_fault
        yield Finding.info(
            f'network = "private" does not work: {why}',
            f'{fix}; apps can have network = "none" or "host", or provider = "docker"',
        )
    elif host.pasta:
        yield Finding.ok('network = "private" carries TCP and DNS, for each agent a bounded number of connections')
    elif host.sandboxed:
        what = 'network = "private" carries UDP: its ports are open to the outside, and thirty agents can take all'
        yield Finding.warning(what, "install passt, unless apps need UDP")
    if host.unbounded and host.tracks_connections and host.sandboxed and not host.private_fault:
        why, fix = host.unbounded
        yield Finding.warning(
            'An agent with network "private" can fill the table of tracked connections (nf_conntrack_max) by '
            f"connections that it opens and closes: {why}",
            fix,
        )


def _unlimited(key: str, instead: str) -> Finding:
    return Finding.warning(
        f"The limit {key} is not enforced, as there is no control group for it: {instead}",
        "run as root, or delegate control groups to the manager",
    )


def _opened(options: AppOptions) -> Iterator[tuple[str, str]]:
    """Yield what an app sees of the host by its options, and the option's name."""
    for key, verb in (("read_only", "reads"), ("writable", "changes"), ("devices", "uses")):
        for path in getattr(options, key):
            what = f"It {verb} {path} of the host, as far as the modes there allow"
            try:
                mode = path.stat().st_mode
            except OSError:
                mode = 0
            if stat.S_ISSOCK(mode):
                what = (
                    f"It sends commands to the host's service at {path}: an engine's socket gives the whole host"
                )
            elif stat.S_ISBLK(mode):
                what = f"It uses the host's disk {path}: every file on it, whatever its mode"
            yield what, key


def _app(host: Host, app: App) -> Iterator[Finding]:
    if endpoint_kind(app) == "tcp":
        yield Finding.warning(
            "A TCP port on the loopback interface is open to every local user of this host",
            "use {socket} in the command, which only the proxy can reach",
        )
    else:
        yield Finding.ok("It listens on a Unix socket that only the proxy and the agent itself can reach")
    wanted = {"memory": app.limits.memory, "cpu": app.limits.cpus, "pids": app.limits.pids}
    for what, (key, _, instead) in _LIMITS.items():
        if wanted[what] is not None and not host.limits(what):
            yield _unlimited(key, instead)
    if host.sandboxed and not options_of(app).seccomp:
        yield Finding.warning(
            "Its system calls are not filtered: it may use AF_VSOCK, one space for all agents, keys and io_uring",
            "set seccomp = true",
        )
    for what, key in _opened(options_of(app)):
        yield Finding.warning(what, f"remove it from {key} if it is not needed")
    for gid in sandbox.groups(options_of(app)) if host.own_uid else ():
        try:
            group = grp.getgrgid(gid).gr_name
        except KeyError:
            group = str(gid)
        yield Finding.warning(
            f"Its agents are in the group {group}: they may do what the modes of files allow that group",
            "give the devices and the setgid directories that it names a group of their own",
        )
    if app.limits.disk is not None and not (host.sandboxed and options_of(app).seccomp and seccomp.program()):
        yield Finding.warning("It can leave its quota: its system calls are not filtered", "set seccomp = true")
    if app.network is Network.HOST:
        yield Finding.warning(
            "It shares the host's network: services on the loopback interface and abstract sockets too",
            'use network = "none" or "private"',
        )
    elif not host.sandboxed:
        what = f'network = "{app.network.value}" is not enforced without a sandbox: it has the host\'s network'
        yield Finding.warning(what, host.fix)
    elif app.network is Network.NONE or host.private_fault is None:  # else it cannot start, see `faults`
        what = "no network" if app.network is Network.NONE else "the outside, but nothing of this host"
        yield Finding.ok(f"It reaches {what}")
