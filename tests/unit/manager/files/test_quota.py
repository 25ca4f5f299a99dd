"""Limits of data by project quotas, with simulated system calls.

The real ones need a kernel and a file system with project quotas: docs/howto/limit-disk-space.md, "Try it".
"""

from __future__ import annotations

import errno
import os

import pytest

from dispatcher.manager.files.quota import ACCOUNTED, ENFORCED, DiskUse, Kernel, Quotas
from dispatcher.plugin.errors import Cancelled, Unsupported
from dispatcher.plugin.model import Level

ALICE, BOB = 200_001, 200_002
MIB = 1 << 20


class FakeKernel(Kernel):
    """Projects of inodes, and limits, as a file system with quotas keeps them."""

    def __init__(self, flags=ACCOUNTED | ENFORCED, error=None):
        self.flags, self.error = flags, error
        self.projects, self.inheriting, self.limits = {}, set(), {}

    def _file(self, fd):
        found = os.fstat(fd)
        return found.st_dev, found.st_ino

    def state(self, fd):
        if self.error:
            raise OSError(self.error, os.strerror(self.error))
        return self.flags

    def read(self, fd, project):
        limit, files = self.limits.get(project, (0, 0))
        count = sum(one == project for one in self.projects.values())
        return DiskUse(count * MIB, limit or None, count, files or None)

    def limit(self, fd, project, limit, files):
        self.limits[project] = limit, files

    def project(self, fd):
        return self.projects.get(self._file(fd), 0)

    def assign(self, fd, project, *, inherit):
        self.projects[self._file(fd)] = project
        self.inheriting |= {self._file(fd)} if inherit else set()

    def of(self, path):
        found = path.lstat()
        return self.projects.get((found.st_dev, found.st_ino), 0)

    def inherits(self, path):
        found = path.lstat()
        return (found.st_dev, found.st_ino) in self.inheriting


@pytest.fixture
def top(tmp_path):
    made = tmp_path / "agents"
    for name in ("alice", "bob"):
        (made / name / "data/below").mkdir(parents=True)
        (made / name / "data/below/file").write_text("data")
    return made


def quotas(top, kernel, *, privileged=True):
    return Quotas(top, privileged=privileged, kernel=kernel)


def test_data_from_before_gets_its_project_and_new_files_inherit_it(top):
    kernel = FakeKernel()
    data = top / "alice/data"
    (data / "outside").symlink_to(top / "bob/data/below/file")
    os.mkfifo(data / "fifo")
    quotas(top, kernel).apply(data, ALICE, 64 * MIB)
    assert [kernel.of(path) for path in (data, data / "below", data / "below/file")] == [ALICE] * 3
    assert kernel.inherits(data) and kernel.inherits(data / "below")
    assert kernel.of(top / "bob/data/below/file") == 0, "links are not followed"
    assert kernel.limits[ALICE] == (64 * MIB, 10_000)


def test_a_file_of_somebody_else_that_is_linked_into_the_data_keeps_its_project(top, monkeypatch):
    kernel = FakeKernel()
    data = top / "alice/data"
    os.link(top / "bob/data/below/file", data / "linked")
    real = os.fstat
    other = os.stat_result([*data.stat()[:4], 12345, *data.stat()[5:]])  # the top belongs to another user
    monkeypatch.setattr(os, "fstat", lambda fd: other if real(fd).st_ino == other.st_ino else real(fd))
    quotas(top, kernel).apply(data, ALICE, None)
    assert kernel.of(data / "linked") == 0 and kernel.of(data / "below/file") == ALICE


def test_an_interrupted_walk_begins_again(top):
    kernel = FakeKernel()
    data = top / "alice/data"

    def stop():
        raise Cancelled("stopped")

    with pytest.raises(Cancelled):
        quotas(top, kernel).apply(data, ALICE, MIB, stop)
    assert kernel.of(data / "below/file") == kernel.of(data) == 0
    quotas(top, kernel).apply(data, ALICE, MIB)
    assert kernel.of(data / "below/file") == kernel.of(data) == ALICE


def test_a_later_start_changes_the_limit_and_walks_no_more(top):
    kernel = FakeKernel()
    data = top / "alice/data"
    made = quotas(top, kernel)
    made.apply(data, ALICE, 64 * MIB)

    def walked():
        pytest.fail("the tree was walked again")

    for limit, expected in ((1 << 30, (1 << 30, 131_072)), (None, (0, 0))):
        made.apply(data, ALICE, limit, walked)
        assert kernel.limits[ALICE] == expected


def test_use_is_of_the_project_alone_and_unknown_before_it_is_counted(top):
    kernel = FakeKernel()
    made = quotas(top, kernel)
    made.apply(top / "alice/data", ALICE, 3 * MIB)
    assert str(made.usage(top / "alice/data", ALICE)) == "3.0 MiB of 3.0 MiB"
    assert made.usage(top / "alice/data", ALICE).full
    assert made.usage(top / "bob/data", BOB) is None
    assert made.usage(top / "nobody/data", BOB) is None


def test_a_limit_of_files_counts_too():
    crowded = DiskUse(MIB, 64 * MIB, 10_000, 10_000)
    assert crowded.full and str(crowded) == "1.0 MiB of 64.0 MiB, 10000 of 10000 files"
    assert not DiskUse(MIB, 64 * MIB, 100, 10_000).full
    assert DiskUse(63 * MIB, 64 * MIB).full, "xfs refuses writes before the last bytes"
    assert not DiskUse(3 * MIB, 4 * MIB).full
    assert not DiskUse(MIB).full


def test_copies_and_deleted_data_are_not_counted(top):
    kernel = FakeKernel()
    made = quotas(top, kernel)
    data = top / "alice/data"
    made.apply(data, ALICE, MIB)
    made.release(data, ALICE)
    assert kernel.of(data) == kernel.of(data / "below/file") == 0
    made.forget(ALICE)
    assert kernel.limits[ALICE] == (0, 0)


@pytest.mark.parametrize("error", [errno.ENOSYS, errno.ENOTTY, errno.EPERM])
def test_without_quotas_a_limit_is_an_error_that_names_the_file_system_and_the_way_out(top, error):
    kernel = FakeKernel(error=error)
    made = quotas(top, kernel)
    made.apply(top / "alice/data", ALICE, None)
    with pytest.raises(Unsupported, match="cannot be enforced") as caught:
        made.apply(top / "alice/data", ALICE, MIB)
    assert str(top) in caught.value.why and "or remove `disk`" in caught.value.fix
    assert kernel.limits == {} and kernel.of(top / "alice/data") == 0
    assert made.finding(wanted=True).level is Level.ERROR and made.finding(wanted=False).level is Level.INFO


@pytest.mark.parametrize(
    ("kind", "flags", "fix"),
    [
        ("ext4", 0, "tune2fs -O project,quota /dev/vdb"),
        ("ext4", ACCOUNTED, "mount it with the option prjquota"),
        ("xfs", 0, "rootflags=prjquota"),
        ("btrfs", 0, "put manager.state_dir on ext4 or xfs"),
    ],
)
def test_the_error_says_what_to_do_on_each_file_system(top, kind, flags, fix):
    made = Quotas(
        top, privileged=True, kernel=FakeKernel(flags=flags), file_system=lambda _path: (kind, "/dev/vdb", "rw")
    )
    with pytest.raises(Unsupported) as caught:
        made.apply(top / "alice/data", ALICE, MIB)
    assert fix in caught.value.fix and "/dev/vdb" in caught.value.why


def test_what_is_counted_but_not_enforced_is_shown(top):
    kernel = FakeKernel(flags=ACCOUNTED)
    made = quotas(top, kernel)
    made.apply(top / "alice/data", ALICE, None)
    assert str(made.usage(top / "alice/data", ALICE)) == "3.0 MiB"
    assert not made.enforced


def test_a_manager_without_privileges_says_that_it_needs_them(top):
    made = quotas(top, FakeKernel(), privileged=False)
    with pytest.raises(Unsupported, match="run it as root") as caught:
        made.apply(top / "alice/data", ALICE, MIB)
    assert caught.value.why == "the manager does not run as root"
    assert made.usage(top / "alice/data", ALICE) is None
