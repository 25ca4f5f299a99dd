"""What unit tests share: the program, a manager that answers correctly, and a log."""

import io
import logging
import sys

import pytest

from dispatcher.cli import main
from tests.support.fake_manager import FakeManager


@pytest.fixture
def manager(short_tmp, monkeypatch):
    monkeypatch.delenv("DISPATCHER_TOKEN", raising=False)
    with FakeManager(short_tmp / "manager.sock") as fake:
        monkeypatch.setenv("DISPATCHER_MANAGER", fake.url)
        yield fake


@pytest.fixture
def run(capsys, monkeypatch):
    """Run the program; returns exit code, standard output, standard error."""

    def run(*arguments, stdin=None):
        if stdin is not None:
            monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(stdin)))
        code = main(arguments)
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    return run


@pytest.fixture
def log_output():
    """Return a stream for `log.configure`; afterwards logging is as it was before."""
    root, mine = logging.getLogger(), logging.getLogger("dispatcher")
    before = root.handlers[:], root.level, mine.level, logging.raiseExceptions
    yield io.StringIO()
    root.handlers[:], logging.raiseExceptions = before[0], before[3]
    root.setLevel(before[1])
    mine.setLevel(before[2])
    sys.modules["structlog"].reset_defaults()
