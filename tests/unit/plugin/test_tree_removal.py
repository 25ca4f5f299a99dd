"""Trees that somebody hostile may write to are deleted whole, and nothing outside of them is ever touched."""

import errno
import os
import threading

import pytest

from dispatcher.plugin import tree_removal
from dispatcher.plugin.deadline import Deadline
from dispatcher.plugin.errors import DeadlineExceeded, ProviderError
from dispatcher.plugin.tree_removal import remove_tree


@pytest.fixture
def victim(tmp_path):
    """Something outside that must stay as it is."""
    made = tmp_path / "victim"
    made.mkdir()
    (made / "file").write_text("precious")
    before = (made / "file").stat()
    yield made
    assert (made / "file").read_text() == "precious"
    after = (made / "file").stat()
    assert (after.st_mode, after.st_mtime, after.st_uid) == (before.st_mode, before.st_mtime, before.st_uid)


def remove(path, seconds=20):
    remove_tree(path, deadline=Deadline(seconds))
    assert not os.path.lexists(path)


def test_nothing_there_is_success(tmp_path):
    remove(tmp_path / "nothing")
    remove(tmp_path / "no/such/parent")


def test_a_tree_with_everything_in_it(tmp_path, victim):
    top = tmp_path / "tree"
    (top / "a/b/c").mkdir(parents=True)
    for name in ("a/file", "a/b/file", "a/b/c/-rf", "a/b/c/new\nline", "a/\udcff"):
        (top / name).write_text("x")
    (top / "a/link").symlink_to(victim)
    (top / "a/b/link").symlink_to(victim / "file")
    (top / "a/dangling").symlink_to("/nothing")
    (top / "a/loop").symlink_to("loop")
    os.mkfifo(top / "a/fifo")
    os.link(victim / "file", top / "a/hard")
    remove(top)
    assert (victim / "file").read_text() == "precious"


def test_a_link_in_place_of_the_tree_is_deleted_itself(tmp_path, victim):
    link = tmp_path / "tree"
    link.symlink_to(victim)
    remove(link)
    file = tmp_path / "file"
    file.write_text("x")
    remove(file)


def test_a_tree_deeper_than_any_path_or_descriptor_table(tmp_path):
    top = tmp_path / "tree"
    top.mkdir()
    folder = os.open(top, os.O_RDONLY)
    for _ in range(3000):
        os.mkdir("deeper", dir_fd=folder)
        (lambda: None)()
        below = os.open("deeper", os.O_RDONLY, dir_fd=folder)
        os.close(folder)
        folder = below
    os.close(folder)
    remove(top)


def test_names_that_collide_with_those_used_while_deleting(tmp_path, monkeypatch):
    monkeypatch.setattr(tree_removal.secrets, "token_hex", lambda _: "taken")
    top = tmp_path / "tree"
    (top / "a/b/c").mkdir(parents=True)
    (top / "taken-1").write_text("x")
    (top / "taken-2/x").mkdir(parents=True)
    with pytest.raises(ProviderError, match="cannot be deleted"):
        remove_tree(top, deadline=Deadline(5))
    monkeypatch.undo()
    remove(top)


def test_directories_without_permissions(tmp_path):
    top = tmp_path / "tree"
    (top / "a/b").mkdir(parents=True)
    (top / "a/b/file").write_text("x")
    for path in (top / "a/b", top / "a", top):
        path.chmod(0)
    remove(top)


def test_many_files_in_one_directory(tmp_path, monkeypatch):
    monkeypatch.setattr(tree_removal, "_AT_A_TIME", 50)
    top = tmp_path / "tree"
    (top / "a").mkdir(parents=True)
    for number in range(300):
        (top / f"a/{number}").write_text("x")
        (top / f"d{number}").mkdir()
    remove(top)


def test_who_keeps_writing_does_not_keep_it_busy_for_ever(tmp_path):
    top = tmp_path / "tree"
    top.mkdir()
    done = threading.Event()

    def write():
        number = 0
        while not done.is_set():
            number += 1
            try:
                os.makedirs(top / f"a/{number}")
            except OSError:
                return

    writer = threading.Thread(target=write)
    writer.start()
    try:
        try:
            remove_tree(top, deadline=Deadline(0.3))
        except DeadlineExceeded:
            pass
    finally:
        done.set()
        writer.join()
    remove(top)


def test_swapping_directories_for_links_while_they_are_deleted(tmp_path, victim):
    """A race that an agent would play: the name that was a directory a moment ago is a link to a victim."""
    for _ in range(20):
        top = tmp_path / "tree"
        (top / "real").mkdir(parents=True)
        (top / "link").symlink_to(victim)
        done = threading.Event()

        def swap(top=top, done=done):
            while not done.is_set():
                try:
                    os.rename(top / "real", top / "other")
                    os.rename(top / "link", top / "real")
                    os.rename(top / "real", top / "link")
                    os.rename(top / "other", top / "real")
                except OSError:
                    return

        player = threading.Thread(target=swap)
        player.start()
        try:
            remove_tree(top, deadline=Deadline(5))
        except ProviderError:
            pass
        finally:
            done.set()
            player.join()
        remove(top)


@pytest.fixture
def immutable(monkeypatch):
    """Names that cannot be deleted, as after `chattr +i`."""
    names = set()
    unlink = os.unlink

    def refuse(name, **options):
        if name in names:
            raise PermissionError(errno.EPERM, "Operation not permitted", name)
        unlink(name, **options)

    monkeypatch.setattr(tree_removal.os, "unlink", refuse)
    return names


def test_what_cannot_be_deleted_is_named_and_everything_else_goes(tmp_path, immutable):
    top = tmp_path / "tree"
    (top / "a/b/c").mkdir(parents=True)
    for number in range(20):
        (top / f"a/b/c/{number}").write_text("x")
        (top / f"a/{number}").write_text("x")
        (top / f"{number}").write_text("x")
    (top / "a/b/c/protected").write_text("x")
    (top / "here").write_text("x")
    immutable |= {"protected", "here"}
    with pytest.raises(ProviderError) as caught:
        remove_tree(top, deadline=Deadline(10))
    assert caught.value.what == f"2 entries of {top} cannot be deleted"
    assert "'protected': Operation not permitted" in caught.value.why
    assert "chattr" in caught.value.fix
    assert sorted(path.name for path in top.rglob("*") if path.is_file()) == ["here", "protected"]
    immutable.clear()
    remove(top)


def test_a_file_in_place_of_a_tree_that_cannot_be_deleted(tmp_path, immutable):
    (tmp_path / "file").write_text("x")
    immutable.add("file")
    with pytest.raises(ProviderError, match="1 entry of"):
        remove_tree(tmp_path / "file")


def test_a_path_below_an_open_directory(tmp_path):
    (tmp_path / "tree/a").mkdir(parents=True)
    folder = os.open(tmp_path, os.O_PATH)
    try:
        remove_tree("tree", dir_fd=folder)
    finally:
        os.close(folder)
    assert list(tmp_path.iterdir()) == []


def test_a_tree_that_is_renamed_away_and_replaced_ends_the_removal(tmp_path):
    top = tmp_path / "tree"
    top.mkdir()
    (top / "file").write_text("x")

    def replace():
        if not (tmp_path / "away").exists():
            top.rename(tmp_path / "away")
            (top / "other").mkdir(parents=True)

    with pytest.raises(ProviderError, match="cannot be deleted") as caught:
        remove_tree(top, deadline=Deadline(20), tick=replace)
    assert "another was put in its place" in caught.value.why


def test_a_tree_that_is_never_empty_has_a_deadline_and_ticks(tmp_path, monkeypatch):
    """Something is there whenever the directory is to be deleted, and gone when its names are read."""
    top = tmp_path / "tree"
    top.mkdir()
    monkeypatch.setattr(tree_removal, "_remove_directory", lambda *_: False)
    ticks = []
    with pytest.raises(DeadlineExceeded):
        remove_tree(top, deadline=Deadline(0.1), tick=lambda: ticks.append(1))
    assert ticks
