"""A reload that breaks off for a reason nobody expected."""

from __future__ import annotations

import pytest

from dispatcher.manager.auth.sessions import Sessions
from dispatcher.plugin.errors import DispatcherError
from tests.support.manager_process import client_of, manager_in


@pytest.fixture
def manager(tmp_path, monkeypatch):
    file = tmp_path / "dispatcher.toml"
    monkeypatch.setenv("DISPATCHER_CONFIG", str(file))
    file.write_text('[auth]\nsession_idle = "2h"\n[apps.web.subprocess]\ncommand = ["true"]\n')
    with manager_in(tmp_path, monkeypatch, auth={"session_idle": "1h"}) as manager:
        yield manager


def failing(monkeypatch, times):
    """Let the next changes of the sessions' lifetimes fail."""
    left = [OSError(28, "No space left on device")] * times

    def set_lifetimes(sessions, lifetimes, real=Sessions.set_lifetimes):
        if left:
            raise left.pop()
        real(sessions, lifetimes)

    monkeypatch.setattr(Sessions, "set_lifetimes", set_lifetimes)


def test_an_unexpected_error_leaves_the_earlier_configuration_in_use(manager, monkeypatch):
    failing(monkeypatch, 1)
    before = manager.config
    with client_of(manager) as client:
        with pytest.raises(
            DispatcherError, match="The new configuration is not applied: OSError: .* No space"
        ) as told:
            client.reload()
        assert "the earlier one is in use" in told.value.fix
        assert manager.config is before
        assert manager.services.config is before
        assert manager.sessions._lifetimes.idle == 3600
        assert client.healthz()["status"] == "ok"
        assert any("Sessions have new lifetimes" in line for line in client.reload()["changed"])
        assert manager.sessions._lifetimes.idle == 7200


def test_an_earlier_configuration_that_cannot_be_restored_is_told(manager, monkeypatch):
    failing(monkeypatch, 2)
    with client_of(manager) as client, pytest.raises(DispatcherError, match="is applied in part") as told:
        client.reload()
    assert "restart the manager; agents continue to run" in told.value.fix
