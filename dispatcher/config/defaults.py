"""Where things are when nothing says otherwise.  Reads the environment; imports nothing heavy.

The command line's client commands find the manager with this module alone, as the configuration's models cost
more time than all the rest of such a command.
"""

from __future__ import annotations

import os
from pathlib import Path

SYSTEM_CONFIG = Path("/etc/dispatcher/dispatcher.toml")
MANAGER_SOCKET = "manager.sock"
MANAGER_LOCK = "manager.lock"  # beside it, held by a manager from its first to its last moment


def config_file() -> Path:
    """Return where the configuration is looked for: $DISPATCHER_CONFIG, else the usual place for this user."""
    if path := os.environ.get("DISPATCHER_CONFIG"):
        return Path(path)
    if os.geteuid() == 0:
        return SYSTEM_CONFIG
    return Path(os.environ.get("XDG_CONFIG_HOME") or Path.home() / ".config") / "dispatcher/dispatcher.toml"


def run_dir() -> Path:
    """Return the default of ``manager.run_dir``."""
    if os.geteuid() == 0:
        return Path("/run/dispatcher")
    return Path(os.environ.get("XDG_RUNTIME_DIR") or f"/tmp/dispatcher-{os.geteuid()}") / "dispatcher"  # noqa: S108 - manager and client check its owner


def state_dir() -> Path:
    """Return the default of ``manager.state_dir``."""
    if os.geteuid() == 0:
        return Path("/var/lib/dispatcher")
    return Path(os.environ.get("XDG_STATE_HOME") or Path.home() / ".local/state") / "dispatcher"
