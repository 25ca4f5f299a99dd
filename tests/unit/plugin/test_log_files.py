"""Log files: rotated by their writer, read from the end, removed."""

import pytest

from dispatcher.plugin import Deadline, read_lines, remove_logs
from dispatcher.plugin.processes.rotated_log import RotatedLog


def read(path, tail):
    return list(read_lines(path, tail=tail, follow=False, deadline=Deadline(1)))


@pytest.fixture
def path(tmp_path):
    return tmp_path / "output.log"


def test_files_are_rotated_and_bounded(path, tmp_path):
    log = RotatedLog(str(path), 1000, 3)
    for number in range(500):
        log.write(b"%06d\n" % number)
        assert sum(file.stat().st_size for file in tmp_path.iterdir()) <= 3000
    assert sorted(file.name for file in tmp_path.iterdir()) == ["output.log", "output.log.1", "output.log.2"]
    assert read(path, 3) == [b"000497", b"000498", b"000499"]
    everything = read(path, 10_000)
    assert everything[-1] == b"000499" and 280 < len(everything) < 430
    assert everything[1:] == [b"%06d" % number for number in range(int(everything[1]), 500)]


def test_one_write_larger_than_all_files(path, tmp_path):
    log = RotatedLog(str(path), 1000, 2)
    log.write(b"x" * 10_000 + b"end\n")
    assert sum(file.stat().st_size for file in tmp_path.iterdir()) <= 2000
    assert read(path, 1)[-1].endswith(b"xend")


def test_a_single_file_is_emptied(path):
    log = RotatedLog(str(path), 100, 1)
    for number in range(100):
        log.write(b"%03d\n" % number)
    assert path.stat().st_size <= 100
    assert read(path, 1) == [b"099"]


def test_a_restarted_writer_goes_on_where_the_file_ends(path):
    RotatedLog(str(path), 1000, 3).write(b"one\n")
    RotatedLog(str(path), 1000, 3).write(b"two\n")
    assert read(path, 10) == [b"one", b"two"]


def test_a_link_in_the_place_of_the_file_is_not_followed(path, tmp_path):
    target = tmp_path / "target"
    path.symlink_to(target)
    log = RotatedLog(str(path), 1000, 3)
    log.write(b"secret\n")
    assert not target.exists() and log.dropped == 7
    assert read(path, 10) == []


@pytest.mark.parametrize(
    "text, tail, expected",
    [
        (b"", 5, []),
        (b"a\nb\nc\n", 0, []),
        (b"a\nb\nc\n", 2, [b"b", b"c"]),
        (b"a\nb\nc", 2, [b"b", b"c"]),
        (b"a\nb\nc", 1, [b"c"]),
        (b"a\n\n\n", 2, [b"", b""]),
        (b"a\r\nb\r\n", 5, [b"a", b"b"]),
        (b"x" * 70_000 + b"\n", 5, [b"x" * 65_536, b"x" * 4_464]),
    ],
)
def test_tails(path, text, tail, expected):
    path.write_bytes(text)
    assert read(path, tail) == expected


def test_tail_zero_of_an_unfinished_line_yields_nothing(path):
    path.write_bytes(b"half")
    assert read(path, 0) == []


def test_removal_takes_all_files(path, tmp_path):
    log = RotatedLog(str(path), 10, 4)
    for _ in range(10):
        log.write(b"123456789\n")
    log.close()
    remove_logs(path)
    remove_logs(path)
    assert list(tmp_path.iterdir()) == []
