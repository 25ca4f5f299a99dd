"""Export and import of an agent's data: between the data disk and a directory, without starting the machine.

Export replays the disk's journal and runs `ext4_tool`, both as the agent's user in the sandbox.  Import fills a
new disk with mke2fs, which replaces the old one when it is complete.
"""

from __future__ import annotations

import os
from pathlib import Path

from dispatcher.plugin import Deadline, NotFound, Progress, ProviderError, printable
from dispatcher_libvirt import sandbox
from dispatcher_libvirt.disks import IMAGE, Disks, User
from dispatcher_libvirt.ext4_tool import MAX_SPARSENESS
from dispatcher_libvirt.options import MIB
from dispatcher_libvirt.sandbox import Bind

_OUTPUT = "/out"


def no_data_disk(name: str) -> NotFound:
    """Return the error for an agent without a data disk."""
    return NotFound(f"{printable(name)} has no data disk", fix="start the agent once, or import data")


def export_data(
    disks: Disks,
    name: str,
    user: User,
    directory: Path,
    *,
    privileged: bool,
    deadline: Deadline,
    progress: Progress,
) -> None:
    """Copy the content of a data disk into an empty directory, which then belongs to the agent's user.

    :raises NotFound: there is no data disk; :raises ProviderError: it is not completely readable.
    """
    path = disks.data(name)
    if not path.exists():
        raise no_data_disk(name)
    if any(directory.iterdir()):
        raise ProviderError(f"{directory} is not empty", fix="export into an empty directory")
    fraction, last = 0.0, ""

    def tick() -> None:
        progress("exporting", "", fraction)

    def line(text: str) -> None:
        nonlocal fraction, last
        word, _, rest = text.partition(" ")
        if word == "progress":
            fraction = float(rest)
        else:
            last = text

    disks.repair(name, user, deadline=deadline, tick=tick)
    owner = user or (os.geteuid(), os.getegid())
    if privileged:
        os.chown(directory, *owner, follow_symlinks=False)
    argv, binds = sandbox.python("ext4_tool.py")
    result = sandbox.run(
        [*argv, "unpack", IMAGE, _OUTPUT, str(owner[0]), str(owner[1])],
        binds=[
            *binds,
            Bind(source=path, target=IMAGE),
            Bind(source=directory, target=_OUTPUT, writable=True),
        ],
        user=user if privileged else None,
        deadline=deadline,
        tick=tick,
        line=line,
        file_size=path.stat().st_size * MAX_SPARSENESS,
    )
    if result.code or not last.startswith("done "):
        raise ProviderError(
            f"The data disk of {printable(name)} is not completely readable",
            why=last.removeprefix("error ") or result.last_line,
            fix="start the agent and check, restore a snapshot, or provide more space for the copy",
        )


def import_data(
    disks: Disks, name: str, user: User, directory: Path, size: int, *, deadline: Deadline, progress: Progress
) -> None:
    """Replace the content of a data disk by a copy of a directory; the disk grows where necessary.

    :param size: of the disk in bytes; :raises ProviderError: the data needs more.
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
    tick = lambda: progress("importing", "copying")  # noqa: E731
    disks.fill_data(name, directory, size, user, files=count, deadline=deadline, tick=tick)
