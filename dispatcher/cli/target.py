"""Find the manager for the command line.

In order: ``--manager``, $DISPATCHER_MANAGER, ``manager.run_dir`` of the configuration, this user's own
run directory, the system's.
"""

from __future__ import annotations

import os
from pathlib import Path

from dispatcher.config import defaults
from dispatcher.plugin.errors import ConfigError

SYSTEM_RUN_DIR = Path("/run/dispatcher")


def manager_url(*, given: str | None, config: Path | None, tls: bool) -> str:
    """Return the URL of the manager: ``unix:///PATH``, ``https://HOST:PORT`` or ``http://HOST:PORT``.

    The client checks whether it can be used.

    :param given: the value of ``--manager`` or the environment; a bare ``HOST[:PORT]`` or a path is completed.
    :param config: the value of ``--config``.
    :param tls: whether a bare ``HOST`` means HTTPS.
    :raises ConfigError: the configuration cannot be read.
    """
    if given:
        if given.startswith("/"):
            return f"unix://{given}"
        given = given.rstrip("/")
        return given if ":/" in given else f"{'https' if tls else 'http'}://{given}"
    return f"unix://{_run_dir(config) / defaults.MANAGER_SOCKET}"


def _run_dir(config: Path | None) -> Path:
    if chosen := _configured(config):
        return chosen
    own = defaults.run_dir()
    if (own / defaults.MANAGER_SOCKET).exists() or not (SYSTEM_RUN_DIR / defaults.MANAGER_SOCKET).exists():
        return own
    return SYSTEM_RUN_DIR


def _configured(config: Path | None) -> Path | None:
    """Return ``manager.run_dir`` of the configuration, read without its models, which are slow to import."""
    path = config or defaults.config_file()
    if not path.exists():
        if config is not None or os.environ.get("DISPATCHER_CONFIG"):
            raise ConfigError(f"Cannot read {path}", why="the file does not exist", fix="check --config")
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
            return None  # the system's file, which this user may not read
        raise ConfigError(f"Cannot read {path}", why=error.strerror or str(error)) from error
    except (OSError, ValueError, AttributeError) as error:
        raise ConfigError(
            f"Cannot read {path}", why=str(error), fix=f"dispatcher --config {path} config check"
        ) from error
    return Path(found).absolute() if isinstance(found, str) else None
