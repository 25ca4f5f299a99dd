"""What tests of the command line share: the program, and a manager that answers by the book."""

import io

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
