"""libvirt: the accelerator of this host."""

import pytest

pytest.importorskip("libvirt")

from dispatcher_libvirt.host import kvm_test


@pytest.mark.parametrize(
    ("script", "seconds", "why"),
    [
        ("exit 0", 10.0, ""),
        ("echo Could not access KVM kernel module >&2; exit 1", 10.0, "failed: Could not access KVM"),
        ("exec sleep 60", 0.3, "did not end within 0.3 s"),
        ("while :; do :; done", 30.0, "took over 1 s of processor time"),
    ],
)
def test_kvm_counts_only_where_a_small_guest_ends_soon(tmp_path, script, seconds, why):
    """The guest is QEMU's firmware, which finds nothing to boot; a script stands for QEMU."""
    emulator = tmp_path / "qemu"
    emulator.write_text(f"#!/bin/sh\n{script}\n")
    emulator.chmod(0o755)
    found = kvm_test(str(emulator), seconds)
    assert why in found
    assert bool(why) == bool(found)
