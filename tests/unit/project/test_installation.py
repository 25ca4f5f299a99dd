"""What tests themselves start ends with them, also when it does not come up."""

from pathlib import Path

import pytest

from tests.support.installation import Installation


def processes_with(text):
    return [path.parent.name for path in Path("/proc").glob("[0-9]*/cmdline") if text.encode() in contents(path)]


def contents(path):
    try:
        return path.read_bytes()
    except OSError:  # it has ended
        return b""


def test_a_daemon_that_does_not_come_up_is_ended_and_nothing_is_left(tmp_path):
    base = tmp_path / "d"
    base.mkdir()
    with pytest.raises(AssertionError, match="ended with 2"), Installation(base, extra="nonsense = 1") as site:
        site.start("manager")
    assert not processes_with(str(base))
    assert not base.exists()


def test_one_that_hangs_is_ended(tmp_path, monkeypatch):
    base = tmp_path / "d"
    base.mkdir()

    def never(what, check, seconds=20.0):
        check()
        raise AssertionError(what)

    monkeypatch.setattr("tests.support.installation.until", never)
    with pytest.raises((AssertionError, OSError)), Installation(base) as site:
        site.start("proxy")
    assert not processes_with(str(base))
    assert not base.exists()
