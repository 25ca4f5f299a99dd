"""An agent's OCI bundle: the directory with config.json from which a runtime starts a container.

The format is https://github.com/opencontainers/runtime-spec; runc and crun take the same.
"""

import json
import os

from dispatcher.plugin import Inside, Network, seccomp_profile

SYSTEM = ("/usr", "/bin", "/sbin", "/lib", "/lib32", "/lib64", "/libx32", "/etc")
DATA, RUN, SECRETS = "/data", "/run/agent", "/run/secrets"
TEMPORARY = ".tmp"  # in the data, as /tmp is small
_HIDDEN = ["/etc/dispatcher", "/proc/kcore", "/proc/keys", "/proc/latency_stats", "/proc/timer_list"]
_READ_ONLY = ["/proc/bus", "/proc/fs", "/proc/irq", "/proc/sys", "/proc/sysrq-trigger"]
_CAPABILITIES = ["bounding", "effective", "inheritable", "permitted", "ambient"]
_PERIOD = 100_000  # microseconds of processor time that a quota is of
_OOM = 100  # agents are killed before the host's own services when memory is short


def inside(spec):
    """Return the paths as the agent sees them.  There is no {port}: nothing reaches one in its own network."""
    secrets = SECRETS if spec.secrets else ""
    return Inside(socket=f"{RUN}/{spec.socket.name}", data=DATA, tmp=f"{DATA}/{TEMPORARY}", secrets=secrets)


def write(bundle, spec, *, init, secrets, limits):
    """Write the bundle of an agent.

    :param init: the program that is process 1, "" for the app itself; :param secrets: directory of its secrets.
    :param limits: those that the host can enforce.
    """
    options, root = spec.app.options, bundle / "rootfs"
    root.mkdir(parents=True)
    root.chmod(0o755)  # whatever the manager's umask is
    namespaces = ["pid", "ipc", "uts", "mount", "cgroup"] + ["network"] * (spec.app.network is not Network.HOST)
    config = {
        "ociVersion": "1.0.2",
        "root": {"path": str(options.rootfs or root), "readonly": True},
        "hostname": spec.app.name,
        "process": _process(spec, [init, "--"] if init else [], limits),
        "mounts": [*_memory(options.tmp_size), *_binds(spec, root, secrets)],
        "linux": {
            "cgroupsPath": f"/{spec.backend_name}",
            "namespaces": [{"type": name} for name in namespaces],
            "resources": _resources(limits),
            "seccomp": json.loads(seccomp_profile(multicast=spec.app.network is Network.HOST)),
            "maskedPaths": _HIDDEN,
            "readonlyPaths": _READ_ONLY,
        },
    }
    (bundle / "config.json").write_text(json.dumps(config))


def _process(spec, init, limits):
    sees = inside(spec)
    return {
        "args": [*init, *map(sees.fill, spec.app.options.command)],
        "env": [f"{name}={value}" for name, value in sees.environment(spec, limits=limits).items()],
        "cwd": DATA,
        "user": {"uid": spec.uid, "gid": spec.gid, "umask": 0o007},  # the proxy's group connects to the socket
        "capabilities": {kind: [] for kind in _CAPABILITIES},
        "noNewPrivileges": True,
        "oomScoreAdj": _OOM,
        "rlimits": [{"type": "RLIMIT_CORE", "hard": 0, "soft": 0}],
    }


def _memory(size):
    """Yield the mounts that are the agent's own, in memory; files below /proc are of its own processes."""
    kinds = {"/dev": ("tmpfs", "mode=755", "size=64k"), "/run": ("tmpfs", "mode=755", "size=64k")}
    kinds |= {path: ("tmpfs", "nodev", "mode=1777", f"size={size}") for path in ("/tmp", "/dev/shm")}
    kinds |= {"/proc": ("proc",), "/dev/pts": ("devpts", "newinstance", "ptmxmode=0666", "mode=0620")}
    for path in sorted(kinds):  # each after the directory that it is in
        kind, *options = kinds[path]
        yield {"destination": path, "type": kind, "source": kind, "options": ["nosuid", *options]}


def _binds(spec, root, secrets):
    """Yield the mounts of the host's directories; make the links that some of them are."""
    options = spec.app.options
    for path in () if options.rootfs else filter(os.path.exists, SYSTEM):
        if os.path.islink(path):
            (root / path[1:]).symlink_to(os.readlink(path))
        else:
            yield _bind(path, path, "ro")
    for path in options.read_only:
        yield _bind(path, path, "ro")
    for path in options.writable:
        yield _bind(path, path, "rw")
    yield _bind(spec.data_dir, DATA, "rw")
    yield _bind(spec.run_dir, RUN, "rw")
    if secrets:
        yield _bind(secrets, SECRETS, "ro")


def _bind(source, target, mode):
    options = ["bind", mode, "nosuid", "nodev"]
    return {"destination": str(target), "type": "bind", "source": str(source), "options": options}


def _resources(limits):
    """Return the limits for control groups of version 1; a runtime translates them for version 2."""
    found = {"devices": [{"allow": False, "access": "rwm"}]}  # but null, zero, full, random, urandom, tty, ptmx
    if limits.memory:
        found["memory"] = {"limit": limits.memory}
        if limits.swap is not None:  # None: swap is not limited.  Version 1 limits both together.
            found["memory"]["swap"] = limits.memory + limits.swap
    if limits.cpus:
        found["cpu"] = {"period": _PERIOD, "quota": max(1000, int(limits.cpus * _PERIOD))}
    if limits.pids:
        found["pids"] = {"limit": limits.pids}
    return found
