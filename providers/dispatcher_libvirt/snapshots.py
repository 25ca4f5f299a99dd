"""Data disks as they were before changes of the image: listing them, and going back.  Touches files only.

The overlay of an earlier image needs nothing: naming that image in the configuration again takes it up again.
"""

from __future__ import annotations

import re
import secrets
from dataclasses import dataclass
from pathlib import Path

from dispatcher.plugin import NotFound
from dispatcher_libvirt.disks import BOOTED, DATA, SNAPSHOTS

_NAME = re.compile(r"data-([0-9a-f]{12})\.raw")


@dataclass(frozen=True, slots=True, kw_only=True)
class Snapshot:
    """One kept data disk.

    :ivar image: fingerprint of what the machine booted with it; :ivar time: Unix time of its last change.
    :ivar taken: bytes that it takes on the host's disk.
    """

    name: str
    image: str
    time: float
    taken: int


def found(directory: Path) -> list[Snapshot]:
    """Return the snapshots in a machine's directory, newest first."""
    snapshots = []
    folder = directory / SNAPSHOTS
    for path in folder.iterdir() if folder.is_dir() else ():
        if match := _NAME.fullmatch(path.name):
            status = path.stat()
            snapshots.append(
                Snapshot(name=path.name, image=match[1], time=status.st_ctime, taken=status.st_blocks * 512)
            )
    return sorted(snapshots, key=lambda one: one.time, reverse=True)


def restore(directory: Path, name: str) -> str:
    """Put a snapshot in the data disk's place, and the data disk among the snapshots; return its name there.

    Nothing is lost: going back again undoes it.  The machine must not exist.

    :raises NotFound: there is no such snapshot, or no data disk.
    """
    folder, data = directory / SNAPSHOTS, directory / DATA
    match = _NAME.fullmatch(name)
    if match is None or not (folder / name).is_file() or not data.is_file():
        raise NotFound(
            f"There is no snapshot {name} in {directory}",
            fix=f"see `python -m dispatcher_libvirt snapshots {directory}`",
        )
    marker = directory / BOOTED
    current = marker.read_text(encoding="ascii").strip() if marker.is_file() else ""
    kept = f"data-{current if re.fullmatch('[0-9a-f]{12}', current) else secrets.token_hex(6)}.raw"
    aside = folder / f".{secrets.token_hex(4)}.new"
    # Two renames; between them both disks are there under other names than their own, and none is lost.
    data.rename(aside)
    (folder / name).rename(data)
    aside.rename(folder / kept)
    marker.write_text(match[1], encoding="ascii")
    return kept
