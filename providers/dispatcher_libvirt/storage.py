"""Where machines' disks are: what `Starter` and the provider need of it, and files of this host that provide it.

Touches files through `Disks`, `Images` and `seed`.  `pool` does the same on another host.
"""

from __future__ import annotations

import contextlib
import logging
import secrets
import threading
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from dispatcher.plugin import (
    AgentSpec,
    App,
    Deadline,
    DispatcherError,
    Handle,
    Progress,
    ProviderContext,
    ProviderError,
)
from dispatcher_libvirt import console, images, plan, seed, transfer
from dispatcher_libvirt.disks import BOOTED, Disks, User
from dispatcher_libvirt.images import Images, Reader
from dispatcher_libvirt.options import SMALLEST_DISK, Options, disk_of, options_of

_log = logging.getLogger("dispatcher.plugin.provider.libvirt")


@dataclass
class Made:
    """What a start has made so far, and a failure removes again."""

    directory: bool = False
    data: bool = False
    root: Path | None = None


class Storage(Protocol):
    """The disks of one installation's machines.  Paths are those of QEMU's host."""

    def check(self, app: App, reader: Reader | None, deadline: Deadline, progress: Progress) -> None:
        """Look at what an app boots from.

        :param reader: the user as whom QEMU reads it, None where libvirt makes it readable.
        :raises ProviderError: something is missing, unreadable, damaged or of another format.
        """

    def make(
        self, spec: AgentSpec, made: Made, deadline: Deadline, progress: Progress
    ) -> tuple[Path | None, Path]:
        """Make (or grow, or mend) the disks of a machine that is not there; return root and data disk."""

    def undo(self, name: str, made: Made, deadline: Deadline) -> None:
        """Remove what a start that failed has made."""

    def write_seed(self, spec: AgentSpec, files: dict[str, bytes], deadline: Deadline) -> Path:
        """Write a machine's seed disk."""

    def keep_seed(self, handle: Handle, deadline: Deadline) -> None:
        """See that a machine that wakes up finds a disk where its seed disk was."""

    def begin_log(self, spec: AgentSpec) -> Path | None:
        """Mark in the log that a machine starts; return the file for its console, None where there can be none."""

    def remove_seed(self, name: str, deadline: Deadline) -> None:
        """Remove a seed disk.  Absent is success."""

    def remove(self, name: str, *, data: bool, deadline: Deadline) -> None:
        """Remove a machine's disks, its data only when told so.  Absent is success."""

    def export(self, handle: Handle, directory: Path, deadline: Deadline, progress: Progress) -> None:
        """See `Provider.export_data`; the machine is at rest."""

    def bring(self, handle: Handle, directory: Path, deadline: Deadline, progress: Progress) -> None:
        """See `Provider.import_data`; the machine is at rest."""


class LocalStorage:
    """Files of this host."""

    def __init__(self, context: ProviderContext, options: Options) -> None:
        self._context = context
        self.disks = Disks(
            options.storage or context.state_dir / "machines",
            own=None if options.storage else context.state_dir,
            privileged=context.privileged,
        )
        self._images = Images()
        self._seeds = threading.Lock()

    def check(self, app: App, reader: Reader | None, deadline: Deadline, progress: Progress) -> None:
        """See `Storage`."""
        options = options_of(app)
        self.disks.prepare()
        if reader is not None and (command := images.passable(self.disks.top / "x", reader)):
            raise ProviderError(
                f"Machines cannot reach their disks in {self.disks.top}",
                why=f"their QEMU runs as user {reader.uid}, and a directory above does not let it pass",
                fix=command,
            )
        self._images.check(options, reader, deadline=deadline, tick=lambda: progress("checking the image"))

    def make(
        self, spec: AgentSpec, made: Made, deadline: Deadline, progress: Progress
    ) -> tuple[Path | None, Path]:
        """See `Storage`."""
        name = spec.backend_name
        user = (spec.uid, spec.gid) if self._context.privileged else None
        made.directory = self.disks.make_directory(name)
        root = self._root(spec, user, made, deadline, progress)
        self._data(spec, user, made, deadline, progress)
        return root, self.disks.data(name)

    def undo(self, name: str, made: Made, deadline: Deadline) -> None:
        """See `Storage`."""
        try:
            self.remove_seed(name, deadline)
            if made.root is not None:
                made.root.unlink(missing_ok=True)
            if made.data or made.directory:
                self.disks.remove(name, data=True)
        except (DispatcherError, OSError) as error:
            _log.warning("%s: what a failed start left: %s", name, error)

    def write_seed(self, spec: AgentSpec, files: dict[str, bytes], deadline: Deadline) -> Path:
        """See `Storage`; it lies in memory."""
        with self._seeds:
            path = self._seed_path(spec.backend_name)
            seed.write(path, seed.image(files), (spec.uid, spec.gid) if self._context.privileged else None)
        return path

    def keep_seed(self, handle: Handle, deadline: Deadline) -> None:
        """See `Storage`."""
        with self._seeds:
            seed.placeholder(self._seed_path(handle.name), self._user(handle))

    def begin_log(self, spec: AgentSpec) -> Path | None:
        """See `Storage`."""
        try:
            console.begin(spec.log_dir)
        except OSError as error:
            raise ProviderError(
                f"The log in {spec.log_dir} cannot be written",
                why=error.strerror or str(error),
                fix="see that the disk has space and that the directory is the manager's",
            ) from error
        return spec.log_dir / console.NAME

    def remove_seed(self, name: str, deadline: Deadline) -> None:
        """See `Storage`; the directory goes with the last one."""
        with self._seeds:
            path = self._seed_path(name)
            path.unlink(missing_ok=True)
            with contextlib.suppress(OSError):  # not the last one
                path.parent.rmdir()

    def remove(self, name: str, *, data: bool, deadline: Deadline) -> None:
        """See `Storage`."""
        self.disks.remove(name, data=data)

    def export(self, handle: Handle, directory: Path, deadline: Deadline, progress: Progress) -> None:
        """See `Storage`."""
        user = self._user(handle)
        if self.disks.data(handle.name).exists():
            self.disks.claim(handle.name, user)
        privileged = self._context.privileged
        transfer.export(
            self.disks, handle.name, user, directory, privileged=privileged, deadline=deadline, progress=progress
        )

    def bring(self, handle: Handle, directory: Path, deadline: Deadline, progress: Progress) -> None:
        """See `Storage`."""
        known = self.disks.data(handle.name)
        size = max(plan.size_of(handle), known.stat().st_size if known.exists() else SMALLEST_DISK)
        user = self._user(handle)
        transfer.bring(self.disks, handle.name, user, directory, size, deadline=deadline, progress=progress)

    # -- parts -------------------------------------------------------------------------------------------

    def _user(self, handle: Handle) -> User:
        return plan.user_of(handle) if self._context.privileged else None

    def _seed_path(self, name: str) -> Path:
        return seed.memory_directory(self._context.installation, self._context.run_dir) / f"{name}.iso"

    def _data(self, spec: AgentSpec, user: User, made: Made, deadline: Deadline, progress: Progress) -> None:
        name, size = spec.backend_name, disk_of(spec.app)
        full = options_of(spec.app).data_allocation == "full"
        tick = lambda: progress("making the disks", "data")  # noqa: E731
        if not self.disks.data(name).exists():
            self.disks.create_data(name, size, user, full=full, deadline=deadline, tick=tick)
            made.data = True
        else:
            self.disks.claim(name, user)
            self.disks.grow_data(name, size, user, full=full, deadline=deadline, tick=tick)
            self.disks.repair(name, user, deadline=deadline, tick=tick)

    def _root(
        self, spec: AgentSpec, user: User, made: Made, deadline: Deadline, progress: Progress
    ) -> Path | None:
        """Return the overlay of the app's base image; before it changes, keep what was."""
        name, options = spec.backend_name, options_of(spec.app)
        tick = lambda: progress("making the disks", "snapshot")  # noqa: E731
        base, boots = self._images.check(options, None, deadline=deadline, tick=tick)
        marker = self.disks.directory(name) / BOOTED
        before = marker.read_text(encoding="ascii").strip() if marker.exists() else ""
        if before and before != boots and self.disks.data(name).exists():
            self.disks.claim(name, user)
            self.disks.snapshot(name, before, options.snapshots, deadline=deadline, tick=tick)
        path = None
        if options.image is not None:
            known = self.disks.roots(name)
            if options.root == "fresh" and base in known:
                known.pop(base).unlink()
            path = self.disks.create_root(name, base, options.image, options.format, user)
            if base not in known:
                made.root = path
            self.disks.forget_roots(name, base, options.snapshots)
        with self.disks.errors("making a machine's directory"):
            temporary = marker.with_name(f".{secrets.token_hex(4)}.new")
            temporary.write_text(boots, encoding="ascii")
            temporary.replace(marker)
        return path
