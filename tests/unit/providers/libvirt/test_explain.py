"""libvirt: the isolation in sentences."""

import pytest

pytest.importorskip("libvirt")

from dispatcher.plugin.model import App, Level, Limits
from dispatcher_libvirt import explain
from dispatcher_libvirt.options import AppOptions, Options
from tests.unit.providers.libvirt.test_domain_xml import HOST


def test_findings_name_the_limits_of_the_isolation():
    def say(**changes):
        options = AppOptions.model_validate({"kernel": "/k", **changes.pop("own", {})})
        app = App(name="vm", provider="libvirt", options=options, **changes)
        return list(explain.application(app, changes.pop("options", Options()), HOST))

    assert [one.level for one in say()] == [Level.OK]
    assert any("limit of processes" in one.what for one in say(limits=Limits(pids=10)))
    assert any("adds to its machine" in one.what for one in say(own={"xml": ["<watchdog model='i6300esb'/>"]}))
    (vsock,) = say(own={"endpoint": "vsock"})
    assert (vsock.level, "AF_VSOCK" in vsock.what) == (Level.WARNING, True)
    assert any("127.0.0.1" in one.what and one.level is Level.WARNING for one in explain.backend(HOST))
    assert any("are unknown" in one.what for one in explain.backend(None))
