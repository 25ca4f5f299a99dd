"""Agents whose netlink sockets hold memory are found by their network namespace, and killed."""

import os

import pytest

from dispatcher.manager.agents import netlink_guard
from dispatcher.manager.agents.netlink_guard import NetlinkGuard

HEAD = "sk               Eth Pid        Groups   Rmem     Wmem     Dump  Locks    Drops    Inode\n"


class Agents:
    """A registry of agents by user id, with what was reported of them."""

    def __init__(self, *uids):
        self.agents, self.events = {}, []
        for uid in uids:
            agent = type("Agent", (), {"killed_because": ""})()
            agent.row = type("Row", (), {"uid": uid, "name": f"u{uid}"})()
            self.agents[agent.row.name] = agent

    def change(self, agent, decide):
        self.events += [(agent.row.name, detail) for _, detail in decide(agent.row).events]


@pytest.fixture
def host(tmp_path):
    """A /proc: `host(pid, namespace, uid, queued)` makes a process there."""

    def process(pid, namespace, uid=0, queued=()):
        here = tmp_path / str(pid)
        (here / "ns").mkdir(parents=True)
        (tmp_path / namespace).touch()
        os.link(tmp_path / namespace, here / "ns/net")
        (here / "net").mkdir()
        rows = "".join(
            f"0000000000000000 0   {at}  00000000 {size} 0 0 2 0 77\n" for at, size in enumerate(queued)
        )
        (here / "net/netlink").write_text(HEAD + rows)
        (here / "status").write_text(f"Name:\tx\nUid:\t{uid}\t{uid}\t{uid}\t{uid}\n")

    process("self", "host")
    return process


def guard(tmp_path, registry, killed, slab=1000):
    (tmp_path / "meminfo").write_text(f"MemTotal: 1 kB\nSUnreclaim:  {slab} kB\n")
    return NetlinkGuard(registry, proc=tmp_path, kill=lambda pid, _: killed.append(pid))


def test_the_hosts_namespace_is_left_alone_though_the_manager_is_in_another(host, tmp_path):
    host(1, "the real host", 0)
    host(5, "the real host", 900, [1 << 30])  # an agent with the host's network
    registry, killed = Agents(900), []
    guard(tmp_path, registry, killed).check()
    assert killed == [] and registry.events == []


def test_all_processes_of_the_namespace_are_killed_and_its_agent_is_named(host, tmp_path):
    big = [40 << 20, 30 << 20]
    host(1, "host", 0, [1 << 30])
    host(7, "a", 0, big)  # the first process of the sandbox may be root's
    host(8, "a", 900, big)
    host(9, "b", 901, [1 << 20])
    host(10, "stranger", 77, [1 << 30])
    registry, killed = Agents(900, 901), []
    guard(tmp_path, registry, killed).check()
    assert sorted(killed) == [7, 8]
    assert registry.agents["u900"].killed_because and not registry.agents["u901"].killed_because
    ((name, detail),) = registry.events
    assert name == "u900" and "70.0 MiB" in detail


def test_it_searches_when_memory_has_grown_and_now_and_then(host, tmp_path, monkeypatch):
    registry, killed, now = Agents(900), [], [100.0]
    monkeypatch.setattr(netlink_guard, "boottime", lambda: now[0])
    found = guard(tmp_path, registry, killed)
    found.check()
    host(8, "a", 900, [1 << 30])
    found.check()
    assert not killed, "nothing has grown"
    guard(tmp_path, registry, killed, slab=1000 + (netlink_guard.GROWTH >> 10))
    found.check()
    assert killed == [8]
    found.check()
    assert killed == [8]
    now[0] += netlink_guard.REGULARLY
    found.check()
    assert killed == [8, 8]
