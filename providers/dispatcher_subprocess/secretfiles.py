"""Secrets of agents as files in memory: a directory per agent on a tmpfs, readable by that agent alone.

Touches ``/dev/shm``.  Never in argv, an environment or on a disk.  They live as long as the agent does.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import threading
from collections.abc import Mapping
from pathlib import Path

from dispatcher.plugin import ProviderError, make_owned, owned

_MEMORY = Path("/dev/shm")  # noqa: S108  what lies below it is owned, and checked to be
_DIRECTORY = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC


class SecretFiles:
    """The secrets of an installation's agents.

    :param fallback: a private directory, for a host without ``/dev/shm``.
    """

    def __init__(self, installation: str, fallback: Path) -> None:
        self._parent = _MEMORY if _MEMORY.is_dir() else fallback
        self._stem = f"dispatcher-{installation}-{os.geteuid()}"
        self._lock = threading.Lock()

    def path(self, name: str) -> Path:
        """Return the directory of an agent's secrets; where it would be, if it has none."""
        places = [base / name for base in owned(self._parent, self._stem)]
        return next((path for path in places if os.path.lexists(path)), self._parent / self._stem / name)

    def write(self, name: str, values: Mapping[str, str], uid: int, gid: int) -> None:
        """Write an agent's secrets in the place of what was there.

        :raises ProviderError: they cannot be written.
        """
        with self._lock:
            self._remove(name)
            self._write(name, values, uid, gid)

    def _write(self, name: str, values: Mapping[str, str], uid: int, gid: int) -> None:
        flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
        owner = (uid, gid) if os.geteuid() == 0 else (-1, -1)
        try:
            with contextlib.ExitStack() as stack:
                base = os.open(make_owned(self._parent, self._stem, 0o711), _DIRECTORY)
                stack.callback(os.close, base)
                os.mkdir(name, 0o700, dir_fd=base)
                directory = os.open(name, _DIRECTORY, dir_fd=base)
                stack.callback(os.close, directory)
                for key, value in values.items():
                    fd = os.open(key, flags, 0o400, dir_fd=directory)
                    with os.fdopen(fd, "wb") as file:
                        file.write(value.encode())
                        os.fchown(fd, *owner)
                os.fchown(directory, *owner)
                os.fchmod(directory, 0o500)
        except OSError as error:
            self._remove(name)
            raise ProviderError("Cannot hand over the secrets", why=error.strerror or str(error)) from error

    def remove(self, name: str) -> None:
        """Remove an agent's secrets; absent is success.

        :raises ProviderError: they cannot be removed.
        """
        with self._lock:
            self._remove(name)

    def _remove(self, name: str) -> None:
        for base in owned(self._parent, self._stem):
            path = base / name
            try:
                directory = os.open(path, _DIRECTORY)
                try:
                    os.fchmod(directory, 0o700)
                finally:
                    os.close(directory)
                shutil.rmtree(path)  # follows no links
                with contextlib.suppress(OSError):
                    base.rmdir()  # when this was the last one
            except FileNotFoundError:
                pass
            except OSError as error:
                raise ProviderError(f"Cannot remove {path}", why=error.strerror or str(error)) from error
