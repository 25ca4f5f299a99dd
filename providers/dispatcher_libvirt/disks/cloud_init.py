"""The cloud-init disk: the configuration of a guest, for cloud-init (NoCloud) and as plain files.

    meta-data user-data network-config     cloud-init, "NoCloud" (the volume label is cidata)
    dispatcher/agent                       KEY=VALUE lines: agent user uid gid port data address gateway dns
    dispatcher/start.sh                    POSIX shell: changes to the data directory, sets the environment, runs
                                           the command, or its own arguments where the app has no command
    dispatcher/secrets/NAME                one file per secret
    dispatcher/stdin                       the app's standard input

It contains secrets, so the file is in memory, belongs to the machine's host user and has the mode 0400.
"""

from __future__ import annotations

import errno
import io
import json
import os
import secrets
import shlex
from collections.abc import Mapping
from pathlib import Path

import pycdlib

from dispatcher.plugin import AgentSpec, ConfigError, ProviderError, in_memory, make_owned, names
from dispatcher_libvirt import domain_xml
from dispatcher_libvirt.network import Interface
from dispatcher_libvirt.options import environment, fill, options_of

SECRETS = "/run/dispatcher/secrets"
LABEL = "cidata"
TEMPORARY = ".tmp"  # directory in the data for temporary files of any size
_MAX_USER_DATA = 1 << 20


def files(spec: AgentSpec, interface: Interface | None) -> dict[str, bytes]:
    """Return the files of an agent's cloud-init disk by path.

    :param interface: on a libvirt network, None without one.
    :raises DispatcherError: user data, command or environment is invalid.
    """
    options = options_of(spec.app)
    agent: dict[str, object] = {
        "agent": spec.agent,
        "user": spec.user,
        "uid": spec.uid,
        "gid": spec.gid,
        "port": options.port,
        "data": options.data,
    }
    ethernets: dict[str, object] = {"all": {"match": {"name": "e*"}, "dhcp4": True}}
    instance = f"{spec.backend_name}-{spec.hash[:12]}"
    if interface:
        address, gateway = str(interface.address), str(interface.gateway)
        agent |= {"address": address, "gateway": gateway, "dns": gateway}
        ethernets = {
            "eth0": {
                "match": {"macaddress": interface.mac},
                "set-name": "eth0",
                "addresses": [address],
                "routes": [{"to": "0.0.0.0/0", "via": gateway}],
                "nameservers": {"addresses": [gateway]},
            }
        }
        instance += f"-{interface.address.ip}"
    elif options.endpoint != "vsock":
        agent |= {"address": f"{domain_xml.GUEST_ADDRESS}/24", "gateway": domain_xml.GUEST_GATEWAY}
    # A new instance id makes cloud-init configure the guest again.
    about = {"instance-id": instance, "local-hostname": names.key(spec.agent)}
    network = {"version": 2, "ethernets": ethernets}
    found = {
        # JSON is YAML, and quotes every value.
        "meta-data": json.dumps(about).encode(),
        "user-data": read_user_data(options.user_data) or b"#cloud-config\n{}\n",
        "network-config": json.dumps(network).encode(),
        "dispatcher/agent": "".join(f"{key}={value}\n" for key, value in agent.items()).encode(),
        "dispatcher/start.sh": start_script(spec).encode(),
    }
    for name, value in spec.secrets.items():
        found[f"dispatcher/secrets/{name}"] = value.encode()
    if spec.stdin is not None:
        found["dispatcher/stdin"] = spec.stdin
    return found


def start_script(spec: AgentSpec) -> str:
    """Return the shell script that starts the app; every value is quoted.

    Of programs it needs only a shell and `env`; with `mkdir` and `rm` it makes a directory for temporary files.
    """
    options = options_of(spec.app)
    variables = [f"{name}={value}" for name, value in environment(spec, SECRETS).items()]
    words = " ".join(shlex.quote(word) for word in variables)
    command = " ".join(shlex.quote(fill(word, options)) for word in options.command) or '"$@"'
    data, temporary = shlex.quote(options.data), shlex.quote(f"{options.data}/{TEMPORARY}")
    return (
        "# Start the app: `sh start.sh DEFAULT COMMAND...`\n"
        f"cd {data} || exit 126\n"
        "umask 007\n"
        "USER=app SHELL=/bin/sh TMPDIR=/tmp\n"
        "while IFS=: read -r name _ uid _ _ _ shell; do\n"
        f'    [ "$uid" = {spec.uid} ] && USER=$name SHELL=${{shell:-/bin/sh}}\n'
        "done 2>/dev/null </etc/passwd\n"
        f"rm -rf {temporary} 2>/dev/null && mkdir -m 0700 {temporary} 2>/dev/null && TMPDIR={temporary}\n"
        'exec env -i "PATH=$PATH" "USER=$USER" "LOGNAME=$USER" "SHELL=$SHELL" "TMPDIR=$TMPDIR" '
        f"{words} {command}\n"
    )


def read_user_data(path: Path | None) -> bytes:
    """Return the operator's cloud-init user data, b"" without a file.

    :raises ConfigError: it is unreadable, or not cloud-init user data.
    """
    if path is None:
        return b""
    try:
        with path.open("rb") as file:
            data = file.read(_MAX_USER_DATA + 1)
    except OSError as error:
        raise ConfigError(
            f"Cannot read {path}", why=error.strerror or str(error), fix="check user_data"
        ) from error
    if len(data) > _MAX_USER_DATA or not data.startswith((b"#", b"Content-Type:")):
        raise ConfigError(
            f"{path} is not cloud-init user data",
            why="it is over 1 MiB" if len(data) > _MAX_USER_DATA else "its first line does not name a format",
            fix="begin it with #cloud-config (or another format of cloud-init)",
        )
    return data


def iso_image(contents: Mapping[str, bytes]) -> bytes:
    """Return an ISO 9660 image with Rock Ridge names, all files readable by their owner alone."""
    iso = pycdlib.PyCdlib()
    iso.new(interchange_level=3, joliet=3, rock_ridge="1.09", vol_ident=LABEL)
    made: dict[str, str] = {"": ""}
    for number, (path, data) in enumerate(sorted(contents.items())):
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


def write_image(path: Path, data: bytes, owner: tuple[int, int] | None) -> None:
    """Write a cloud-init disk atomically, mode 0400.

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
        full = error.errno == errno.ENOSPC
        raise ProviderError(
            f"Cannot write the cloud-init disk {path}",
            why=error.strerror or str(error),
            fix="free some memory: its file system is in memory" if full else f"check {path.parent}",
        ) from error


def memory_directory(installation: str, preferred: Path) -> Path:
    """Return this user's directory in memory for cloud-init disks, mode 0711, created where it is absent.

    :param preferred: parent directory, if it is in memory itself.
    :raises ProviderError: there is none.
    """
    candidates = [
        preferred,
        Path("/run"),
        Path(os.environ.get("XDG_RUNTIME_DIR") or "/run/user"),
        Path("/dev/shm"),  # noqa: S108 - `make_owned` makes and checks a directory of its own there
    ]
    for base in candidates:
        if not (in_memory(base) and os.access(base, os.W_OK | os.X_OK)):
            continue
        return make_owned(base, "seeds" if base == preferred else f"dispatcher-seeds-{installation}", 0o711)
    raise ProviderError(
        "There is no directory in memory for secrets",
        why="none of the manager's run_dir, /run and /dev/shm is a writable tmpfs",
        fix="mount a tmpfs at manager.run_dir",
    )
