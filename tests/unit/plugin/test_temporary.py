"""The directory for temporary files, made and emptied."""

import os

from dispatcher.plugin import Deadline, make_temporary


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
