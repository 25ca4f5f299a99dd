"""Looks up the users and groups of this host that the configuration names."""

from __future__ import annotations

import contextlib
import grp
import os
import pwd
from dataclasses import dataclass
from pathlib import Path

from dispatcher.config.load import Config


@dataclass(frozen=True, slots=True, kw_only=True)
class HostAccounts:
    """User and group ids on this host.

    :ivar proxy_uid: user id of the proxy; :ivar proxy_gid: its group, which can connect to agents.
    :ivar admin_gid: group with access to manager.sock; None where it does not exist (then root only).
    :ivar agent_uids: first and last host user id for agents; None for an ordinary user (all are that user).
    :ivar delegated: ranges of ids that accounts of this host may use in user namespaces (subuid(5), subgid(5)).
    :ivar made_up: the configured proxy user does not exist; the first id of `uid_range` replaces it.
    """

    proxy_uid: int
    proxy_gid: int
    admin_gid: int | None
    agent_uids: tuple[int, int] | None
    made_up: bool
    delegated: tuple[range, ...] = ()


def host_accounts(config: Config) -> HostAccounts:
    """Return the accounts of a configuration on this host.

    For an ordinary user, all are that user.  For root, the proxy runs as `proxy.user`; if that user does not
    exist, as the first id of `manager.uid_range`.
    """
    if os.geteuid() != 0:
        return HostAccounts(
            proxy_uid=os.geteuid(), proxy_gid=os.getegid(), admin_gid=None, agent_uids=None, made_up=False
        )
    first, last = config.manager.uid_range
    try:
        user = pwd.getpwnam(config.proxy.user)
    except KeyError:
        uid, gid, made_up = first, first, True
    else:
        group = _gid(config.manager.proxy_group)
        uid, gid, made_up = user.pw_uid, user.pw_gid if group is None else group, False
    return HostAccounts(
        proxy_uid=uid,
        proxy_gid=gid,
        admin_gid=_gid(config.manager.admin_group),
        agent_uids=(first + 1, last),
        made_up=made_up,
        delegated=tuple(ids for _, ids in subordinate_ids()),
    )


def proxy_uid(config: Config) -> int:
    """Return the user id of the proxy; for an ordinary user, that of an installed proxy if there is one."""
    if os.geteuid() != 0:
        with contextlib.suppress(KeyError):
            return pwd.getpwnam(config.proxy.user).pw_uid
    return host_accounts(config).proxy_uid


def subordinate_ids(directory: Path = Path("/etc")) -> list[tuple[str, range]]:
    """Return the ids that accounts may use in user namespaces, with account and file: subuid(5), subgid(5).

    Who holds such an id of an agent can act as the agent, with newuidmap(1).
    """
    found = []
    for file in (directory / "subuid", directory / "subgid"):
        try:
            lines = file.read_text(encoding="utf-8", errors="replace").splitlines()
        except OSError:
            continue
        for line in lines:
            name, *numbers = line.split(":")
            if len(numbers) == 2 and all(number.isdecimal() for number in numbers):
                start, count = map(int, numbers)
                found.append((f"{name} in {file}", range(start, start + count)))
    return found


def _gid(name: str) -> int | None:
    try:
        return grp.getgrnam(name).gr_gid
    except KeyError:
        return None
