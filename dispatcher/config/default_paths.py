"""Default paths, from the environment.

Imports little: the client commands of the command line find the manager with this module, without loading the
configuration's models.
"""

from __future__ import annotations

import os
from pathlib import Path

from dispatcher.plugin.errors import ConfigError

SYSTEM_CONFIG = Path("/etc/dispatcher/dispatcher.toml")
MANAGER_SOCKET = "manager.sock"
MANAGER_LOCK = "manager.lock"  # beside it, locked while a manager runs
PROXY_LOCK = "proxy/proxy.lock"  # locked by the proxy

_kept: Path | None = None


def config_file() -> Path:
    """Return the path of the configuration: $DISPATCHER_CONFIG, else the default of this user."""
    if path := os.environ.get("DISPATCHER_CONFIG"):
        return Path(path)
    if _kept is not None:
        return _kept
    if os.geteuid() == 0:
        return SYSTEM_CONFIG
    return Path(os.environ.get("XDG_CONFIG_HOME") or _home() / ".config") / "dispatcher/dispatcher.toml"


def keep_config_file() -> None:
    """Let `config_file` return the same path when this process has changed its user."""
    global _kept
    _kept = config_file()


def unreadable(path: Path, error: OSError) -> ConfigError:
    """Return the error about a configuration file that cannot be read."""
    fix = f"name the file, such as {path / SYSTEM_CONFIG.name}" if isinstance(error, IsADirectoryError) else ""
    return ConfigError(f"Cannot read {path}", why=error.strerror or str(error), fix=fix)


def run_dir() -> Path:
    """Return the default of ``manager.run_dir``.

    $XDG_RUNTIME_DIR that `su` or `sudo` kept is another user's; without it, as in cron jobs, logind's is used.
    """
    uid = os.geteuid()
    if uid == 0:
        return Path("/run/dispatcher")
    given = os.environ.get("XDG_RUNTIME_DIR", "")
    if os.path.isabs(given) and _owner(given) in {uid, None}:
        return Path(given, "dispatcher")
    logind = f"/run/user/{uid}"
    return Path(logind if _owner(logind) == uid else f"/tmp/dispatcher-{uid}") / "dispatcher"  # noqa: S108 - manager and client check its owner


def _home() -> Path:
    try:
        return Path.home()
    except RuntimeError as error:
        raise ConfigError(
            "There is no home directory for the default paths",
            why=f"$HOME is not set, and the user id {os.geteuid()} has no entry in /etc/passwd",
            fix="set $HOME",
        ) from error


def _owner(path: str) -> int | None:
    """Return the user id of a directory's owner; None if it does not exist."""
    try:
        return os.stat(path).st_uid
    except FileNotFoundError:
        return None
    except OSError:
        return -1  # it is below another user's directory


def state_dir() -> Path:
    """Return the default of ``manager.state_dir``."""
    if os.geteuid() == 0:
        return Path("/var/lib/dispatcher")
    return Path(os.environ.get("XDG_STATE_HOME") or _home() / ".local/state") / "dispatcher"
