"""The seed disk: what a guest is told at its start, for cloud-init and as plain files.  Touches files in memory.

    meta-data user-data network-config     cloud-init, "NoCloud" (the volume is labelled cidata)
    dispatcher/agent                       KEY=VALUE lines: agent user uid gid port data address gateway
    dispatcher/start.sh                    POSIX shell: changes to the data directory, sets the environment, runs
                                           the command, or its own arguments where the app names no command
    dispatcher/secrets/NAME                one file per secret
    dispatcher/stdin                       what the app gets on its standard input

It holds secrets, so the file lies in memory, belongs to the machine's host user and has the mode 0400.
"""

from __future__ import annotations

import io
import json
import os
import secrets
import shlex
from collections.abc import Mapping
from pathlib import Path

import pycdlib

from dispatcher.plugin import AgentSpec, ConfigError, ProviderError, make_owned, names
from dispatcher_libvirt import domain_xml
from dispatcher_libvirt.options import environment, fill, options_of, secret_name

SECRETS = "/run/dispatcher/secrets"
LABEL = "cidata"
_LARGEST_USER_DATA = 1 << 20


def contents(spec: AgentSpec, *, instance: str, user_data: bytes, static: bool) -> dict[str, bytes]:
    """Return the files of an agent's seed disk by path.

    :param instance: cloud-init's instance id; another one makes it configure the guest again.
    :param static: the guest's address is QEMU's own, so it need not ask for one.
    :raises DispatcherError: command, environment or a secret's name cannot be used.
    """
    options = options_of(spec.app)
    about: dict[str, object] = {
        "agent": spec.agent,
        "user": spec.user,
        "uid": spec.uid,
        "gid": spec.gid,
        "port": options.port,
        "data": options.data,
    }
    if static:
        about |= {"address": f"{domain_xml.GUEST_ADDRESS}/24", "gateway": domain_xml.GUEST_GATEWAY}
    host = names.key(spec.agent)
    network = {"version": 2, "ethernets": {"all": {"match": {"name": "e*"}, "dhcp4": True}}}
    files = {
        # JSON is YAML, and quotes what is data.
        "meta-data": json.dumps({"instance-id": instance, "local-hostname": host}).encode(),
        "user-data": user_data or b"#cloud-config\n{}\n",
        "network-config": json.dumps(network).encode(),
        "dispatcher/agent": "".join(f"{key}={value}\n" for key, value in about.items()).encode(),
        "dispatcher/start.sh": start_script(spec).encode(),
    }
    for name, value in spec.secrets.items():
        files[f"dispatcher/secrets/{secret_name(name)}"] = value.encode()
    if spec.stdin is not None:
        files["dispatcher/stdin"] = spec.stdin
    return files


def start_script(spec: AgentSpec) -> str:
    """Return the shell script that starts the app; every value is quoted."""
    options = options_of(spec.app)
    variables = [f"{name}={value}" for name, value in environment(spec, SECRETS).items()]
    words = " ".join(shlex.quote(word) for word in variables)
    command = " ".join(shlex.quote(fill(word, options)) for word in options.command) or '"$@"'
    return (
        "# Start the app: `sh start.sh DEFAULT COMMAND...`\n"
        f"cd {shlex.quote(options.data)} || exit 126\n"
        f'exec env -i "PATH=$PATH" {words} {command}\n'
    )


def read_user_data(path: Path | None) -> bytes:
    """Return the operator's cloud-init file, b"" without one.

    :raises ConfigError: it cannot be read, or is no cloud-init user data.
    """
    if path is None:
        return b""
    try:
        with path.open("rb") as file:
            data = file.read(_LARGEST_USER_DATA + 1)
    except OSError as error:
        raise ConfigError(
            f"Cannot read {path}", why=error.strerror or str(error), fix="check user_data"
        ) from error
    if len(data) > _LARGEST_USER_DATA or not data.startswith((b"#", b"Content-Type:")):
        raise ConfigError(
            f"{path} is no cloud-init user data",
            why="it is over 1 MiB" if len(data) > _LARGEST_USER_DATA else "its first line says no kind",
            fix="begin it with #cloud-config (or another kind that cloud-init knows)",
        )
    return data


def image(files: Mapping[str, bytes]) -> bytes:
    """Return an ISO 9660 image with Rock Ridge names, all files readable by their owner alone."""
    iso = pycdlib.PyCdlib()
    iso.new(interchange_level=3, joliet=3, rock_ridge="1.09", vol_ident=LABEL)
    made: dict[str, str] = {"": ""}
    for number, (path, data) in enumerate(sorted(files.items())):
        *parents, name = path.split("/")
        above, plain = "", ""
        for parent in parents:
            below = f"{above}/{parent}"
            if below not in made:
                made[below] = f"{plain}/D{len(made):05d}"
                iso.add_directory(made[below], rr_name=parent, joliet_path=below, file_mode=0o040500)
            above, plain = below, made[below]
        iso.add_fp(
            io.BytesIO(data),
            len(data),
            f"{plain}/F{number:05d}.;1",
            rr_name=name,
            joliet_path=f"{above}/{name}",
            file_mode=0o100400,
        )
    buffer = io.BytesIO()
    iso.write_fp(buffer)
    iso.close()
    return buffer.getvalue()


def write(path: Path, data: bytes, owner: tuple[int, int] | None) -> None:
    """Put a seed disk in place at once, mode 0400.

    :raises ProviderError: no space in memory.
    """
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}")
    try:
        fd = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, 0o400)
        with open(fd, "wb") as file:
            file.write(data)
            if owner is not None:
                os.fchown(fd, *owner)
        temporary.rename(path)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        raise ProviderError(
            f"Cannot write the seed disk {path}", why=error.strerror or str(error), fix="free some memory"
        ) from error


def memory_directory(installation: str, preferred: Path) -> Path:
    """Return a directory in memory for seed disks, made if need be: 0711, this user's.

    :param preferred: used where it lies in memory itself.
    :raises ProviderError: there is none.
    """
    candidates = [
        preferred,
        Path("/run"),
        Path(os.environ.get("XDG_RUNTIME_DIR") or "/run/user"),
        Path("/dev/shm"),  # noqa: S108 - a directory of its own in it, checked below
    ]
    for base in candidates:
        if not (in_memory(base) and os.access(base, os.W_OK | os.X_OK)):
            continue
        return make_owned(base, "seeds" if base == preferred else f"dispatcher-seeds-{installation}", 0o711)
    raise ProviderError(
        "There is no directory in memory for secrets",
        why="none of the manager's run_dir, /run and /dev/shm is a tmpfs that it may write to",
        fix="mount a tmpfs at manager.run_dir",
    )


def in_memory(path: Path) -> bool:
    """Whether a directory lies on a file system that is kept in memory."""
    try:
        device = path.stat().st_dev
    except OSError:
        return False
    wanted = f"{os.major(device)}:{os.minor(device)}"
    for line in Path("/proc/self/mountinfo").read_text(encoding="utf-8", errors="replace").splitlines():
        left, _, right = line.partition(" - ")
        if left.split(" ")[2] == wanted:
            return right.split(" ")[0] in {"tmpfs", "ramfs"}
    return False


def placeholder(path: Path, owner: tuple[int, int] | None) -> None:
    """Put an empty disk where a seed disk was, for a machine that wakes up: it read the seed when it booted."""
    if not path.exists():
        write(path, bytes(64 * 1024), owner)
