"""The directory for temporary files, made and emptied."""

import os

from dispatcher.plugin import Deadline, deadline, make_temporary, tree_removal


def test_it_is_made_emptied_and_belongs_to_the_agent(tmp_path):
    make_temporary(tmp_path / ".tmp", os.geteuid(), os.getegid(), Deadline(5))
    assert (tmp_path / ".tmp").stat().st_mode & 0o777 == 0o700
    (tmp_path / ".tmp/a/b").mkdir(parents=True)
    (tmp_path / ".tmp/a/file").write_text("x")
    make_temporary(tmp_path / ".tmp", os.geteuid(), os.getegid(), Deadline(5))
    assert os.listdir(tmp_path / ".tmp") == []


def test_a_link_in_its_place_or_inside_is_not_followed(tmp_path):
    outside = tmp_path / "outside"
    outside.mkdir()
    (outside / "precious").write_text("x")
    (tmp_path / ".tmp").symlink_to(outside)
    make_temporary(tmp_path / ".tmp", os.geteuid(), os.getegid(), Deadline(5))
    assert os.listdir(outside) == ["precious"]
    make_temporary(tmp_path / ".tmp", os.geteuid(), os.getegid(), Deadline(5))
    (tmp_path / ".tmp/link").symlink_to(outside)
    make_temporary(tmp_path / ".tmp", os.geteuid(), os.getegid(), Deadline(5))
    assert os.listdir(tmp_path / ".tmp") == []
    assert os.listdir(outside) == ["precious"]


def test_on_a_slow_host_the_removal_may_take_half_of_the_start(tmp_path, monkeypatch, caplog):
    now = [1000.0]
    monkeypatch.setattr(deadline, "boottime", lambda: now[0])
    unlink = tree_removal._unlink

    def slow(name, folder):
        now[0] += 1.0
        return unlink(name, folder)

    monkeypatch.setattr(tree_removal, "_unlink", slow)
    (tmp_path / ".tmp").mkdir()
    for number in range(40):
        (tmp_path / f".tmp/{number}").touch()
    make_temporary(tmp_path / ".tmp", os.geteuid(), os.getegid(), Deadline(120))
    assert os.listdir(tmp_path / ".tmp") == [] and not caplog.records
    for number in range(40):
        (tmp_path / f".tmp/{number}").touch()
    begun = now[0]
    make_temporary(tmp_path / ".tmp", os.geteuid(), os.getegid(), Deadline(30))
    assert now[0] - begun < 20, "the start has time left"
    assert 0 < len(os.listdir(tmp_path / ".tmp")) < 40, "the next start goes on"
    assert "not all temporary files" in caplog.text and str(tmp_path) in caplog.text


def test_what_cannot_be_made_anew_is_logged(tmp_path, caplog):
    make_temporary(tmp_path / "missing" / ".tmp", os.geteuid(), os.getegid(), Deadline(5))
    assert "cannot be recreated" in caplog.text
