"""Data in volumes of the engine: created, owned by the agent's user, copied in and out; and files of that user.

A volume is reached only through a container: a helper made from the agent's own image, which is never started.
The engine's archive calls carry tar streams.  On this side `tar` runs as the agent's user in the canonical
directory, so hostile content of a volume cannot change other users' files.

An agent's user is in its container's /etc/passwd and /etc/group, so that programs find its name, home and shell.
Both files are the image's own with one line more, bind-mounted from this host.  With an engine on another host the
app has the variables only.
"""

from __future__ import annotations

import io
import os
import shutil
import stat
import subprocess
import tarfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from dispatcher.plugin import AgentSpec, Deadline, DeadlineExceeded, Handle, Progress, ProviderError, slug
from dispatcher_docker.container_config import TEMPORARY, User, options_of, volume_name
from dispatcher_docker.engine import Client, Engine
from dispatcher_docker.errors import NoSuchObject
from dispatcher_docker.options import LABEL, DockerAppOptions
from dispatcher_docker.stop import remove

_MOUNT = "/dispatcher-data"
_BLOCK = 1024 * 1024
_MAX_FILE = 4 << 20  # bytes; an image's file that is larger is left out
_ROOT = b"root:x:0:0:root:/root:/bin/sh\n"
_NO_SHELLS = {"", "nologin", "false"}


@contextmanager
def helper(
    engine: Engine, installation: str, image: str, name: str, mounts: list[dict[str, Any]], deadline: Deadline
) -> Iterator[tuple[Client, str]]:
    """Yield client and id of a container that is never started: a way into an image or a volume."""
    body = {
        "Image": image,
        "Cmd": ["never-run"],
        "Labels": {f"{LABEL}helper": installation},
        "HostConfig": {"NetworkMode": "none", "Mounts": mounts},
    }
    remove(engine, name, deadline)  # a crash may have left one
    container = engine.make(body, name, deadline)
    try:
        with engine.call("copy files", deadline) as client:
            yield client, container
    finally:
        remove(engine, container, Deadline(max(5.0, deadline.remaining())))


def _helper_name(handle: Handle) -> str:
    return f"{handle.name}-helper"


class Volumes:
    """The data volumes of one installation."""

    def __init__(self, engine: Engine, installation: str, *, privileged: bool) -> None:
        self._engine = engine
        self._installation = installation
        self._privileged = privileged

    def ensure(self, handle: Handle, deadline: Deadline) -> bool:
        """Create an agent's volume, owned by its user, if it does not exist; return whether it is new."""
        name = volume_name(handle.name)
        try:
            with self._engine.call("look for the data volume", deadline) as client:
                client.inspect_volume(name)
        except NoSuchObject:
            pass
        else:
            return False
        with self._engine.call("create the data volume", deadline) as client:
            client.create_volume(
                name, labels={f"{LABEL}installation": self._installation, f"{LABEL}agent": handle.agent}
            )
        try:
            with self.helper(handle, deadline) as (client, container):
                client.put_archive(container, "/", _root(handle))
        except BaseException:
            self.remove(handle, Deadline(max(5.0, deadline.remaining())))
            raise
        return True

    def remove(self, handle: Handle, deadline: Deadline) -> None:
        """Remove an agent's volume; absent is success."""
        try:
            with self._engine.call("remove the data volume", deadline) as client:
                client.remove_volume(volume_name(handle.name), force=True)
        except NoSuchObject:
            pass

    @contextmanager
    def helper(self, handle: Handle, deadline: Deadline) -> Iterator[tuple[Client, str]]:
        """Yield client and id of a helper with the volume at `_MOUNT`."""
        mount = {
            "Type": "volume",
            "Source": volume_name(handle.name),
            "Target": _MOUNT,
            "VolumeOptions": {"NoCopy": True},
        }
        image = str(handle.data.get("image", ""))
        with helper(self._engine, self._installation, image, _helper_name(handle), [mount], deadline) as found:
            yield found

    def remove_helper(self, handle: Handle, deadline: Deadline) -> None:
        """Remove a helper that a crash left behind."""
        remove(self._engine, _helper_name(handle), deadline)

    def export(self, handle: Handle, directory: Path, deadline: Deadline, progress: Progress) -> None:
        """Copy the volume's content into `directory`."""
        if self._privileged:
            os.chown(directory, int(handle.data["uid"]), int(handle.data["gid"]), follow_symlinks=False)
        with self.helper(handle, deadline) as (client, container), self._tar(handle, directory, "-x") as tar:
            assert tar.stdin
            stream, _ = client.get_archive(container, f"{_MOUNT}/.", chunk_size=_BLOCK)
            total = 0
            for block in stream:
                tar.stdin.write(block)
                total += len(block)
                _report(progress, "copying the data out", total, deadline)
            tar.stdin.close()
            _finish(tar, "read", deadline)

    def replace(self, handle: Handle, directory: Path, deadline: Deadline, progress: Progress) -> None:
        """Replace the volume by a copy of `directory`."""
        self.remove_helper(handle, deadline)
        self.remove(handle, deadline)
        self.ensure(handle, deadline)
        with self.helper(handle, deadline) as (client, container), self._tar(handle, directory, "-c") as tar:
            client.put_archive(container, _MOUNT, _output(tar, progress, deadline))
            _finish(tar, "write", deadline)

    @contextmanager
    def _tar(self, handle: Handle, directory: Path, what: str) -> Iterator[subprocess.Popen[bytes]]:
        uid, gid = int(handle.data["uid"]), int(handle.data["gid"])
        arguments = ["tar", "--numeric-owner", "--preserve-permissions", what, "-f", "-", "-C", "."]
        if what == "-c":
            arguments += ["--sparse", "."]
        user: dict[str, Any] = {"user": uid, "group": gid, "extra_groups": []} if self._privileged else {}
        tar = subprocess.Popen(
            arguments,
            cwd=directory,
            stdin=subprocess.PIPE if what == "-x" else subprocess.DEVNULL,
            stdout=subprocess.PIPE if what == "-c" else subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            env={"PATH": os.environ.get("PATH", os.defpath), "LC_ALL": "C.UTF-8"},
            **user,
        )
        try:
            yield tar
        except BrokenPipeError as error:
            raise _tar_failed(tar) from error
        finally:
            tar.kill()
            for pipe in (tar.stdin, tar.stdout, tar.stderr):
                if pipe:
                    try:
                        pipe.close()
                    except BrokenPipeError:
                        pass
            tar.wait()


def _output(tar: subprocess.Popen[bytes], progress: Progress, deadline: Deadline) -> Iterator[bytes]:
    """Yield tar's output, as a body that `requests` streams."""
    assert tar.stdout
    total = 0
    while block := tar.stdout.read(_BLOCK):
        total += len(block)
        _report(progress, "copying the data in", total, deadline)
        yield block


def _report(progress: Progress, step: str, total: int, deadline: Deadline) -> None:
    progress(step, f"{total // 1024} KiB")
    if deadline.expired:
        raise DeadlineExceeded("The data was not copied in time", fix="try again with more time")


def _finish(tar: subprocess.Popen[bytes], what: str, deadline: Deadline) -> None:
    try:
        code = tar.wait(max(0.1, deadline.remaining()))
    except subprocess.TimeoutExpired as error:
        raise DeadlineExceeded(f"The data was not {what} in time", fix="try again with more time") from error
    if code:
        raise _tar_failed(tar)


def _tar_failed(tar: subprocess.Popen[bytes]) -> ProviderError:
    tar.kill()
    assert tar.stderr
    output = tar.stderr.read(2000)
    return ProviderError(
        "The data could not be copied",
        why=" ".join(output.decode(errors="replace").split())[:400] or "tar failed",
        fix="free space, and check owners and modes in the data directory",
    )


def _root(handle: Handle) -> bytes:
    """Return a tar that gives the mount point, and its directory for temporary files, to the agent's user."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as tar:
        for path in (_MOUNT, f"{_MOUNT}/{TEMPORARY}"):
            entry = tarfile.TarInfo(path.lstrip("/"))
            entry.type = tarfile.DIRTYPE
            entry.mode, entry.mtime = 0o700, int(time.time())
            entry.uid, entry.gid = int(handle.data["uid"]), int(handle.data["gid"])
            tar.addfile(entry)
    return buffer.getvalue()


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
