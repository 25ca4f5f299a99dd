"""libvirt: consoles as logs."""

import threading
import time

import pytest

pytest.importorskip("libvirt")

from dispatcher.plugin.deadline import Deadline
from dispatcher.plugin import read_lines
from dispatcher_libvirt import logs


def tail(directory, count):
    return list(read_lines(directory / logs.NAME, newest=0, tail=count, follow=False, deadline=Deadline(1)))


def test_logs_are_the_last_lines_over_rotated_files(tmp_path):
    assert tail(tmp_path, 5) == []
    (tmp_path / "console.log.1").write_bytes(b"one\r\ntwo\r\n")
    (tmp_path / "console.log.0").write_bytes(b"three\r\nfo")
    (tmp_path / "console.log").write_bytes(b"ur\r\nfive\r\n\xff\x00odd\nlast without end")
    assert tail(tmp_path, 3) == [b"five", b"\xff\x00odd", b"last without end"]
    assert tail(tmp_path, 5) == [b"three", b"four", b"five", b"\xff\x00odd", b"last without end"]
    assert tail(tmp_path, 99)[:2] == [b"one", b"two"]
    assert tail(tmp_path, 0) == []


def test_long_lines_are_cut(tmp_path):
    (tmp_path / "console.log").write_bytes(b"y" * 150_000 + b"\nend\n")
    assert [len(line) for line in tail(tmp_path, 10)] == [65_536, 65_536, 18_928, 3]


def test_following_sees_new_lines_over_a_rotation_and_none_twice(tmp_path):
    log = tmp_path / "console.log"
    log.write_bytes(b"old\nhalf")

    def write():
        time.sleep(0.3)
        with log.open("ab") as file:
            file.write(b" a line\nsecond\n")
        time.sleep(0.4)
        log.rename(tmp_path / "console.log.0")
        log.write_bytes(b"third\n")

    writer = threading.Thread(target=write)
    writer.start()
    lines = list(read_lines(tmp_path / logs.NAME, newest=0, tail=1, follow=True, deadline=Deadline(1.6)))
    writer.join()
    assert lines == [b"old", b"half a line", b"second", b"third"]


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        (b"noise\ndispatcher: the app ended: exit code 7\r\n[ 2.0] reboot: Power down\n", "exit code 7"),
        (b"dispatcher: the app ended: exit code 7\ndispatcher: the machine starts\nnoise\n", ""),
        (b"[ 1.0] Kernel panic - not syncing: Attempted to kill init!\n", "kernel panic: Attempted to kill init!"),
        (b"dispatcher: the app ended: \x1b[31m\n", ""),
        (b"", ""),
    ],
)
def test_the_guest_reports_its_exit_reason(tmp_path, text, reason):
    (tmp_path / "console.log").write_bytes(text)
    assert logs.exit_reason(tmp_path) == reason


def test_console_lines_are_shown_in_printable_form(tmp_path):
    logs.begin(tmp_path)
    assert logs.last_line(tmp_path) == "the machine starts"
    (tmp_path / "console.log").write_bytes(b"\x1b[31mred\x07" + b"x" * 1000 + b"\n")
    shown = logs.last_line(tmp_path)
    assert shown.isprintable()
    assert len(shown) <= 120


def test_kills_for_memory_are_counted_since_the_start(tmp_path):
    log = tmp_path / "console.log"
    assert logs.oom_kills(tmp_path) == 0
    kill = b"[   9.1] Out of memory: Killed process 71 (python3) total-vm:1kB\r\n"
    log.write_bytes(kill + b"dispatcher: the machine starts\n" + kill + b"noise\r\n")
    assert logs.oom_kills(tmp_path) == 1
    with log.open("ab") as file:
        file.write(kill)
    assert logs.oom_kills(tmp_path) == 2
    log.rename(tmp_path / "console.log.0")
    log.write_bytes(kill)
    assert logs.oom_kills(tmp_path) == 3, "a rotation loses none"


def test_the_guest_says_where_programs_listen(tmp_path):
    said = b"dispatcher: nothing listens at the app's port, only at "
    (tmp_path / "console.log").write_bytes(
        said + b"tcp:127.0.0.1:1 \r\n" + said + b"tcp:127.0.0.1:8888 tcp:[::1]:9 \r\n"
    )
    assert logs.listeners(tmp_path) == ["tcp:127.0.0.1:8888", "tcp:[::1]:9"]
    logs.begin(tmp_path)
    assert logs.listeners(tmp_path) == []
