"""A shim: it outlives who started it, writes the log and records the exit."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from dispatcher.plugin import (
    BackendState,
    Cancelled,
    Deadline,
    DeadlineExceeded,
    Process,
    ProviderError,
    Shim,
    Unavailable,
    process_stat,
    read_lines,
)
from dispatcher.plugin.processes import shim as shim_module

ENVIRONMENT = {"PATH": os.defpath, "GREETING": "hé\n$x"}


@pytest.fixture
def shim(tmp_path):
    shim = Shim(tmp_path / "agent")
    yield shim
    if shim.process:
        shim.process.send(signal.SIGKILL)


def start(shim, *command, seconds=20.0, **options):
    options = {"environment": ENVIRONMENT, "log": shim.directory.parent / "log", "umask": 0o077, **options}
    return shim.start(command, {"hash": "h"}, deadline=Deadline(seconds), **options)


def log(shim):
    return list(read_lines(shim.directory.parent / "log", tail=100, follow=False, deadline=Deadline(1)))


def eventually(condition, seconds=10.0):
    end = time.monotonic() + seconds
    while not (found := condition()) and time.monotonic() < end:
        time.sleep(0.01)
    return found


def test_a_command_runs_as_it_is_told(shim, tmp_path):
    script = 'printf "%s|" "$GREETING"; umask; pwd; cat; ls /proc/self/fd | wc -l; echo error >&2; exit 7'
    process = start(shim, "sh", "-c", script, stdin=b"input\n", cwd=tmp_path, umask=0o027)
    assert process.wait(10)
    assert shim.exit_code is None or shim.exit_code == 7
    assert shim.exit_reason() == "exit code 7" and shim.exit_code == 7
    assert shim.state is BackendState.STOPPED and shim.record == {"hash": "h"}
    assert log(shim) == ["hé".encode(), b"$x|0027", str(tmp_path).encode(), b"input", b"4", b"error"], (
        "the exit is recorded after the last output; no descriptor of ours is open in it"
    )


def test_its_end_by_a_signal(shim):
    process = start(shim, "sleep", "60")
    assert shim.state is BackendState.RUNNING and shim.exit_reason() == "" and shim.exit_code is None
    process.send(signal.SIGKILL)
    assert process.wait(10)
    assert shim.exit_reason(out_of_memory=True) == "out of memory"
    assert shim.exit_reason() == "killed by signal 9 (SIGKILL)"


def test_another_process_finds_it_after_the_first_has_ended(shim):
    wait = "until [ -e go ]; do sleep 0.05; done; echo late; exit 3"
    program = (
        "import sys; from pathlib import Path; from dispatcher.plugin import Deadline, Shim\n"
        f"Shim(Path({str(shim.directory)!r})).start(['sh', '-c', {wait!r}], {{}},"
        f" environment={{}}, cwd={str(shim.directory.parent)!r}, log=Path({str(shim.directory.parent / 'log')!r}), deadline=Deadline(20))\n"
    )
    subprocess.run([sys.executable, "-c", program], check=True, timeout=30)
    assert shim.state is BackendState.RUNNING
    assert process_stat(shim.process.pid).parent != os.getpid()
    (shim.directory.parent / "go").touch()
    assert shim.process.wait(10)
    assert shim.exit_reason() == "exit code 3" and log(shim) == [b"late"]


def test_no_child_is_left_to_the_caller(shim):
    start(shim, "true").wait(10)
    with pytest.raises(ChildProcessError):
        os.waitpid(-1, os.WNOHANG)


def test_a_command_that_leaves_the_agent_behind(shim, tmp_path):
    """As container runtimes do: the shim becomes the parent of the process in the pid file."""
    left = f"sh -c 'echo inner; sleep 0.3; exit 5' & echo $! >{tmp_path}/pid"
    process = start(shim, "sh", "-c", left, pid_file=tmp_path / "pid")
    assert process.pid == int((tmp_path / "pid").read_text()) and shim.state is BackendState.RUNNING
    assert process.wait(10)
    assert shim.exit_reason() == "exit code 5" and log(shim) == [b"inner"]


def test_a_start_that_fails_says_why(shim, tmp_path):
    with pytest.raises(ProviderError, match="Cannot start the agent: there is no program 'no-such-thing'"):
        start(shim, "no-such-thing")
    with pytest.raises(ProviderError, match="Cannot start the agent: bad news"):
        start(shim, "sh", "-c", "echo more; echo bad news; exit 1", pid_file=tmp_path / "pid")
    assert log(shim)[-2:] == [b"more", b"bad news"]
    broken = tmp_path / "broken"
    broken.write_bytes(b"\0\0")
    broken.chmod(0o755)
    with pytest.raises(ProviderError, match="broken: Exec format error"):
        start(shim, str(broken))
    with pytest.raises(ProviderError, match="The credentials are too long"):
        start(shim, "true", stdin=b"x" * 100_000)
    assert shim.state is BackendState.ABSENT
    start(shim, "true")


def test_a_start_that_takes_too_long_or_is_cancelled_leaves_no_process(shim, tmp_path):
    def cancel(*_):
        raise Cancelled("A newer command")

    slow = ["sh", "-c", "echo $$ >slow; exec sleep 60"]
    for error, options in ((DeadlineExceeded, {"seconds": 0.5}), (Cancelled, {"progress": cancel})):
        (tmp_path / "slow").unlink(missing_ok=True)
        with pytest.raises(error):
            start(shim, *slow, pid_file=tmp_path / "pid", cwd=tmp_path, **options)
        assert shim.process is None
        if (tmp_path / "slow").exists():
            pid = int((tmp_path / "slow").read_text())
            assert eventually(lambda: process_stat(pid) is None or process_stat(pid).dead)


def test_a_start_that_is_given_up_ends_what_the_command_has_forked(shim, tmp_path, monkeypatch):
    answer = shim_module._answer

    def once_forked(*arguments):
        said = answer(*arguments)
        assert eventually((tmp_path / "child").exists)
        return said

    monkeypatch.setattr(shim_module, "_answer", once_forked)
    with pytest.raises(DeadlineExceeded):
        start(shim, "sh", "-c", "sleep 60 & echo $! >new; mv new child; wait", cwd=tmp_path, seconds=0)
    pid = int((tmp_path / "child").read_text())
    assert eventually(lambda: process_stat(pid) is None or process_stat(pid).dead)
    assert shim.record is None


def test_output_is_bounded_and_a_flood_ends(shim):
    start(shim, "sh", "-c", "yes | head -c 3000000; echo end", log_size=100_000, log_files=3).wait(30)
    assert shim.exit_reason() == "exit code 0"
    assert eventually(lambda: log(shim)[-1:] == [b"end"])
    sizes = [path.stat().st_size for path in shim.directory.parent.glob("log*")]
    assert len(sizes) == 3 and max(sizes) <= 100_000


def test_a_machine_that_was_restarted_and_a_start_that_was_interrupted(shim):
    start(shim, "sleep", "60")
    process = shim.process
    record, known = shim.directory / "record", json.loads((shim.directory / "record").read_text())
    shim.note(reason="")
    assert shim.record == {"hash": "h", "reason": ""}
    (shim.directory / "process").unlink()
    assert shim.state is BackendState.STARTING, "this process, which lives, starts it"
    record.write_text(json.dumps(known | {"starter": [process.pid, 1]}))
    assert shim.state is BackendState.STOPPED and shim.exit_reason() == "its start was interrupted"
    record.write_text(json.dumps(known | {"boot": "another"}))
    assert shim.state is BackendState.STOPPED and shim.exit_reason() == "the machine was restarted"
    process.send(signal.SIGKILL)
    shim.remove()
    shim.remove()
    assert shim.state is BackendState.ABSENT and shim.record is None
    record.write_text("{")
    with pytest.raises(Unavailable, match="it is damaged"):
        _ = shim.state


def test_a_shim_that_is_killed_leaves_the_agent_and_takes_its_exit_code(shim):
    start(shim, "sleep", "60")
    parent = Process(*json.loads((shim.directory / "process").read_text())["processes"][1])
    parent.send(signal.SIGKILL)
    assert parent.wait(10) and shim.state is BackendState.RUNNING
    shim.process.send(signal.SIGTERM)
    assert shim.process.wait(10) and shim.exit_reason() == "ended, reason unknown"


def test_it_is_small(shim):
    """There is one for each agent."""
    start(shim, "sleep", "60")
    pid = json.loads((shim.directory / "process").read_text())["processes"][1][0]
    status = dict(line.split(":", 1) for line in Path(f"/proc/{pid}/status").read_text().splitlines())
    assert int(status["RssAnon"].split()[0]) < 5000, "kB"
    assert "typing" not in Path(f"/proc/{pid}/maps").read_text()
