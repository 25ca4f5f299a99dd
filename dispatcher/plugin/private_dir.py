"""Private directories in a place where every user can write, such as /dev/shm.

Another user can take a name first, with a directory or a link.  So a directory is used only if it belongs to this
user and is not a link; where the plain name is taken, a directory with a random suffix is made.
"""

from __future__ import annotations

import logging
import os
import stat
import tempfile
from pathlib import Path

from dispatcher.plugin.errors import ProviderError

_log = logging.getLogger("dispatcher.plugin.private_dir")


def owned(parent: Path, stem: str) -> list[Path]:
    """Return this user's directories called `stem`, or `stem-` and a random suffix; the plain one first.

    :param parent: a directory that is sticky or belongs to this user, so that others cannot rename its entries.
    """
    candidates = [parent / stem, *sorted(parent.glob(f"{stem}-*"))]
    return [path for path in candidates if _is_own(path)]


def make_owned(parent: Path, stem: str, mode: int) -> Path:
    """Return this user's directory, made if there is none.

    :raises ProviderError: it cannot be made.
    """
    path = next(iter(owned(parent, stem)), None)
    try:
        if path is None:
            path = parent / stem
            try:
                path.mkdir(mode=0o700)
            except FileExistsError:
                path = Path(tempfile.mkdtemp(prefix=f"{stem}-", dir=parent))
                _log.warning("another user made %s, using %s", parent / stem, path)
        if stat.S_IMODE(path.lstat().st_mode) != mode:
            path.chmod(mode)
    except OSError as error:
        raise ProviderError(f"Cannot make a directory in {parent}", why=error.strerror or str(error)) from error
    return path


def _is_own(path: Path) -> bool:
    try:
        found = path.lstat()
    except OSError:
        return False
    return stat.S_ISDIR(found.st_mode) and found.st_uid == os.geteuid() and not found.st_mode & 0o022
