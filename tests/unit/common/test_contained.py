"""Bounded calls of plugins."""

import threading

import pytest

from dispatcher.common.contained import PluginRef, bounded
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
