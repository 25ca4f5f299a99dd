"""Bounds of what one agent takes of the table of tracked connections, which is one for the host and all agents.

A TCP connection stays in that table for two minutes after its end, so the rate is bounded besides the number.
"""

from __future__ import annotations

import os
import shutil
import subprocess

from dispatcher.plugin.deadline import Deadline

MAX_CONNECTIONS = 1024  # at once
NEW_CONNECTIONS = 50  # per second
NEW_CONNECTIONS_BURST = 1000  # before that rate applies
#: Matches the packets beyond the rate, in the language of nft.
NFT_EXCESS = f"limit rate over {NEW_CONNECTIONS}/second burst {NEW_CONNECTIONS_BURST} packets"

_SEARCH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
_TRIAL = 10.0  # seconds


def find_nft() -> str:
    """Return the path of nft, "" if it is not installed."""
    return shutil.which("nft", path=_SEARCH) or ""


def nft_fault(rules: str, deadline: Deadline) -> tuple[str, str] | None:
    """Try rules in a network namespace of their own; return why they do not work, and the fix.  None if they work.

    :param rules: input of ``nft -f``.
    """
    program, unshare = find_nft(), shutil.which("unshare", path=_SEARCH)
    if not unshare:
        return "unshare is not installed", "install util-linux"
    if not program:
        return "nft is not installed", "install nftables"
    own_user = [] if os.geteuid() == 0 else ["--user", "--map-root-user"]
    try:
        done = subprocess.run(
            [unshare, *own_user, "--net", program, "-f", "-"],
            input=rules,
            text=True,
            errors="replace",
            capture_output=True,
            check=False,
            env={},
            cwd="/",
            timeout=max(0.1, deadline.bounded(_TRIAL).remaining()),
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        why = str(error)
    else:
        if not done.returncode:
            return None
        why = next(iter(done.stderr.split("\n")), "")[:500] or f"nft ended with {done.returncode}"
    return why, "load the kernel modules nf_tables, nft_limit, nft_ct and nft_fib_ipv4"
