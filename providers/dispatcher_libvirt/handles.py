"""Handles of machines: enough to find a machine, its disks and its logs again."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from dispatcher.plugin import AgentSpec, Handle
from dispatcher_libvirt.options import disk_of, options_of

PROVIDER = "libvirt"


def handle_of(spec: AgentSpec, *, remote: bool) -> Handle:
    """Return an agent's handle.

    :param remote: the machine runs on another host: there are no logs, and a tunnel ends at the agent's socket.
    """
    data: dict[str, Any] = {
        "uid": spec.uid,
        "gid": spec.gid,
        "disk": disk_of(spec.app),
        "flush": options_of(spec.app).flush,
    }
    data |= {"socket": str(spec.socket), "proxy": spec.proxy_gid} if remote else {"logs": str(spec.log_dir)}
    return Handle(provider=PROVIDER, agent=spec.agent, name=spec.backend_name, data=data)


def log_dir_of(handle: Handle) -> Path | None:
    """Return the log directory, None without one."""
    value = handle.data.get("logs")
    return Path(value) if isinstance(value, str) and value.startswith("/") else None


def disk_size_of(handle: Handle) -> int:
    """Return the configured size of the data disk in bytes, 0 where the handle does not contain it."""
    value = handle.data.get("disk")
    return value if isinstance(value, int) else 0


def user_of(handle: Handle) -> tuple[int, int] | None:
    """Return the host user and group of the agent."""
    uid, gid = handle.data.get("uid"), handle.data.get("gid")
    return (uid, gid) if isinstance(uid, int) and isinstance(gid, int) else None
