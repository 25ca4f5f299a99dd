"""Programs run under a deadline and `progress`."""

import os
import subprocess
import time
from pathlib import Path

import pytest

from dispatcher.plugin import Cancelled, Deadline, DeadlineExceeded, ProviderError, Unavailable, run_command


def run(*command, seconds=20.0, **options):
    return run_command(command, "Cannot do it", deadline=Deadline(seconds), **options)


def living(marker):
    """Return the processes that sleep for `marker` seconds."""
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            if path.read_bytes() == f"sleep\0{marker}\0".encode():
                found.append(path.parent.name)
        except OSError:
            continue
    return found


def gone(marker):
    end = time.monotonic() + 5
    while living(marker) and time.monotonic() < end:
        time.sleep(0.02)
    return not living(marker)


def test_its_output_is_returned_and_its_input_passed(monkeypatch):
    monkeypatch.setenv("OURS", "secret")
    text = b"x" * 300_000
    assert run("cat", stdin=text) == text
    assert b"OURS" not in run("env")
    assert run("env", environment={"A": "1"}) == b"A=1\n"
    assert run("pwd") == b"/\n"


def test_a_failure_is_told_by_its_last_line():
    with pytest.raises(ProviderError) as caught:
        run("sh", "-c", "echo one >&2; printf 'two\\033[31m\\n' >&2; exit 3")
    assert str(caught.value) == "Cannot do it: sh: two?[31m"
    with pytest.raises(ProviderError, match="Cannot do it: false: ended with 1"):
        run("false")


def test_a_program_that_cannot_be_started_is_unavailable(tmp_path):
    with pytest.raises(Unavailable, match="Cannot do it: there is no program 'no-such-thing'"):
        run("no-such-thing")
    broken = tmp_path / "broken"
    broken.write_bytes(b"\0\0")
    broken.chmod(0o755)
    with pytest.raises(Unavailable, match="broken: Exec format error"):
        run(str(broken))


@pytest.mark.parametrize("command", [["sleep", "61.25"], ["sh", "-c", "sleep 61.25 & wait"]])
def test_the_deadline_kills_it_and_its_descendants(command):
    began = time.monotonic()
    with pytest.raises(DeadlineExceeded, match="Cannot do it: it takes too long"):
        run(*command, seconds=0.3)
    assert time.monotonic() - began < 5
    assert gone("61.25")


def test_progress_is_called_and_can_cancel():
    steps = []

    def progress(step, *_):
        steps.append(step)
        if len(steps) == 3:
            raise Cancelled("A newer command")

    with pytest.raises(Cancelled):
        run("sleep", "62.25", progress=progress)
    assert steps == ["Cannot do it"] * 3
    assert gone("62.25")


def test_descriptors_are_passed_and_others_are_not():
    with open("/dev/null") as inherited:
        fd = inherited.fileno()
        found = run("ls", "/proc/self/fd", fds=[fd]).split()
        assert str(fd).encode() in found
    read_end, write_end = os.pipe()
    run("sh", "-c", "echo it", stdin=subprocess.DEVNULL, stdout=write_end)
    os.close(write_end)
    assert os.read(read_end, 10) == b"it\n"
    os.close(read_end)
