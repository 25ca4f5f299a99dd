"""Maintenance of machines on the host: `python -m dispatcher_libvirt`.  Touches files and asks libvirt.

    python -m dispatcher_libvirt snapshots DIRECTORY
    python -m dispatcher_libvirt rollback DIRECTORY [SNAPSHOT]

DIRECTORY is a machine's, below ``providers/libvirt/machines`` of the manager's state directory.
"""

from __future__ import annotations

import sys
import time
from pathlib import Path

import click

from dispatcher.plugin import Conflict, Deadline, DispatcherError, NotFound
from dispatcher_libvirt import snapshots
from dispatcher_libvirt.connection import Backend

_PATIENCE = 20.0
_DIRECTORY = click.Path(exists=True, file_okay=False, path_type=Path)


@click.group(help="Look after the disks of the provider libvirt's machines.")
def main() -> None:
    """Group of the commands."""


@main.command("snapshots")
@click.argument("directory", type=_DIRECTORY)
def list_(directory: Path) -> None:
    """List what is kept from before changes of a machine's image."""
    for one in snapshots.found(directory):
        when = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(one.time))
        click.echo(f"{one.name}  {when}  {one.taken / 1024**2:.1f} MiB")


@main.command()
@click.argument("directory", type=_DIRECTORY)
@click.argument("snapshot", default="")
@click.option("--uri", default="qemu:///system", show_default=True, help="where the machine would run")
def rollback(directory: Path, snapshot: str, uri: str) -> None:
    """Go back to a kept data disk (the newest by default); the present one is kept in its place."""
    directory = directory.absolute()
    _at_rest(directory.name, uri)
    known = snapshots.found(directory)
    if not known:
        raise NotFound(f"There are no snapshots in {directory}", fix="set snapshots in the app's libvirt table")
    kept = snapshots.restore(directory, snapshot or known[0].name)
    click.echo(f"The data disk is {snapshot or known[0].name}; what it was is kept as {kept}")


def _at_rest(name: str, uri: str) -> None:
    """Refuse to work on the disk of a machine that runs or sleeps.

    :raises Conflict: it does; :raises Unavailable: libvirt does not say.
    """
    backend = Backend(uri, connections=1, keepalive=5)
    try:
        names = backend.call(
            lambda connection: {domain.name() for domain in connection.listAllDomains()},
            what="asking for the machine",
            deadline=Deadline(_PATIENCE),
        )
    finally:
        backend.close()
    if name in names:
        raise Conflict(f"The disk is in use: the machine {name} exists", fix="stop the agent first")


def run() -> int:
    """Run the program; errors are one line and an exit code."""
    try:
        main(standalone_mode=False)
    except click.exceptions.Exit as done:
        return done.exit_code
    except click.ClickException as error:
        error.show()
        return error.exit_code
    except click.Abort:
        return 1
    except DispatcherError as error:
        click.echo(f"dispatcher_libvirt: {error}", err=True)
        return error.exit_code
    return 0


if __name__ == "__main__":
    sys.exit(run())
