"""The disk of the manager's state is checked again and again."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from dispatcher.manager.agents.composition import DISK, Supervisor


def test_an_unexpected_error_does_not_end_the_checks(tmp_path):
    again = []

    def fail():
        raise FileNotFoundError("no")

    supervisor = SimpleNamespace(
        data=SimpleNamespace(paths=SimpleNamespace(state_dir=tmp_path / "gone")),
        _disk_is_low=False,
        _database=SimpleNamespace(reserve=fail),
        _slow_timers=SimpleNamespace(after=lambda seconds, run: again.append(seconds)),
        _check_disk=None,
    )
    with pytest.raises(FileNotFoundError):
        Supervisor._check_disk(supervisor)
    assert again == [DISK]
