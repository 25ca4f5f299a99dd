"""Run a command as an ordinary user: `python tests/support/ordinary.py UID HOME COMMAND...` (as root).

The interpreter and the clone may lie below a directory that only root may enter.  In a mount namespace of its own such a
directory is replaced by a copy that everybody may pass; nothing outside changes.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from pathlib import Path


def open_up(path: Path) -> None:
    """Make every parent of `path` passable, in this mount namespace alone."""
    for parent in [*reversed(path.parents), path]:
        if not parent.is_dir() or parent.stat().st_mode & 0o001:
            continue
        stash = tempfile.mkdtemp(prefix="stash-")
        mount("--bind", parent, stash)
        mount("-t", "tmpfs", "-o", "mode=755", "tmpfs", parent)
        for child in Path(stash).iterdir():
            target = parent / child.name
            if child.is_symlink():
                target.symlink_to(child.readlink())
                continue
            if child.is_dir():
                target.mkdir()
            else:
                target.touch()
            mount("--bind", child, target)


def mount(*arguments: object) -> None:
    subprocess.run(["mount", *map(str, arguments)], check=True)


def main() -> None:
    uid, home, *command = sys.argv[1:]
    subprocess.run(["mount", "--make-rprivate", "/"], check=True)
    for path in {Path(sys.base_prefix), Path(sys.prefix), Path(__file__).resolve().parent.parent.parent}:
        open_up(path)
    os.setgroups([])
    os.setresgid(int(uid), int(uid), int(uid))
    os.setresuid(int(uid), int(uid), int(uid))
    keep = {name: value for name, value in os.environ.items() if name in {"PATH", "LANG", "TERM"}}
    keep |= {"HOME": home, "XDG_RUNTIME_DIR": f"{home}/run"}
    os.chdir(home)
    os.execvpe(command[0], command, keep)


def command(uid: int, home: Path, *arguments: str) -> list[str]:
    """Return the command line that does all this."""
    return ["unshare", "--mount", sys.executable, __file__, str(uid), str(home), *arguments]


if __name__ == "__main__":
    main()
