"""The contract of observers finds each fault, and says what to change."""

import threading

import pytest

from dispatcher.config.plugins import Plugins
from dispatcher.plugin import hookimpl
from dispatcher.testing import ObserverContract


class Contract(ObserverContract):
    plugin = "seen"
    patience = 0.2


def verdict(observe, check="test_later_kinds_are_taken"):
    """Return what a check says about an observer; "" if it passes."""

    class Plugin:
        @hookimpl
        def dispatcher_agent_event(self, event):
            observe(event)

    plugins = Plugins(())
    plugins.register("seen", Plugin() if observe else object(), "")
    try:
        getattr(Contract(), check)(plugins)
    except pytest.fail.Exception as failure:
        return failure.msg
    return ""


def leave_a_thread(_event):
    threading.Thread(target=threading.Event().wait, args=(3,), daemon=True).start()


def leave(status):
    raise SystemExit(status)


CHECKS = [name for name in vars(ObserverContract) if name.startswith("test_") and "kind" not in name]


@pytest.mark.parametrize("check", [name for name in CHECKS if name != "test_entry_point_is_declared_once"])
def test_a_good_one_passes(check):
    assert verdict(lambda event: None, check) == ""


@pytest.mark.parametrize(
    ("observe", "check", "words"),
    [
        (None, "test_plugin_is_an_observer", "has no function dispatcher_agent_event(event)"),
        (lambda event: leave(3), "test_later_kinds_are_taken", "raised SystemExit (3) for a-later-kind"),
        (lambda event: {"died": 1}[event.kind], "test_later_kinds_are_taken", "raised KeyError"),
        (lambda event: threading.Event().wait(1), "test_later_kinds_are_taken", "has not returned 0.2 s after"),
        (lambda event: event.detail.split()[0], "test_odd_texts_are_taken", "raised IndexError"),
        (lambda event: event.detail.encode("ascii"), "test_odd_texts_are_taken", "raised UnicodeEncodeError"),
        (leave_a_thread, "test_many_events_leave_nothing", "threads behind: the manager calls"),
    ],
)
def test_a_fault_is_found(observe, check, words):
    assert words in verdict(observe, check)


def test_one_that_is_not_installed_is_told(monkeypatch):
    with pytest.raises(pytest.fail.Exception, match="no installed distribution declares the plugin 'seen'"):
        Contract().test_entry_point_is_declared_once()
