"""What `doctor` looks at beside this installation: others on this host whose agents get the same user ids.

Reads /proc and the configurations that running managers were given; changes nothing.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

from dispatcher.cli.checks.machine import warning
from dispatcher.config import defaults
from dispatcher.config.load import Config, load
from dispatcher.plugin.errors import ConfigError
from dispatcher.plugin.model import Finding


def user_ids(config: Config, proc: Path = Path("/proc")) -> Iterator[Finding]:
    """Warn of each other manager of root that runs and takes agents' user ids from the same range.

    Two agents with one user id could reach each other's files and sockets.
    """
    first, last = config.manager.uid_range
    own = config.manager.run_dir.absolute()
    for path, other in managers(proc):
        low, high = max(first, other.manager.uid_range[0]), min(last, other.manager.uid_range[1])
        if other.manager.run_dir.absolute() != own and low <= high:
            yield warning(
                f"another installation on this host ({path}) gives its agents user ids of the same range,"
                f" {low} to {high}",
                "give each installation a manager.uid_range of its own, before it has agents",
            )


def managers(proc: Path) -> Iterator[tuple[Path, Config]]:
    """Yield the configuration of each manager that runs as our own user (root), with its path, each file once."""
    seen = set()
    for process in sorted(proc.glob("[0-9]*")):
        try:
            if process.stat().st_uid != os.geteuid():
                continue
            path = _configuration(process)
            if path is None or path in seen:
                continue
            seen.add(path)
            yield path, load(path) if path.exists() else Config()
        except (OSError, ConfigError):
            continue  # it has ended, or its file has gone or is being written


def _configuration(process: Path) -> Path | None:
    """Return the configuration that a manager was started with; None for any other process.

    :raises OSError: it has ended.
    """
    words = [word.decode("utf-8", "replace") for word in (process / "cmdline").read_bytes().split(b"\0")[:-1]]
    if not words or words[-1] != "manager" or not any(Path(word).name == "dispatcher" for word in words[:-1]):
        return None
    given = ""
    for at, word in enumerate(words):
        if word == "--config":
            given = words[at + 1]
        elif word.startswith("--config="):
            given = word.partition("=")[2]
    for entry in (process / "environ").read_bytes().split(b"\0"):
        if not given and entry.startswith(b"DISPATCHER_CONFIG="):
            given = os.fsdecode(entry.partition(b"=")[2])
    return (process / "cwd").resolve() / given if given else defaults.SYSTEM_CONFIG
