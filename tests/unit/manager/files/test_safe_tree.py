"""Trees that somebody hostile may write to: nothing outside of them is ever touched."""

import os
import stat
import time

import pytest

from dispatcher.plugin.deadline import Deadline
from dispatcher.plugin.errors import ProviderError
from dispatcher.plugin.tree_removal import remove_tree
from dispatcher.manager.files import safe_tree
from dispatcher.manager.files.manifest import differences, manifest
from dispatcher.manager.files.safe_tree import change_owner, disk_usage, make_directory

ROOT = os.geteuid() == 0


@pytest.fixture
def victim(tmp_path):
    """Something outside that must stay as it is."""
    made = tmp_path / "victim"
    made.mkdir()
    (made / "file").write_text("precious")
    before = manifest(made)
    yield made
    assert manifest(made) == before


# --- directories


def test_making_a_directory_again_mends_its_mode(tmp_path):
    path = tmp_path / "d"
    make_directory(path, 0o711)
    path.chmod(0o777)
    make_directory(path, 0o711)
    assert stat.S_IMODE(path.stat().st_mode) == 0o711


def test_a_link_in_place_of_a_directory_is_refused(tmp_path, victim):
    (tmp_path / "d").symlink_to(victim)
    with pytest.raises(ProviderError, match="is not a directory"):
        make_directory(tmp_path / "d", 0o777)
    (tmp_path / "f").write_text("x")
    with pytest.raises(ProviderError, match="is not a directory"):
        make_directory(tmp_path / "f", 0o777)


@pytest.mark.root
def test_a_directory_gets_its_owner(tmp_path):
    make_directory(tmp_path / "d", 0o2710, (300_001, 300_000))
    found = (tmp_path / "d").stat()
    assert (found.st_uid, found.st_gid, stat.S_IMODE(found.st_mode)) == (300_001, 300_000, 0o2710)


# --- what comes from outside


@pytest.mark.root
def test_taking_over_makes_a_tree_harmless(tmp_path, victim):
    top = tmp_path / "tree"
    (top / "sub").mkdir(parents=True)
    setuid = top / "sub/setuid"
    setuid.write_text("#!/bin/sh")
    setuid.chmod(0o6755)
    own = top / "own"
    own.write_text("x")
    os.chown(own, 300_001, 300_001)
    own.chmod(0o4700)
    (top / "link").symlink_to(victim / "file")
    os.mknod(top / "disk", stat.S_IFBLK | 0o666, os.makedev(7, 0))
    os.mkfifo(top / "fifo")
    one = top / "one"
    one.write_text("twice")
    os.link(one, top / "sub/two")
    (top / "sub").chmod(0o2777)
    os.setxattr(own, "security.capability", bytes.fromhex("0100000200040000000000000000000000000000"))
    change_owner(top, (300_001, 300_001))
    for path in (top / "sub", setuid, own, top / "link", top / "fifo", one, top / "sub/two"):
        found = path.lstat()
        assert (found.st_uid, found.st_gid) == (300_001, 300_001), path
    assert stat.S_IMODE(setuid.stat().st_mode) == 0o755
    assert stat.S_IMODE((top / "sub").stat().st_mode) == 0o777
    assert stat.S_IMODE(own.stat().st_mode) == 0o4700  # to itself: nothing is gained
    assert "security.capability" not in os.listxattr(own)
    assert not (top / "disk").exists()
    assert one.samefile(top / "sub/two")


@pytest.mark.root
def test_a_file_with_a_name_outside_is_not_given_away(tmp_path, victim):
    top = tmp_path / "tree"
    top.mkdir()
    os.link(victim / "file", top / "shadow")
    with pytest.raises(ProviderError, match="further hard link outside"):
        change_owner(top, (300_001, 300_001))
    assert (victim / "file").stat().st_uid == 0


# --- manifests


def tree(path):
    (path / "sub/deep").mkdir(parents=True)
    (path / "sub/file").write_text("content")
    os.link(path / "sub/file", path / "hard")
    (path / "link").symlink_to("sub/file")
    os.mkfifo(path / "fifo")
    for name in ("sub/file", "sub/deep", "sub"):
        os.utime(path / name, (1_600_000_000, 1_600_000_000))
    return path


def test_trees_that_are_alike_have_no_differences(tmp_path):
    one, two = tree(tmp_path / "one"), tree(tmp_path / "two")
    assert manifest(one).keys() == {"sub", "sub/deep", "sub/file", "hard", "link", "fifo"}
    assert differences(manifest(one), manifest(two)) == []


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (lambda top: (top / "new").write_text("x"), "new is new"),
        (lambda top: (top / "fifo").unlink(), "fifo is missing"),
        (lambda top: (top / "sub/file").write_text("CONTENT"), "another content"),
        (lambda top: (top / "sub/file").chmod(0o600), "another mode"),
        (lambda top: os.utime(top / "sub/file", (1, 1)), "another time of change"),
        (lambda top: ((top / "link").unlink(), (top / "link").symlink_to("other")), "another content"),
        (lambda top: ((top / "hard").unlink(), (top / "hard").write_text("content")), "another hard links"),
        (lambda top: ((top / "fifo").unlink(), (top / "fifo").mkdir()), "fifo has another kind"),
        pytest.param(lambda top: os.chown(top / "sub/file", 5, 6), "another owner", marks=pytest.mark.root),
    ],
)
def test_every_difference_is_found(tmp_path, change, told):
    one, two = tree(tmp_path / "one"), tree(tmp_path / "two")
    mode = (two / "sub/file").stat()
    change(two)
    if "content" in told:
        os.utime(two / "sub/file", (mode.st_atime, mode.st_mtime))
    found = differences(manifest(one), manifest(two))
    assert any(told in difference for difference in found), found


def test_rounded_times_and_lost_and_found_do_not_count(tmp_path):
    one, two = tree(tmp_path / "one"), tree(tmp_path / "two")
    os.utime(two / "sub/file", (1_600_000_000.9, 1_600_000_000.9))
    (two / "lost+found").mkdir()
    assert differences(manifest(one), manifest(two)) == []


def test_a_long_list_of_differences_is_cut(tmp_path):
    (tmp_path / "one").mkdir()
    (tmp_path / "two").mkdir()
    for number in range(100):
        (tmp_path / f"two/{number}").write_text("x")
    assert len(differences(manifest(tmp_path / "one"), manifest(tmp_path / "two"))) == 5


def test_a_manifest_follows_no_link_and_waits_for_no_fifo(tmp_path, victim):
    top = tmp_path / "tree"
    top.mkdir()
    (top / "link").symlink_to(victim)
    os.mkfifo(top / "fifo")
    before = time.monotonic()
    assert manifest(top).keys() == {"link", "fifo"}
    assert time.monotonic() - before < 1


def test_long_work_ticks(tmp_path):
    ticks = []
    tree(tmp_path / "one")
    manifest(tmp_path / "one", lambda: ticks.append(1))
    remove_tree(tmp_path / "one", deadline=Deadline(5), tick=lambda: ticks.append(1))
    assert len(ticks) > 6


def test_a_tree_whose_names_would_fill_the_memory_is_refused(tmp_path, monkeypatch):
    """Paths of a chain of directories grow with the square of its length: 16,000 are gigabytes."""
    monkeypatch.setattr(safe_tree, "_MAX_CHARACTERS", 100_000)
    folder = os.open(tmp_path, os.O_RDONLY)
    for _ in range(60):
        os.mkdir("d" * 100, dir_fd=folder)
        below = os.open("d" * 100, os.O_RDONLY, dir_fd=folder)
        os.close(folder)
        folder = below
    os.close(folder)
    with pytest.raises(ProviderError, match="too large to be compared") as caught:
        manifest(tmp_path)
    assert caught.value.fix
    remove_tree(tmp_path / ("d" * 100), deadline=Deadline(20))
    for number in range(300):
        (tmp_path / f"{number:0200}").mkdir()
    assert len(manifest(tmp_path)) == 300
    for number in range(300, 600):
        (tmp_path / f"{number:0200}").mkdir()
    with pytest.raises(ProviderError):
        change_owner(tmp_path, (os.geteuid(), os.getegid()))


def test_disk_usage_counts_a_file_once_and_follows_no_link(tmp_path, victim):
    (victim / "large").write_bytes(b"x" * 1_000_000)
    tree = tmp_path / "tree"
    (tree / "sub").mkdir(parents=True)
    (tree / "sub/file").write_bytes(b"x" * 50_000)
    os.link(tree / "sub/file", tree / "again")
    (tree / "link").symlink_to(victim)
    assert 50_000 <= disk_usage(tree, Deadline(10)) < 100_000
    assert disk_usage(tree, Deadline(0)) is None
    assert disk_usage(tmp_path / "none", Deadline(10)) is None
    (victim / "large").unlink()
