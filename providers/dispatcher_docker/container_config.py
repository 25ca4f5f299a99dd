"""From an agent's spec to the body of the Engine API's `POST /containers/create`, which holds no secret."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dispatcher.plugin import AgentSpec, App, Handle, Network
from dispatcher_docker.options import LABEL, ROOT_CAPABILITIES, DockerAppOptions, DockerOptions

PROVIDER = "docker"
#: Paths inside the container: the agent's run_dir, its socket, its secrets.
INSIDE_RUN = "/run/dispatcher"
INSIDE_SOCKET = f"{INSIDE_RUN}/s"
INSIDE_SECRETS = "/run/secrets"
#: Directory in the data for temporary files of any size.
TEMPORARY = ".tmp"


@dataclass(frozen=True, slots=True, kw_only=True)
class User:
    """The user of a container's app.

    :ivar directory: has the container's `passwd` and `group`; None where the image's own are used.
    """

    name: str
    shell: str = "/bin/sh"
    directory: Path | None = None


def options_of(app: App) -> DockerAppOptions:
    """Return the app's own options."""
    assert isinstance(app.options, DockerAppOptions)
    return app.options


def handle_of(spec: AgentSpec) -> Handle:
    """Return an agent's handle, with the values that stop, destroy and data need."""
    options = options_of(spec.app)
    return Handle(
        provider=PROVIDER,
        agent=spec.agent,
        name=spec.backend_name,
        data={
            "run_dir": str(spec.run_dir),
            "uid": spec.uid,
            "gid": spec.gid,
            "image": image_reference(spec.app, spec.installation),
            "data_path": options.data_path,
        },
    )


def image_reference(app: App, installation: str) -> str:
    """Return the name of an app's image; one that is built here is named after installation and app."""
    options = options_of(app)
    return options.image or f"dispatcher-{installation}/{app.name}"


def volume_name(name: str) -> str:
    """Return the name of an agent's data volume."""
    return f"{name}-data"


def network_name(installation: str) -> str:
    """Return what the names of an installation's networks begin with."""
    return f"dispatcher-{installation}"


def owner_uid(spec: AgentSpec) -> int:
    """Return the host user id that the app's processes have."""
    return 0 if options_of(spec.app).user == "root" else spec.uid


@dataclass(frozen=True, slots=True, kw_only=True)
class ContainerSettings:
    """What a container gets from this host and the engine, besides its spec.

    :ivar image_id: of the image at its lookup; :ivar own_volume: data is a volume.
    :ivar secrets_dir: directory in memory with the secrets; :ivar seccomp: "", "unconfined" or a profile.
    :ivar log_driver: in place of the one in the options, or "".
    :ivar groups: additional groups of the app's processes.
    :ivar host_user_namespace: the engine maps user ids, which this container must not have.
    """

    image_id: str
    own_volume: bool = False
    secrets_dir: Path | None = None
    user: User
    seccomp: str = ""
    log_driver: str = ""
    groups: Sequence[int] = ()
    host_user_namespace: bool = False


def container(spec: AgentSpec, backend: DockerOptions, settings: ContainerSettings) -> dict[str, Any]:
    """Return the body that creates an agent's container."""
    options = options_of(spec.app)
    body: dict[str, Any] = {
        "Image": settings.image_id,
        "User": "0:0" if options.user == "root" else f"{spec.uid}:{spec.gid}",
        "Env": [f"{name}={value}" for name, value in environment(spec, settings.user).items()],
        "WorkingDir": options.workdir or options.data_path,
        "Labels": labels(spec, settings.image_id),
        "Tty": False,
        "OpenStdin": spec.stdin is not None,
        "StdinOnce": spec.stdin is not None,
        "AttachStdin": spec.stdin is not None,
        "Healthcheck": {"Test": ["NONE"]},
        "HostConfig": {
            **_limits(spec, options),
            **_isolation(options, settings.seccomp),
            **_network(spec, options, backend),
            "Mounts": mounts(spec, settings),
            "GroupAdd": [str(gid) for gid in settings.groups],
            "Tmpfs": {path: f"rw,exec,nosuid,nodev,mode=1777,size={size}" for path, size in options.tmpfs.items()},
            "Init": options.init,
            "RestartPolicy": {"Name": "no"},
            "LogConfig": {
                "Type": settings.log_driver or backend.log_driver,
                "Config": {"max-size": str(backend.log_max_size), "max-file": str(backend.log_max_files)},
            },
        },
    }
    if spec.app.network is not Network.HOST:
        body["Hostname"] = options.hostname
    if options.command:
        body["Cmd"] = [fill(word, options) for word in options.command]
    if options.entrypoint is not None:
        body["Entrypoint"] = [fill(word, options) for word in options.entrypoint]
    if options.stop_signal:
        body["StopSignal"] = options.stop_signal
    if options.port:
        body["ExposedPorts"] = {f"{options.port}/tcp": {}}
    if settings.host_user_namespace:
        body["HostConfig"]["UsernsMode"] = "host"
    return body


def fill(text: str, options: DockerAppOptions) -> str:
    """Replace the placeholders of a command or an environment's value."""
    for name, value in (
        ("{socket}", INSIDE_SOCKET),
        ("{port}", str(options.port or "")),
        ("{data}", options.data_path),
    ):
        text = text.replace(name, value)
    return text


def environment(spec: AgentSpec, user: User) -> dict[str, str]:
    """Return the app's environment, besides the image's own."""
    options = options_of(spec.app)
    return {
        "USER": user.name,
        "LOGNAME": user.name,
        "SHELL": user.shell,
        "TMPDIR": f"{options.data_path}/{TEMPORARY}",
        **{key: fill(value, options) for key, value in spec.app.environment.items()},
        "HOME": options.data_path,
        **spec.variables(options.data_path, INSIDE_SECRETS),
    }


def labels(spec: AgentSpec, image_id: str) -> dict[str, str]:
    """Return the labels from which another instance of the provider recognises an agent."""
    options = options_of(spec.app)
    known = {
        "installation": spec.installation,
        "agent": spec.agent,
        "user": spec.user,
        "app": spec.app.name,
        "hash": spec.hash,
        "handle": handle_of(spec).to_json(),
        "image": image_reference(spec.app, spec.installation),
        "image-id": image_id,
        "endpoint": f"port:{options.port}/tcp" if options.port else f"unix:{spec.socket}",
        "owner": "" if options.port else str(owner_uid(spec)),
    }
    return {f"{LABEL}{name}": value for name, value in known.items()}


def mounts(spec: AgentSpec, settings: ContainerSettings) -> list[dict[str, Any]]:
    """Return the mounts: data, run_dir, secrets and those in the app's options."""
    options = options_of(spec.app)
    if settings.own_volume:
        data = {
            "Type": "volume",
            "Source": volume_name(spec.backend_name),
            "Target": options.data_path,
            "VolumeOptions": {"NoCopy": True},
        }
    else:
        data = _bind(str(spec.data_dir), options.data_path)
    found = [data]
    if not options.port:
        found.append(_bind(str(spec.run_dir), INSIDE_RUN))
    if settings.secrets_dir:
        found.append(_bind(str(settings.secrets_dir), INSIDE_SECRETS, read_only=True))
    if settings.user.directory:
        own = {f"/etc/{name}": settings.user.directory / name for name in ("passwd", "group")}
        taken = {one.target for one in options.mounts}
        found += [_bind(str(file), path, read_only=True) for path, file in own.items() if path not in taken]
    found += [_bind(one.source, one.target, read_only=one.read_only) for one in options.mounts]
    return found


def _bind(source: str, target: str, *, read_only: bool = False) -> dict[str, Any]:
    return {
        "Type": "bind",
        "Source": source,
        "Target": target,
        "ReadOnly": read_only,
        "BindOptions": {"Propagation": "rprivate"},
    }


def _limits(spec: AgentSpec, options: DockerAppOptions) -> dict[str, Any]:
    limits = spec.app.limits
    found: dict[str, Any] = {"Ulimits": [{"Name": k, "Soft": v, "Hard": v} for k, v in options.ulimits.items()]}
    if limits.memory is not None:
        found["Memory"] = limits.memory
        found["MemorySwap"] = -1 if limits.swap is None else limits.memory + limits.swap
    if limits.cpus is not None:
        found["NanoCpus"] = int(limits.cpus * 1e9)
    if limits.pids is not None:
        found["PidsLimit"] = limits.pids
    if options.changes_size is not None:
        found["StorageOpt"] = {"size": str(options.changes_size)}
    if options.shm is not None:
        found["ShmSize"] = options.shm
    return found


def _isolation(options: DockerAppOptions, seccomp: str) -> dict[str, Any]:
    security = []
    if options.no_new_privileges:
        security.append("no-new-privileges:true")
    if seccomp:
        security.append(f"seccomp={seccomp}")
    if options.apparmor:
        security.append(f"apparmor={options.apparmor}")
    found: dict[str, Any] = {
        "Privileged": False,
        "CapDrop": ["ALL"],
        "CapAdd": sorted({*options.cap_add, *(ROOT_CAPABILITIES if options.user == "root" else ())}),
        "SecurityOpt": security,
        "ReadonlyRootfs": options.read_only,
        "IpcMode": "private",
        "Devices": [_device(one) for one in options.devices],
    }
    if options.gpus is not None:
        count = -1 if options.gpus == "all" else options.gpus
        found["DeviceRequests"] = [{"Driver": "", "Count": count, "Capabilities": [["gpu"]]}]
    return found


def _device(text: str) -> Mapping[str, str]:
    outside, _, rest = text.partition(":")
    inside, _, rights = rest.partition(":")
    return {"PathOnHost": outside, "PathInContainer": inside or outside, "CgroupPermissions": rights or "rwm"}


def network_mode(spec: AgentSpec) -> str:
    """Return the engine's name of an agent's network: a private one of its own is named as its container."""
    if spec.app.network is Network.PRIVATE:
        return options_of(spec.app).network or spec.backend_name
    return str(spec.app.network.value)


def _network(spec: AgentSpec, options: DockerAppOptions, backend: DockerOptions) -> dict[str, Any]:
    found: dict[str, Any] = {"NetworkMode": network_mode(spec)}
    if options.port and spec.app.network is Network.PRIVATE:
        found["PortBindings"] = {f"{options.port}/tcp": [{"HostIp": backend.publish, "HostPort": ""}]}
    return found
