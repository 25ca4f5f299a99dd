"""The conformance kit on libvirt, with real guests."""

from __future__ import annotations

import contextlib
import os
from pathlib import Path

import pytest

from dispatcher.testing import ProviderContract
from tests.support import vm

pytestmark = [pytest.mark.libvirt, pytest.mark.root, pytest.mark.slow]


class TestLibvirt(ProviderContract):
    patience = 90.0
    slack = 3.0
    many = 3
    event_seconds = 8.0
    log_lines = 3_000  # a serial console takes about 10,000 a second under emulation
    memory_limit = 160 * 1024 * 1024

    @pytest.fixture(scope="class")
    @classmethod
    def relay(cls):
        vm.images()
        cls.front = vm.Relay()
        yield cls.front
        cls.front.close()

    @pytest.fixture
    def provider(self, context, relay):
        from dispatcher_libvirt.provider import LibvirtProvider

        provider = LibvirtProvider(context=context, options=LibvirtProvider.Options(uri=relay.uri))
        yield provider
        provider.close()

    def app_options(self):
        return vm.app_options(command=["/app/start", "--tcp", "0.0.0.0:{port}", "{data}"])

    def missing_options(self):
        return vm.app_options(initrd="/nonexistent/initrd.img")

    def leftovers(self, context):
        return vm.leftovers(context.installation, context.state_dir)

    def inspect(self, handle, context):
        shown = [vm.virsh("dumpxml", "--security-info", handle.name), vm.virsh("domstats", handle.name)]
        for path in Path("/var/run/libvirt/qemu").glob(f"{handle.name}*"):
            with contextlib.suppress(OSError):
                shown.append(path.read_bytes().decode(errors="replace"))
        return "\n".join(shown)

    def broken_backend(self, how):
        return self.front.broken(how)

    def backend_sockets(self):
        return [f"unix:{vm.LIBVIRT}", "unix:/var/run/libvirt/virtlogd-sock", "tcp:10.0.2.2:22"]

    def test_guest_runs_as_its_agents_host_user(self, kit, alice, bob):
        """Each machine's QEMU is a process of its agent's own user, which owns its disks and no other's."""
        from dispatcher.testing.kit import processes_of

        for agent in (alice, bob):
            (pid,) = processes_of(agent.spec.uid)
            command = Path(f"/proc/{pid}/cmdline").read_bytes()
            assert f"guest={agent.handle.name}".encode() in command
            disk = kit.context.state_dir / "machines" / agent.handle.name / "data.raw"
            assert (disk.stat().st_uid, disk.stat().st_mode & 0o777) == (agent.spec.uid, 0o600)
        assert os.geteuid() == 0
