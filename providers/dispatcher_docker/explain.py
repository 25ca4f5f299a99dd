"""Which options of an app are refused, and findings about isolation: of the engine and of each app."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from dispatcher.plugin import (
    METADATA_NETWORKS,
    App,
    Capability,
    ConfigError,
    Finding,
    Network,
    ProviderContext,
    Unsupported,
)
from dispatcher_docker.container_config import options_of
from dispatcher_docker.engine import Engine
from dispatcher_docker.options import ROOT_CAPABILITIES, DockerAppOptions, DockerOptions

_SOCKETS = (
    "/run/docker.sock",
    "/run/containerd/containerd.sock",
    "/run/podman/podman.sock",
    "/run/crio/crio.sock",
    "/run/libvirt/libvirt-sock",
)


def refuse(app: App, engine: Engine, context: ProviderContext, capabilities: frozenset[Capability]) -> None:
    """Refuse an app that this provider cannot run.

    :raises ConfigError: a mount that reaches the engine or the manager, or conflicting options.
    :raises Unsupported: a limit or network without its capability.
    """
    problems = list(faults(app, engine, context))
    if problems:
        raise ConfigError(f"The app {app.name} cannot run in a container", why="; ".join(problems))
    enforced = app.limits.enforced(capabilities)
    for key in ("memory", "cpus", "pids", "disk"):
        if app.limits.demanded(key) is not None and getattr(enforced, key) is None:
            raise Unsupported(
                f"This Docker engine cannot limit {key}",
                why="it has no capability for that limit",
                fix=f"remove `{key}` from the app {app.name}, or use another provider for it",
            )
    if Capability(f"network-{app.network.value}") not in capabilities:
        raise Unsupported(
            f"Network {app.network.value!r} is not available here",
            why="the engine is on another host, where no Unix socket can be shared",
            fix='set network = "private" and a port',
        )


def faults(app: App, engine: Engine, context: ProviderContext) -> Iterator[str]:
    """Yield why no agent of the app could start."""
    options, path = options_of(app), f"apps.{app.name}.docker"
    for number, mount in enumerate(options.mounts):
        if reached := _reaches(mount.source, engine, context):
            yield f"{path}.mounts.{number}.source: {mount.source} reaches {reached}, which is forbidden"
    if not options.port and not engine.is_local:
        yield f"{path}.port: missing; a Unix socket cannot be shared with an engine on another host"
    if options.port and app.network is not Network.PRIVATE:
        yield (
            f'{path}.port: a port can only be published with network = "private"; '
            "let the app listen on {socket}, or set the network"
        )
    texts = [*options.command, *(options.entrypoint or ()), *app.environment.values()]
    for own, other in (("{port}", "{socket}"), ("{socket}", "{port}")):
        if any(own in text for text in texts) and bool(options.port) != (own == "{port}"):
            yield (
                f"{path}.port: {own} has no value {'with' if options.port else 'without'} a port; "
                f"{'remove' if options.port else 'set'} port, or write {other}"
            )
    if options.changes_size is not None and options.read_only:
        yield f"{path}.changes_size: the image's files cannot change; remove it, or set read_only = false"
    if options.network and app.network is not Network.PRIVATE:
        yield f'{path}.network: a named network requires network = "private"'
    if options.seccomp not in {"default", "engine", "unconfined"} and not Path(options.seccomp).is_file():
        yield f"{path}.seccomp: found {options.seccomp!r}, expected default, engine, unconfined or a path"


def _reaches(source: str, engine: Engine, context: ProviderContext) -> str:
    real = os.path.realpath(source)
    sockets = {os.path.realpath(one) for one in (*_SOCKETS, engine.socket_path or _SOCKETS[0])}
    for one in sockets:
        if _inside(one, real):
            return f"the socket {one}"
    for own in (context.run_dir, context.state_dir):
        directory = os.path.realpath(own)
        if _inside(directory, real) or _inside(real, directory):
            return f"the manager's own {directory}"
    return ""


def _inside(path: str, directory: str) -> bool:
    return path == directory or path.startswith(directory.rstrip("/") + "/")


def explain_backend(
    engine: Engine,
    options: DockerOptions,
    info: dict[str, Any] | None,
    *,
    own_volume: bool,
    protects_host: bool,
    bounds_connections: bool,
) -> Iterator[Finding]:
    """Return findings for all agents of this engine."""
    where = "this host" if engine.is_local else "another host"
    version = f" {info['ServerVersion']}" if info else ""
    yield Finding.info(f"Agents are containers of the {engine.name} engine{version} at {engine.url}, on {where}")
    yield Finding.info("They share the host's kernel: an exploit of the kernel escapes; use a VM for hostile code")
    yield Finding.info(
        "Each has its own user id, no capabilities, no new privileges, a seccomp profile, a read-only "
        "image and its own pid, mount, ipc and network namespaces, unless its app loosens one by name"
    )
    where_data = "a volume of the engine" if own_volume else "the agent's own directory, bind-mounted"
    yield Finding.info(f"Data is kept in {where_data}, the only files of the host that an agent can change")
    if engine.ssh:
        yield Finding.info(
            "Traffic between the proxy and agents goes through the ssh connection to the engine's host"
        )
    elif not engine.is_local:
        yield Finding.warning(
            "Traffic between the proxy and agents on another host is not encrypted by Docker",
            "reach published ports over a private network or a VPN (publish, reach), or use an ssh:// engine",
        )
    if not engine.is_local:
        yield Finding.warning("Secrets of apps need an engine on this host; apps that have any are refused", "")
    if not protects_host:
        where = "this host" if engine.is_local else "the engine's host"
        yield Finding.warning(
            f'Agents with network "private" can reach {where}, all that it reaches, and the cloud\'s metadata '
            "service, which may give them the machine's credentials",
            "run the manager as root with iptables installed"
            if engine.is_local
            else f"set rules there: iptables -I DOCKER-USER -d {METADATA_NETWORKS[0]} -j REJECT, and the like",
        )
    if protects_host and not bounds_connections:
        yield Finding.warning(
            'An agent with network "private" can fill the table of tracked connections (nf_conntrack_max)',
            "load the kernel modules xt_connlimit and xt_hashlimit",
        )
    for key, what in (("MemoryLimit", "memory"), ("CPUCfsQuota", "processor time"), ("PidsLimit", "processes")):
        if info and not info.get(key, True):
            yield Finding.warning(f"This engine cannot limit {what}", "enable the cgroup controllers on its host")
    if options.tls_ca and not options.tls_verify:
        yield Finding.warning("The engine's TLS certificate is not verified", "set tls_verify = true")


def explain_app(app: App, engine: Engine) -> Iterator[Finding]:
    """Return findings for one app."""
    options = options_of(app)
    if options.port and engine.ssh:
        yield Finding.info(f"The port of {app.name} is published on the engine's host, and reached through ssh")
    elif options.port:
        yield Finding.warning(
            f"The port of {app.name} is published on the host: every local user can connect to it",
            "let the app listen on {socket}, which only the proxy can reach",
        )
    else:
        yield Finding.info(f"{app.name} listens on a Unix socket that only its own user and the proxy can reach")
    if app.network is Network.HOST:
        shared = "loopback services, other agents' ports, the cloud's metadata"
        yield Finding.warning(f"{app.name} shares the host's network: {shared}", 'use "private"')
    elif app.network is Network.NONE:
        yield Finding.info(f"{app.name} has no network at all")
    else:
        yield Finding.info(f"{app.name} reaches the outside, and no other agent")
    if app.limits.disk is not None and not engine.is_local:
        yield Finding.error(
            f"{app.name} has a disk limit, and engines elsewhere cannot enforce it", "remove `disk`"
        )
    elif app.limits.disk is not None and options.seccomp != "default":
        yield Finding.warning(
            f"{app.name} can leave the quota of its data, unless its seccomp profile refuses FS_IOC_FSSETXATTR",
            'set seccomp = "default"',
        )
    for what, fix in _loosened(options):
        yield Finding.warning(f"{app.name} loosens its isolation: {what}", fix)


def _loosened(options: DockerAppOptions) -> Iterator[tuple[str, str]]:
    if options.user == "root":
        names = ", ".join(ROOT_CAPABILITIES)
        yield f"it runs as root with the capabilities {names}, and what it writes is root's", 'set user = "agent"'
    if not options.read_only:
        bound = "" if options.changes_size else ", and so fill the disk of the engine"
        yield (
            f"it can change the image's files (its own copy of them){bound}",
            "set read_only = true or changes_size",
        )
    for one in options.cap_add:
        yield f"it has the capability {one}", f"remove {one} from cap_add"
    if not options.no_new_privileges:
        yield "it may gain privileges through setuid programs", "set no_new_privileges = true"
    if options.seccomp == "unconfined":
        yield "no seccomp profile filters its system calls", 'set seccomp = "default"'
    elif options.seccomp == "engine":
        yield (
            "its seccomp profile is the engine's, which may let AF_VSOCK pass",
            'set seccomp = "default"',
        )
    elif options.seccomp != "default":
        yield f"its seccomp profile is {options.seccomp}", 'set seccomp = "default"'
    if options.apparmor:
        yield f"its AppArmor profile is {options.apparmor}", "remove apparmor"
    for device in options.devices:
        yield f"it uses the host's device {device.partition(':')[0]}", "remove it from devices"
    if options.gpus is not None:
        yield f"it uses the host's GPUs ({options.gpus})", "remove gpus"
    for mount in options.mounts:
        how = "reads" if mount.read_only else "changes"
        yield f"it {how} {mount.source} of the host", "remove it from mounts"
    if options.network:
        yield (
            f"it shares the network {options.network}, which denies and bounds nothing, not even clouds' metadata",
            "remove network",
        )
