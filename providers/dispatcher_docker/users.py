"""The agent's user in its container's /etc/passwd and /etc/group, so that programs find its name, home and shell.

Both files are the image's own with one line more, bind-mounted from this host.  With an engine on another host the
app has the variables only.
"""

from __future__ import annotations

import io
import os
import shutil
import stat
import tarfile
import threading
from pathlib import Path

from dispatcher.plugin import AgentSpec, Deadline, slug
from dispatcher_docker.containers import User, options_of
from dispatcher_docker.data import helper
from dispatcher_docker.host import Client, Engine
from dispatcher_docker.options import DockerAppOptions

_MAX_FILE = 4 << 20  # bytes; an image's file that is larger is left out
_ROOT = b"root:x:0:0:root:/root:/bin/sh\n"
_NO_SHELLS = {"", "nologin", "false"}


class Users:
    """The users of an installation's containers.

    :param directory: of this provider alone; others can neither enter nor read it.
    """

    def __init__(self, engine: Engine, installation: str, directory: Path) -> None:
        self._engine, self._installation, self._directory = engine, installation, directory
        self._lock = threading.Lock()
        self._images: dict[str, tuple[bytes, bytes]] = {}

    def prepare(self, spec: AgentSpec, image: str, deadline: Deadline) -> User:
        """Write the files of an agent's user for an image with this id; return the user."""
        name = slug(spec.user)
        if not self._engine.is_local:
            return User(name=name)
        passwd, group = self._of_image(image, deadline)
        entries = [line.split(":") for line in passwd.decode(errors="replace").splitlines()]
        shell = next((one[6] for one in entries if len(one) == 7 and one[2] == "0"), "")
        shell = "/bin/sh" if shell.rpartition("/")[2] in _NO_SHELLS else shell
        if options_of(spec.app).user == "root":
            return User(name="root", shell=shell)
        if any(one[0] == name for one in entries):
            name = "agent"  # the image has another user of that name
        directory = self._directory / spec.backend_name
        directory.mkdir(mode=0o755, parents=True, exist_ok=True)
        home = options_of(spec.app).data_path
        line = f"{name}:x:{spec.uid}:{spec.gid}:{spec.user}:{home}:{shell}\n"  # a user's name has no colon
        _write(directory / "passwd", _ended(passwd or _ROOT) + line.encode())
        _write(directory / "group", _ended(group) + f"{name}:x:{spec.gid}:\n".encode())
        return User(name=name, shell=shell, directory=directory)

    def remove(self, name: str) -> None:
        """Remove the files of an agent with this backend name; absent is success."""
        shutil.rmtree(self._directory / name, ignore_errors=True)

    def _of_image(self, image: str, deadline: Deadline) -> tuple[bytes, bytes]:
        what = "The image's list of users was not read in time"
        with deadline.holding(self._lock, what, why="another start is reading the list of an image"):
            if image not in self._images:
                name = f"dispatcher-{self._installation}-users"
                with helper(self._engine, self._installation, image, name, [], deadline) as (client, container):
                    files = [_file(client, container, path) for path in ("/etc/passwd", "/etc/group")]
                self._images[image] = (files[0], files[1])
            return self._images[image]


def _file(client: Client, container: str, path: str) -> bytes:
    """Return a file of a container; b"" if there is none, or if it is not a plain one."""
    content = client.archive(container, path, _MAX_FILE)
    if not content:
        return b""
    with tarfile.open(fileobj=io.BytesIO(content)) as tar:
        member = tar.next()
        file = tar.extractfile(member) if member and member.isfile() else None
        return file.read() if file else b""


def _write(path: Path, content: bytes) -> None:
    """Write a file that the agent reads, whatever this process's umask is."""
    path.write_bytes(content)
    path.chmod(0o644)


def _ended(text: bytes) -> bytes:
    return text if not text or text.endswith(b"\n") else text + b"\n"


def groups_of(options: DockerAppOptions) -> list[int]:
    """Return the groups that an app needs: of its devices, and of writable directories that people share.

    Such a directory is writable by its group and passes it on (set-group-ID).  Root's group is never among them.
    """
    found = set()
    for device in options.devices:
        found.add(_group(device.partition(":")[0], stat.S_IFCHR, 0o060))
    for mount in options.mounts:
        if not mount.read_only:
            found.add(_group(mount.source, stat.S_IFDIR, stat.S_ISGID | 0o070))
    return sorted(found - {0})


def _group(path: str, kind: int, mode: int) -> int:
    """Return the group of a file if it is of this kind and has these bits of mode; else 0."""
    try:
        status = os.stat(path)
    except OSError:
        return 0  # the engine's error names it
    fits = stat.S_IFMT(status.st_mode) == kind and status.st_mode & mode == mode
    return status.st_gid if fits else 0
