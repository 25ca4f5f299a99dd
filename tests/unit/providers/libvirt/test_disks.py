"""libvirt: disks as files of this host."""

import os

import pytest

pytest.importorskip("libvirt")

from dispatcher.plugin.deadline import Deadline
from dispatcher.plugin.errors import Cancelled
from dispatcher.plugin.provider import ProviderContext
from dispatcher_libvirt.disks.data import copy_sparse
from dispatcher_libvirt.options import Options
from dispatcher_libvirt.disks.storage import LocalStorage, prune


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


@pytest.fixture
def storage(tmp_path):
    own = tmp_path / "state"
    own.mkdir(mode=0o700)
    context = ProviderContext(
        installation="0123abcd", state_dir=own, run_dir=tmp_path / "run", proxy_gid=1, privileged=False
    )
    return LocalStorage(context, Options())


def test_directories_of_disks_are_passable_and_not_readable(storage):
    directory = storage.top / "dispatcher-x"
    assert storage.make_directory(directory) is True
    assert storage.make_directory(directory) is False
    assert [path.stat().st_mode & 0o777 for path in (storage.top.parent, storage.top, directory)] == [0o711] * 3
    storage.remove("dispatcher-x", data=False, deadline=Deadline(5))
    assert not directory.exists()
    storage.remove("dispatcher-x", data=True, deadline=Deadline(5))


def test_the_newest_files_are_kept(tmp_path):
    for number, name in enumerate(["c", "a", "b", "d"]):
        (tmp_path / name).write_bytes(b"")
        os.utime(tmp_path / name, (number, number))
    prune(tmp_path.iterdir(), 2)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["b", "d"]


def test_a_machine_goes_without_its_data_disk(storage):
    directory = storage.top / "dispatcher-x"
    storage.make_directory(directory)
    for name in ("root-0123456789ab.qcow2", "booted", ".aa.new", "data.raw"):
        (directory / name).write_bytes(b"")
    storage.remove("dispatcher-x", data=False, deadline=Deadline(5))
    assert [path.name for path in directory.iterdir()] == ["data.raw"]
