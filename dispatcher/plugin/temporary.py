"""An agent's directory for temporary files of any size, in its data: `/tmp` is in memory and small."""

from __future__ import annotations

import contextlib
import os
import subprocess
from pathlib import Path
from typing import Any

_DIRECTORY = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
_TIMEOUT = 30.0  # seconds to empty it


def make_temporary(path: Path, uid: int, gid: int) -> None:
    """Make the directory of an agent that does not run, or empty it.

    The agent can have put anything there: links are not followed, and files are removed with the agent's rights.
    What fails is left as it is: programs then use `/tmp`.
    """
    owner: dict[str, Any] = {"user": uid, "group": gid, "extra_groups": []} if os.geteuid() == 0 else {}
    with contextlib.suppress(OSError, subprocess.SubprocessError), contextlib.ExitStack() as stack:
        parent = os.open(path.parent, _DIRECTORY)
        stack.callback(os.close, parent)
        new = False
        with contextlib.suppress(FileExistsError):
            os.mkdir(path.name, 0o700, dir_fd=parent)
            new = True
        directory = os.open(path.name, _DIRECTORY, dir_fd=parent)
        stack.callback(os.close, directory)
        if new and owner:
            os.fchown(directory, uid, gid)
        elif os.listdir(directory):
            subprocess.run(
                ["find", ".", "-xdev", "-mindepth", "1", "-delete"],
                cwd=f"/proc/self/fd/{directory}",
                env={"PATH": os.environ.get("PATH", os.defpath)},
                stdin=subprocess.DEVNULL,
                capture_output=True,
                check=False,
                timeout=_TIMEOUT,
                **owner,
            )
