"""Bounded calls of plugins."""

import threading
import time

import pytest

from dispatcher.common.contained import PluginRef, bounded, instance
from dispatcher.plugin.errors import PluginError


@pytest.mark.parametrize("fault", [KeyboardInterrupt, SystemExit, GeneratorExit, RuntimeError])
def test_what_a_plugin_raises_ends_no_main_thread(fault):
    """The manager starts in its main thread, where KeyboardInterrupt is also Ctrl-C."""

    def work():
        raise fault

    assert threading.current_thread() is threading.main_thread()
    with pytest.raises(PluginError, match="authenticator ldap failed in its creation") as caught:
        bounded(PluginRef("authenticator", "ldap", "acme 1"), "its creation", work)
    assert fault.__name__ in caught.value.why and "acme 1" in caught.value.fix


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_a_thread_that_cannot_run_is_an_error_at_once():
    """A trace function that raises ends every new thread before its first line."""

    def trace(*_):
        raise RuntimeError

    began = time.monotonic()
    threading.settrace(trace)
    try:
        with pytest.raises(
            PluginError, match="plugin odd failed in its import: its thread ended without a result"
        ):
            bounded(PluginRef("plugin", "odd", "acme 1"), "its import", lambda: None)
    finally:
        threading.settrace(None)
    assert time.monotonic() - began < 5


def test_a_class_that_makes_something_else_is_refused():
    class Other:
        def __new__(cls, **_):
            return "other"

    with pytest.raises(TypeError, match=r"Other\(\) returned a value of the type str"):
        instance(Other, options=1)
