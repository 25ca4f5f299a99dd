"""Limits, network, credentials and own data, as far as a provider promises them (tier *capability*)."""

from __future__ import annotations

import os
import socket
import time
from pathlib import Path
from typing import Any

import psutil
import pytest

from dispatcher.plugin.errors import DispatcherError, StartFailed, Unsupported
from dispatcher.plugin.model import BackendState, Capability, Level, Limits, Network
from dispatcher.testing.base import Contract, needs
from dispatcher.testing.driver import Driver, expect, unsupported
from dispatcher.testing.kit import Agent, Kit, eventually
from dispatcher.testing.probe_client import Refused


class PromiseChecks(Contract, page="docs/howto/limit-resources.md"):
    """Limits hold, networks are what they are called, credentials arrive, data moves."""

    @needs(Capability.MEMORY_LIMIT)
    def test_memory_limit(self, driver: Driver, kit: Kit) -> None:
        """MEMORY_LIMIT: an app cannot exceed its limit; the cause is reported."""
        limits = Limits(memory=self.memory_limit, swap=0)
        agent = kit.start(driver, kit.spec("trent", limits=limits))
        told = agent.inside.environment().get("DISPATCHER_MEMORY_LIMIT")
        expect(told == str(self.memory_limit), f"DISPATCHER_MEMORY_LIMIT is {told!r}: use AgentSpec.variables")
        try:
            agent.inside.post("/memory", bytes=2 * self.memory_limit)
        except Refused:
            return  # the allocation failed, the app lives
        except OSError:
            ended = eventually(lambda: driver.state(agent.handle) is BackendState.STOPPED, self.patience)
            if ended:
                reason = driver.observe(agent.handle).exit_reason
                expect(
                    "memory" in reason, f"killed for its memory, the exit reason is {reason!r}: say out of memory"
                )
            return
        pytest.fail(f"an app limited to {self.memory_limit} bytes took twice as much: enforce Limits.memory")

    @needs(Capability.CPU_LIMIT)
    def test_cpu_limit(self, driver: Driver, kit: Kit) -> None:
        """CPU_LIMIT: an app with a limit of a fifth of a CPU gets no more."""
        limits = Limits(cpus=0.2)
        agent = kit.start(driver, kit.spec("ursula", limits=limits))
        if not driver.can(Capability.USAGE):
            return
        rates = []
        for _ in range(3):  # a virtual host that pauses counts the pause as the app's use; later rounds repay it
            before = driver.usage([agent.handle])[agent.handle.name].cpu_seconds or 0.0
            began = time.monotonic()
            agent.inside.post("/burn", seconds=1.5)
            now = driver.usage([agent.handle])[agent.handle.name].cpu_seconds or 0.0
            rates.append((now - before) / (time.monotonic() - began))
            if rates[-1] < 0.4:
                return
        pytest.fail(f"an app limited to 0.2 processors used at least {min(rates):.2f}: enforce Limits.cpus")

    @needs(Capability.PIDS_LIMIT)
    def test_pids_limit(self, driver: Driver, kit: Kit) -> None:
        """PIDS_LIMIT: an app cannot exceed its limit of processes."""
        limits = Limits(pids=40)
        agent = kit.start(driver, kit.spec("victor", limits=limits))
        got = int(agent.inside.post("/fork", count=100))
        expect(got < 45, f"an app limited to 40 processes had {got}: enforce Limits.pids")
        expect(got >= 10, f"an app limited to 40 processes could have only {got}")

    @needs(Capability.DISK_LIMIT)
    def test_disk_limit(self, driver: Driver, kit: Kit) -> None:
        """DISK_LIMIT: an app cannot exceed its limit of data."""
        limits = Limits(disk=32 << 20)
        agent = kit.start(driver, kit.spec("walter", limits=limits))
        agent.inside.write(agent.within("small"), b"x" * (1 << 20))
        try:
            for number in range(12):
                agent.inside.write(agent.within(f"big{number}"), b"x" * (4 << 20))
        except Refused as error:
            expect(
                str(error) in {"ENOSPC", "EDQUOT", "EFBIG"}, f"a full disk shows as {error}: it should be ENOSPC"
            )
            return
        pytest.fail("an app limited to 32 MiB wrote 48: enforce Limits.disk")

    @pytest.mark.parametrize("limit", ["memory", "cpus", "pids", "disk"])
    def test_undeclared_limit_is_refused_or_explained(self, driver: Driver, kit: Kit, limit: str) -> None:
        """A limit that is not declared raises `Unsupported`, or is a warning of `explain`."""
        capability = Capability(f"{limit.removesuffix('s') if limit == 'cpus' else limit}-limit")
        in_place = limit == "disk" and not driver.can(Capability.OWN_DATA)  # the core limits its directory
        if driver.can(capability) or in_place:
            return
        bound: dict[str, Any] = {limit: 1 if limit == "cpus" else self.memory_limit}
        limits = Limits(**bound)
        app = kit.app(limits=limits)
        said = any(one.level in {Level.WARNING, Level.ERROR} for one in driver.explain(app))
        spec = kit.spec("undeclared", limits=limits)
        kit.fresh(driver.handle(spec))
        try:
            driver.ensure(spec)
        except Unsupported:
            return
        except StartFailed:
            pass
        except DispatcherError as error:
            pytest.fail(f"{capability.value} is not declared and raised {type(error).__name__}: raise Unsupported")
        expect(
            said,
            f"{capability.value} is not declared, yet an app with that limit starts without a word: raise "
            "Unsupported, or say in explain(app) by a warning that the limit is not enforced",
        )

    @pytest.mark.parametrize("network", list(Network))
    def test_network(self, driver: Driver, kit: Kit, network: Network) -> None:
        """NETWORK_*: only `host` reaches the host's loopback; undeclared networks are refused."""
        capability = Capability(f"network-{network.value}")
        spec = kit.spec(f"net-{network.value}", network=network)
        if not driver.can(capability):
            kit.fresh(driver.handle(spec))
            if "network" in self.unpromised and network is Network.NONE:
                driver.ensure(spec)  # the default, so that apps start without isolation; explain() says so
                return
            unsupported(f"network {network.value}", lambda: driver.ensure(spec))
            kit.gone(driver, driver.handle(spec))
            return
        agent = kit.start(driver, spec)
        with socket.create_server(("0.0.0.0", 0)) as listener:  # noqa: S104 - a service that is open to all
            for address in ("127.0.0.1", *_addresses_of_this_host()):
                refusal = agent.inside.refused("/connect", to=f"tcp:{address}:{listener.getsockname()[1]}")
                if network is Network.HOST:
                    expect(
                        not refusal, f"an app with the host's network cannot reach a port of the host: {refusal}"
                    )
                elif "network" not in self.unpromised:
                    expect(
                        refusal,
                        f"an app with network {network.value!r} reached the host at {address}: give it a network "
                        "of its own and close the way to the host, or list 'network' in `unpromised`",
                    )

    def test_credentials_arrive_on_standard_input(self, driver: Driver, kit: Kit) -> None:
        """CREDENTIALS: an app gets them on its standard input, and then the input's end; later starts get none."""
        secret = b'{"user": "xavier", "password": "kit-credential-7"}\n'
        spec = kit.spec("xavier", credentials="stdin", stdin=secret)
        if not driver.can(Capability.CREDENTIALS):
            kit.fresh(driver.handle(spec))
            unsupported('an app with credentials = "stdin"', lambda: driver.ensure(spec))
            return
        agent = kit.start(driver, spec)
        expect(
            eventually(lambda: agent.inside.get("/stdin") == b"end\n" + secret, 5),
            f"standard input gave {agent.inside.get('/stdin')!r}: write AgentSpec.stdin to it, then close it",
        )
        driver.stop(agent.handle)
        later = kit.spec("xavier", credentials="stdin")
        again = kit.start(driver, later)
        expect(
            eventually(lambda: again.inside.get("/stdin").startswith(b"end\n"), 5)
            and secret not in again.inside.get("/stdin"),
            "a later start without credentials got the old ones: never store them",
        )

    def test_standard_input_is_empty_without_credentials(self, driver: Driver, alice: Agent) -> None:
        """An app without credentials reads the end of its input at once."""
        expect(
            eventually(lambda: alice.inside.get("/stdin") == b"end\n", 5),
            "standard input stays open or holds something without credentials: give it /dev/null",
        )

    def test_data_is_the_canonical_directory(self, driver: Driver, kit: Kit, alice: Agent) -> None:
        """Data is the core's directory, both ways, owned by the agent; with OWN_DATA it goes in and out whole."""
        if driver.can(Capability.OWN_DATA):
            self._moves(driver, kit)
            return
        alice.inside.write(alice.within("from-inside"), b"inside\n")
        seen = alice.spec.data_dir / "from-inside"
        expect(seen.exists(), "what the app writes to its data does not show in AgentSpec.data_dir: mount it")
        expect(
            seen.stat().st_uid == alice.spec.uid,
            f"what the app wrote is owned by {seen.stat().st_uid} on the host, not by spec.uid ({alice.spec.uid})",
        )
        ours = alice.spec.data_dir / "from-outside"
        ours.write_bytes(b"outside\n")
        os.chown(ours, alice.spec.uid, alice.spec.gid)
        expect(
            alice.inside.read(alice.within("from-outside")) == b"outside\n",
            "what lies in AgentSpec.data_dir does not show inside: mount it",
        )

    def _moves(self, driver: Driver, kit: Kit) -> None:
        spec = kit.spec("yvonne")
        source = kit.root / "moves"
        (source / "deep").mkdir(parents=True)
        (source / "deep" / "file").write_bytes(b"content\n")
        (source / "deep" / "file").chmod(0o640)
        os.utime(source / "deep" / "file", (1_000_000_000, 1_000_000_000))
        (source / "link").symlink_to("deep/file")
        if kit.privileged:
            for path in (source, *source.rglob("*")):
                os.lchown(path, spec.uid, spec.gid)
        handle = driver.handle(spec)
        kit.fresh(handle)
        driver.import_data(handle, source)
        agent = kit.start(driver, spec)
        expect(
            agent.inside.read(agent.within("link")) == b"content\n",
            "import_data() before the first start did not bring the data into the agent",
        )
        agent.inside.write(agent.within("new"), b"new\n")
        driver.stop(agent.handle, grace=self.patience / 2)
        target = kit.root / "moved"
        target.mkdir()
        driver.export_data(agent.handle, target)
        expect((target / "new").read_bytes() == b"new\n", "export_data() left out what the app wrote")
        _same(source / "deep" / "file", target / "deep" / "file")
        expect(
            (target / "link").is_symlink() and os.readlink(target / "link") == "deep/file",
            "export_data() did not keep a symbolic link",
        )


def _addresses_of_this_host() -> list[str]:
    found = [
        one.address for all_of in psutil.net_if_addrs().values() for one in all_of if one.family == socket.AF_INET
    ]
    return sorted({one for one in found if not one.startswith("127.")})[:8]


def _same(before: Path, after: Path) -> None:
    one, two = before.lstat(), after.lstat()
    for field in ("st_uid", "st_gid", "st_mode", "st_size"):
        expect(
            getattr(one, field) == getattr(two, field),
            f"the data's journey changed {field} of a file from {getattr(one, field)} to {getattr(two, field)}",
        )
    expect(abs(one.st_mtime - two.st_mtime) < 2, "the data's journey changed a file's time")
