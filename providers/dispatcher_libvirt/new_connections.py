"""The rate of machines' new connections: a table of nftables per installation, as libvirt's filters have no rates.

It does not depend on libvirt's own rules, nor on their order, and it remains while no manager runs.  DNS queries
count as new connections, as this host's name server opens a socket for each.
"""

from __future__ import annotations

import re
import subprocess
import threading
from collections.abc import Collection

from dispatcher.plugin import NFT_EXCESS, Deadline, ProviderError, find_nft, nft_fault

_SECONDS = 10.0  # for one command of nft


class NewConnections:
    """The rules for the machines of one installation.  Addresses are IPv4, as machines have no others.

    :param local: machines run on this host; :param privileged: the manager is root.
    """

    def __init__(self, installation: str, *, local: bool, privileged: bool) -> None:
        self._table = f"dispatcher-{installation}"
        self._local, self._privileged = local, privileged
        self._lock = threading.Lock()
        self._fault: tuple[str, str] | None = None
        self._examined = False

    def fault(self, deadline: Deadline, *, again: bool = False) -> tuple[str, str] | None:
        """Return why rules cannot be set, and the fix; None if they can.

        :param again: examine the host, also if that was done before.
        """
        if again or not self._examined:
            if not self._local:
                self._fault = "they run on another host", "raise net.netfilter.nf_conntrack_max there"
            elif not self._privileged:
                self._fault = "the manager is not root", "run the manager as root"
            else:
                self._fault = nft_fault(self._rules(["192.0.2.1"]), deadline)
            self._examined = True
        return self._fault

    def addresses(self, deadline: Deadline) -> set[str]:
        """Return the addresses that the rules hold for."""
        listed = self._nft(f"list set ip {self._table} machines", deadline)
        return set(re.findall(r"\d+\.\d+\.\d+\.\d+", listed.stdout)) if not listed.returncode else set()

    def add(self, addresses: Collection[str], deadline: Deadline) -> None:
        """Bound the rates of machines; nothing where that is not possible.

        :raises ProviderError: nft fails.
        """
        if addresses and not self.fault(deadline):
            with self._lock:
                self._change(self._rules(addresses), deadline)

    def remove(self, addresses: Collection[str], deadline: Deadline) -> None:
        """Remove machines from the rules, and with the last one the table.  Absent is success.

        :raises ProviderError: nft fails.
        """
        if not addresses or self.fault(deadline):
            return
        with self._lock:
            bounded = self.addresses(deadline)
            if gone := bounded.intersection(addresses):
                table = f"ip {self._table}"
                elements = f"element {table} machines {{ {', '.join(gone)} }}"
                self._change(f"delete {elements if bounded - gone else f'table {table}'}\n", deadline)

    def _rules(self, addresses: Collection[str]) -> str:
        """Return the commands that bound the rates of machines; of rules that exist, the counts stay.

        A packet with a machine's address that arrives from elsewhere does not count.
        """
        table = f"ip {self._table}"
        excess = f"update @rates {{ ip saddr {NFT_EXCESS} }} drop"
        return f"""
add table {table}
add set {table} machines {{ type ipv4_addr; }}
add set {table} rates {{ type ipv4_addr; size 65535; flags dynamic,timeout; timeout 1m; }}
add chain {table} new {{ type filter hook prerouting priority mangle; }}
flush chain {table} new
add rule {table} new ip saddr != @machines accept
add rule {table} new fib saddr . iif oif missing accept
add rule {table} new ct state new {excess}
add rule {table} new ct state != new udp dport 53 {excess}
add element {table} machines {{ {", ".join(addresses)} }}
"""

    def _change(self, rules: str, deadline: Deadline) -> None:
        done = self._nft(rules, deadline)
        if done.returncode:
            raise ProviderError(
                "The rate of a machine's new connections cannot be bounded",
                why=next(iter(done.stderr.splitlines()), "")[:500],
                fix="check whether `nft list ruleset` works, and start the agent again",
            )

    def _nft(self, rules: str, deadline: Deadline) -> subprocess.CompletedProcess[str]:
        try:
            return subprocess.run(
                [find_nft(), "-f", "-"],
                input=rules,
                text=True,
                errors="replace",
                capture_output=True,
                check=False,
                env={},
                timeout=max(0.1, deadline.bounded(_SECONDS).remaining()),
            )
        except (OSError, subprocess.TimeoutExpired) as error:
            raise ProviderError("nft does not run", why=str(error), fix="install nftables") from error
