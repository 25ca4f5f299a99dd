"""Which manager the command line talks to.  Reads the environment and at most one TOML file.

In order: ``--manager``, $DISPATCHER_MANAGER, ``manager.run_dir`` of the configuration, this user's own
run directory, the system's.
"""

from __future__ import annotations

import os
from pathlib import Path

from dispatcher.config import defaults
from dispatcher.plugin.errors import BadRequest, ConfigError, ManagerUnreachable

ADMIN_PORT = 4443
SYSTEM_RUN_DIR = Path("/run/dispatcher")


def manager_url(*, given: str | None, config: Path | None, tls: bool) -> str:
    """Return the URL of the manager: ``unix:///PATH``, ``https://HOST:PORT`` or ``http://HOST:PORT``.

    :param given: what ``--manager`` or the environment says; a bare ``HOST[:PORT]`` and a path will do.
    :param config: what ``--config`` says.
    :param tls: whether a bare ``HOST`` means HTTPS.
    :raises BadRequest: `given` is none of these; :raises ConfigError: the configuration cannot be read.
    """
    if given:
        return _normal(given, tls=tls)
    return f"unix://{_run_dir(config) / defaults.MANAGER_SOCKET}"


def _normal(given: str, *, tls: bool) -> str:
    scheme, separator, rest = given.partition("://")
    if not separator:
        if given.startswith("/"):
            return f"unix://{given}"
        scheme, rest = "https" if tls else "http", given
    rest = rest.rstrip("/") if scheme != "unix" else rest
    if (scheme == "unix" and rest.startswith("/")) or (scheme in {"http", "https"} and rest and "/" not in rest):
        if scheme != "unix" and not rest.rpartition(":")[2].isdigit():
            rest += f":{ADMIN_PORT}"
        return f"{scheme}://{rest}"
    raise BadRequest(
        f"Bad address of the manager {given!r}", fix="use unix:///PATH/manager.sock or https://HOST:4443"
    )


def _run_dir(config: Path | None) -> Path:
    if chosen := _configured(config):
        return chosen
    own = defaults.run_dir()
    if (own / defaults.MANAGER_SOCKET).exists() or not (SYSTEM_RUN_DIR / defaults.MANAGER_SOCKET).exists():
        _check_owner(own)
        return own
    return SYSTEM_RUN_DIR


def _configured(config: Path | None) -> Path | None:
    """Return ``manager.run_dir`` of the file, read without the models."""
    path = config or defaults.config_file()
    if not path.exists():
        if config is not None or os.environ.get("DISPATCHER_CONFIG"):
            raise ConfigError(f"Cannot read {path}", why="there is no such file", fix="check --config")
        return None
    import sys

    if sys.version_info >= (3, 11):
        import tomllib
    else:
        import tomli as tomllib
    try:
        found = tomllib.loads(path.read_text(encoding="utf-8")).get("manager", {}).get("run_dir")
    except PermissionError as error:
        if config is None:
            return None  # the system's file, closed to this user, says nothing to a client
        raise ConfigError(f"Cannot read {path}", why=error.strerror or str(error)) from error
    except (OSError, ValueError, AttributeError) as error:
        raise ConfigError(
            f"Cannot read {path}", why=str(error), fix=f"dispatcher --config {path} config check"
        ) from error
    return Path(found).absolute() if isinstance(found, str) else None


def _check_owner(directory: Path) -> None:
    """Refuse a directory that somebody else made under /tmp in this user's name: it would get passwords."""
    try:
        owner = directory.stat().st_uid
    except OSError:
        return
    if owner not in {0, os.geteuid()}:
        raise ManagerUnreachable(
            f"Will not talk to a manager in {directory}",
            why=f"the directory belongs to user id {owner}",
            fix="remove it, or set XDG_RUNTIME_DIR",
        )
