"""Data between a machine's disk and the canonical directory, without starting the machine.

Touches files and sandboxed processes.  Out: the disk's journal is replayed, then `unpack` reads it, both as the
agent's own user in the sandbox.  In: a new disk is filled by mke2fs and takes the old one's place when whole.
"""

from __future__ import annotations

import os
from pathlib import Path

from dispatcher.plugin import Deadline, NotFound, Progress, ProviderError, printable
from dispatcher_libvirt import sandbox
from dispatcher_libvirt.disks import IMAGE, Disks, User
from dispatcher_libvirt.options import MIB
from dispatcher_libvirt.sandbox import Bind
from dispatcher_libvirt.unpack import LARGEST_FACTOR

_OUTPUT = "/out"


def export(
    disks: Disks,
    name: str,
    user: User,
    directory: Path,
    *,
    privileged: bool,
    deadline: Deadline,
    progress: Progress,
) -> None:
    """Copy a data disk's content into an empty directory, which becomes the agent user's.

    :raises NotFound: there is no data disk; :raises ProviderError: it cannot be read whole.
    """
    path = disks.data(name)
    if not path.exists():
        raise NotFound(f"{printable(name)} has no data disk", fix="start the agent once, or import data")
    if any(directory.iterdir()):
        raise ProviderError(f"{directory} is not empty", fix="export into an empty directory")
    fraction = 0.0

    def tick() -> None:
        progress("exporting", "", fraction)

    disks.repair(name, user, deadline=deadline, tick=tick)
    owner = user or (os.geteuid(), os.getegid())
    if privileged:
        os.chown(directory, *owner, follow_symlinks=False)
    last = ""

    def line(text: str) -> None:
        nonlocal fraction, last
        word, _, rest = text.partition(" ")
        if word == "progress":
            fraction = float(rest)
        else:
            last = text

    argv, binds = sandbox.python("unpack.py")
    result = sandbox.run(
        [*argv, IMAGE, _OUTPUT, str(owner[0]), str(owner[1])],
        binds=[
            *binds,
            Bind(source=path, target=IMAGE),
            Bind(source=directory, target=_OUTPUT, writable=True),
        ],
        user=user if privileged else None,
        deadline=deadline,
        tick=tick,
        line=line,
        file_size=path.stat().st_size * LARGEST_FACTOR,
    )
    if result.code or not last.startswith("done "):
        raise ProviderError(
            f"The data disk of {printable(name)} could not be read whole",
            why=last.removeprefix("error ") or result.last_line,
            fix="start the agent and look, restore a snapshot, or see that there is space for the copy",
        )


def bring(
    disks: Disks, name: str, user: User, directory: Path, size: int, *, deadline: Deadline, progress: Progress
) -> None:
    """Replace a data disk's content by a copy of a directory; the disk grows where it must.

    :param size: bytes that the disk shall have; :raises ProviderError: the data needs more.
    """
    needed = count = 0
    for folder, folders, files in os.walk(directory):
        count += len(folders) + len(files)
        for file in files:
            try:
                needed += os.lstat(os.path.join(folder, file)).st_blocks * 512
            except FileNotFoundError:
                continue
        progress("importing", "measuring")
    if needed > size:
        raise ProviderError(
            "The data does not fit on the data disk",
            why=f"it takes {-(-needed // MIB)} MiB, the disk has {size // MIB}",
            fix="raise the app's disk limit",
        )
    disks.make_directory(name)
    disks.fill_data(
        name,
        directory,
        size,
        user,
        files=count,
        deadline=deadline,
        tick=lambda: progress("importing", "copying"),
    )
