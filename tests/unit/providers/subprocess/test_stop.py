"""Exit reasons."""

import pytest
from dispatcher_subprocess.stop import exit_reason


@pytest.mark.parametrize(
    "code, oom, reason",
    [
        (0, False, "exit code 0"),
        (1, False, "exit code 1"),
        (137, False, "killed by signal 9 (SIGKILL)"),
        (-9, False, "killed by signal 9 (SIGKILL)"),
        (137, True, "out of memory"),
        (-9, True, "out of memory"),
        (1, True, "exit code 1"),
        (139, False, "killed by signal 11 (SIGSEGV)"),
        (255, False, "exit code 255"),
        (None, True, "ended, reason unknown"),
    ],
)
def test_exit_reasons(code, oom, reason):
    assert exit_reason(code, out_of_memory=oom) == reason
