"""libvirt: disks as files of this host."""

import os

import pytest

pytest.importorskip("libvirt")

from dispatcher.plugin.deadline import Deadline
from dispatcher.plugin.errors import Cancelled
from dispatcher_libvirt.disks import Disks, copy_sparse


def test_copies_keep_holes_owner_and_mode(tmp_path):
    source = tmp_path / "source"
    with source.open("wb") as file:
        file.write(b"begin")
        file.seek(6 << 20)
        file.write(b"middle")
        file.truncate(20 << 20)
    source.chmod(0o600)
    copy_sparse(source, tmp_path / "copy", Deadline(10), lambda: None)
    assert (tmp_path / "copy").read_bytes() == source.read_bytes()
    assert (tmp_path / "copy").stat().st_blocks * 512 < 1 << 20
    assert (tmp_path / "copy").stat().st_mode & 0o777 == 0o600

    def cancel():
        raise Cancelled("no")

    with pytest.raises(Cancelled):
        copy_sparse(source, tmp_path / "other", Deadline(10), cancel)


def test_directories_of_disks_are_passable_and_not_readable(tmp_path):
    own = tmp_path / "state"
    own.mkdir(mode=0o700)
    disks = Disks(own / "machines", own=own, privileged=False)
    assert disks.make_directory("dispatcher-x") is True
    assert disks.make_directory("dispatcher-x") is False
    assert [path.stat().st_mode & 0o777 for path in (own, disks.top, disks.directory("dispatcher-x"))] == [
        0o711
    ] * 3
    disks.remove("dispatcher-x", data=False)
    assert not disks.directory("dispatcher-x").exists()
    disks.remove("dispatcher-x", data=True)


def test_old_overlays_are_removed_but_the_newest(tmp_path):
    disks = Disks(tmp_path, own=None, privileged=False)
    disks.make_directory("d")
    for number, fingerprint in enumerate(["a" * 12, "b" * 12, "c" * 12, "d" * 12]):
        path = disks.directory("d") / f"root-{fingerprint}.qcow2"
        path.write_bytes(b"")
        os.utime(path, (number, number))
    (disks.directory("d") / "root-x.qcow2").write_bytes(b"")
    disks.prune_roots("d", "a" * 12, 1)
    assert set(disks.roots("d")) == {"a" * 12, "d" * 12}
