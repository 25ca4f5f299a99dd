"""libvirt: the isolation in sentences."""

import pytest

pytest.importorskip("libvirt")

from dispatcher.plugin.model import App, Level, Limits, Network
from dispatcher_libvirt import explain
from dispatcher_libvirt.options import AppOptions, Options
from tests.unit.providers.libvirt.test_domain_xml import HOST


def test_findings_name_the_limits_of_the_isolation():
    def say(unbounded=None, **changes):
        general = changes.pop("options", Options())
        options = AppOptions.model_validate({"kernel": "/k", **changes.pop("own", {})})
        app = App(name="vm", provider="libvirt", options=options, **changes)
        return list(explain.application(app, general, HOST, unbounded))

    assert [one.level for one in say()] == [Level.OK]
    assert any("limit of processes" in one.what for one in say(limits=Limits(pids=10)))
    assert any("adds to its machine" in one.what for one in say(own={"xml": ["<watchdog model='i6300esb'/>"]}))
    on_network = {"network": Network.PRIVATE, "options": Options(network="default")}
    assert not [one for one in say(**on_network) if "tracked connections" in one.what]
    (told,) = [one for one in say(**on_network, unbounded=("no nft", "fix")) if "tracked" in one.what]
    assert (told.level, told.fix, "no nft" in told.what) == (Level.WARNING, "fix", True)
    (vsock,) = say(own={"endpoint": "vsock"})
    assert (vsock.level, "AF_VSOCK" in vsock.what) == (Level.WARNING, True)
    assert any("127.0.0.1" in one.what and one.level is Level.WARNING for one in explain.backend(HOST))
    assert any("are unknown" in one.what for one in explain.backend(None))
