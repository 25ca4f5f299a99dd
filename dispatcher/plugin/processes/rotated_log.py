"""A log file that is rotated before it grows beyond its size.  Imports little, as its writers are small."""

from __future__ import annotations

import os

FLAGS = os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_NOFOLLOW | os.O_CLOEXEC


class RotatedLog:
    """A rotated file: PATH is the current one, PATH.1 the one before, and so on.

    :param size: bytes at which a file is rotated; :param files: number of files, the current one included.
    """

    def __init__(self, path: str, size: int, files: int) -> None:
        self.path = path
        self.size = size
        self.files = files
        self.fd = -1
        self.used = 0
        self.dropped = 0

    def write(self, data: bytes) -> None:
        """Append, rotating before the file grows beyond its size; what cannot be written is dropped."""
        try:
            if self.dropped and self.fd >= 0:
                note = b"\n[%d bytes of output were dropped here: the log could not be written]\n" % self.dropped
                self.dropped = 0
                self._put(note)
            self._put(data)
        except OSError:
            self.dropped += len(data)
            self.close()

    def _put(self, data: bytes) -> None:
        view = memoryview(data)
        while view:
            if self.fd >= 0 and self.used >= self.size:
                self._rotate()
            if self.fd < 0:
                self.fd = os.open(self.path, FLAGS, 0o600)
                self.used = os.fstat(self.fd).st_size
                continue
            done = os.write(self.fd, view[: max(1, self.size - self.used)])
            self.used += done
            view = view[done:]

    def _rotate(self) -> None:
        self.close()
        if self.files == 1:
            os.truncate(self.path, 0)
        for number in range(self.files - 1, 0, -1):
            older = f"{self.path}.{number}"
            newer = f"{self.path}.{number - 1}" if number > 1 else self.path
            try:
                os.rename(newer, older)
            except FileNotFoundError:
                pass

    def close(self) -> None:
        """Close the file; the next write opens it again."""
        if self.fd >= 0:
            os.close(self.fd)
            self.fd = -1
