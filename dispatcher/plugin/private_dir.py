"""Directories of one's own where everybody may write, such as /dev/shm: nobody's trap is used or even touched.

Somebody else may take a name before it is needed: with a directory, or with a link to a place where the names that
are looked for exist and belong to others.  So a directory counts only if it is none of that, and where the plain
name is taken, one with a random ending is made beside it.  Touches the file system.
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
    """Return this user's directories called `stem`, or `stem-` and a random ending; the plain one first.

    :param parent: where others can neither rename nor remove what is not theirs (it is sticky, or this user's).
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
                _log.warning("somebody else made %s, using %s", parent / stem, path)
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
