"""demo: a private installation with the built-in app and two users, removed at the end."""

from __future__ import annotations

import os
import secrets
import shlex
import socket
import stat
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import click

from dispatcher.cli.context import Cli, pass_cli
from dispatcher.plugin.errors import BadRequest, Conflict, DispatcherError
from dispatcher.plugin.tree_removal import remove_tree

if TYPE_CHECKING:
    from dispatcher.cli.serve import Daemons

USERS = ("alice", "bob")
PORT = 8080
MARKER = "made-by-dispatcher-demo"
_CONSONANTS, _VOWELS = "bdfghjklmnprstvz", "aeiou"


@click.command(epilog="\b\nExamples:\n  dispatcher demo\n  dispatcher demo --directory ./demo --keep")
@click.option(
    "--directory",
    type=click.Path(path_type=Path),
    metavar="DIR",
    help="Directory for all files; default: a temporary one.",
)
@click.option("--port", type=click.IntRange(1, 65535), help="Port; default: 8080, or the next free one.")
@click.option("--keep", is_flag=True, help="Do not delete the directory at the end.")
@pass_cli
def demo(cli: Cli, directory: Path | None, port: int | None, keep: bool) -> int:
    """Try dispatcher in a browser: run a demo app for the users alice and bob until Ctrl-C.

    Neither reads nor changes the configuration of this machine.
    """
    from dispatcher.cli.serve import Daemons, global_options
    from dispatcher.config.load import load

    with _home(directory, keep=keep) as (home, run_dir):
        path = _write_config(home, run_dir, port or _free_port())
        os.environ["DISPATCHER_CONFIG"] = str(path)
        daemons = Daemons(load(path), global_options(path), cli.out.note)

        def ready() -> None:
            _add_users(daemons)
            if keep:
                click.echo(f"Everything is kept in {home}")
            click.echo("Ctrl-C ends it")

        stopped = True

        def before_stop() -> None:
            nonlocal stopped
            stopped = _stop_agents(daemons, cli)

        code = daemons.run(ready, before_stop=before_stop)
    if code == 0:
        again = shlex.join(["dispatcher", "demo", "--keep", "--directory", str(home)])
        files = f"go on with `{again}`" if keep else "their files are removed"
        cli.out.note(f"{'manager, proxy and agents' if stopped else 'manager and proxy'} have ended; {files}")
    return code


def _add_users(daemons: Daemons) -> None:
    client = daemons.client()
    passwords = {name: pronounceable() for name in USERS}
    for name, password in passwords.items():
        try:
            client.create_agent(name, password)
        except Conflict:  # kept from an earlier demo
            client.set_password(name, password)
    client.close()
    daemons.say_where()
    for name, password in passwords.items():
        click.echo(f"Sign in {name} / {password}")


def _stop_agents(daemons: Daemons, cli: Cli) -> bool:
    """Stop the agents, which would outlive the manager; return whether all have stopped."""
    client = daemons.client()
    try:
        agents = [agent["name"] for agent in client.agents()["agents"]]
        for name in agents:
            client.set_state(name, "stopped")
        for name in agents:
            client.set_state(name, "stopped", wait=30.0)
    except DispatcherError as error:
        cli.out.note(f"agents may still run: {error}")
        return False
    finally:
        client.close()
    return True


@contextmanager
def _home(directory: Path | None, *, keep: bool) -> Iterator[tuple[Path, Path]]:
    """Yield the demo's directory and one for sockets, and remove both afterwards; with `keep` only the second.

    :raises BadRequest: `directory` contains other files, or is another user's.
    """
    if directory is None:
        home = Path(tempfile.mkdtemp(prefix="dispatcher-demo-"))
    else:
        home = directory.absolute()
        home.mkdir(parents=True, exist_ok=True)
        _check_own(home)
        if any(home.iterdir()) and not (home / MARKER).exists():
            raise BadRequest(
                f"{directory} is not empty", why="its files were not made by a demo", fix="name another directory"
            )
    (home / MARKER).touch()
    run_dir = Path(tempfile.mkdtemp(prefix="dispatcher-", dir="/tmp"))  # the path of a socket must be short
    for path in (home, run_dir):
        path.chmod(0o711)  # agents and the proxy access them with their own user ids
    try:
        yield home, run_dir
    finally:
        remove_tree(run_dir)
        if not keep:
            remove_tree(home)


def _check_own(directory: Path) -> None:
    """Refuse a directory of another user, whose links would lead this user's writing elsewhere.

    :raises BadRequest: it is not ours alone.
    """
    found = directory.lstat()
    if found.st_uid != os.geteuid() or stat.S_ISLNK(found.st_mode) or found.st_mode & stat.S_IWOTH:
        raise BadRequest(
            f"{directory} cannot be used",
            why="it is a link, belongs to another user, or is writable for all users, who could replace its files",
            fix="name a directory that does not exist yet",
        )


def _write_config(home: Path, run_dir: Path, port: int) -> Path:
    import tomli_w

    tables = {
        "manager": {"state_dir": str(home / "state"), "run_dir": str(run_dir), "log_level": "warning"},
        "proxy": {"listen": [f"127.0.0.1:{port}"], "log_level": "warning"},
    }
    path = home / "dispatcher.toml"
    path.write_text(f"# Made by `dispatcher demo`.\n{tomli_w.dumps(tables)}", encoding="utf-8")
    return path


def _free_port() -> int:
    for port in (*range(PORT, PORT + 20), 0):
        with socket.socket() as sock:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                sock.bind(("127.0.0.1", port))
            except OSError:
                continue
            return int(sock.getsockname()[1])
    raise AssertionError("port 0 can always be bound")


def pronounceable(syllables: int = 8) -> str:
    """Return a random password of pronounceable syllables: more than six bits each."""
    made = [secrets.choice(_CONSONANTS) + secrets.choice(_VOWELS) for _ in range(syllables)]
    half = syllables // 2
    return "".join(made[:half]) + "-" + "".join(made[half:])
