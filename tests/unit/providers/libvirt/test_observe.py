"""libvirt: states of domains as states of agents."""

import pytest

libvirt = pytest.importorskip("libvirt")

from dispatcher.plugin.model import BackendState
from dispatcher_libvirt import observe
from dispatcher_libvirt.domains import DomainInfo
from tests.unit.providers.libvirt.test_domains import NAME, label


@pytest.mark.parametrize(
    ("changes", "state", "reason"),
    [
        ({"id": 3, "state": libvirt.VIR_DOMAIN_RUNNING}, BackendState.RUNNING, ""),
        ({"id": 3, "state": libvirt.VIR_DOMAIN_SHUTDOWN}, BackendState.RUNNING, ""),
        ({"id": 3, "state": libvirt.VIR_DOMAIN_NOSTATE}, BackendState.STARTING, ""),
        ({"id": 3, "state": libvirt.VIR_DOMAIN_PAUSED, "reason": 1}, BackendState.SUSPENDED, ""),
        (
            {"id": 3, "state": libvirt.VIR_DOMAIN_PAUSED, "reason": libvirt.VIR_DOMAIN_PAUSED_STARTING_UP},
            BackendState.STARTING,
            "",
        ),
        (
            {"id": 3, "state": libvirt.VIR_DOMAIN_PAUSED, "reason": libvirt.VIR_DOMAIN_PAUSED_CRASHED},
            BackendState.STOPPED,
            "the guest crashed",
        ),
        ({"id": 3, "state": libvirt.VIR_DOMAIN_PMSUSPENDED}, BackendState.SUSPENDED, ""),
        ({"id": 3, "state": libvirt.VIR_DOMAIN_CRASHED}, BackendState.STOPPED, "the guest crashed"),
        ({"saved": True}, BackendState.HIBERNATED, ""),
        ({"reason": libvirt.VIR_DOMAIN_SHUTOFF_SHUTDOWN}, BackendState.STOPPED, "the guest shut down"),
        ({"reason": libvirt.VIR_DOMAIN_SHUTOFF_CRASHED}, BackendState.STOPPED, "QEMU crashed or was killed"),
        ({"reason": libvirt.VIR_DOMAIN_SHUTOFF_FAILED}, BackendState.STOPPED, "QEMU did not start"),
        ({"reason": libvirt.VIR_DOMAIN_SHUTOFF_DESTROYED}, BackendState.STOPPED, "forced off through libvirt"),
        ({"reason": libvirt.VIR_DOMAIN_SHUTOFF_DAEMON}, BackendState.STOPPED, "while libvirtd was down"),
        ({"reason": 99}, BackendState.STOPPED, "ended"),
    ],
)
def test_states_of_libvirt_mean_states_of_agents(changes, state, reason):
    values = {
        "name": NAME,
        "uuid": "u",
        "id": -1,
        "state": libvirt.VIR_DOMAIN_SHUTOFF,
        "reason": 0,
        "saved": False,
        "label": label(),
    }
    seen = observe.observation(DomainInfo(**values | changes))
    assert seen.state is state
    assert reason in seen.exit_reason
    assert bool(reason) == bool(seen.exit_reason)
    if state in {BackendState.RUNNING, BackendState.SUSPENDED}:
        assert str(seen.endpoint) == "tcp:127.0.0.1:18001"
    if changes.get("id", -1) < 0:
        assert seen.endpoint is None


def test_endpoints_of_other_networks():
    found = DomainInfo(name=NAME, uuid="u", id=1, state=1, reason=0, saved=False, label=label(port=0), cid=7)
    assert str(observe.endpoint(found)) == "vsock:7:8080"
    found = DomainInfo(
        name=NAME, uuid="u", id=1, state=1, reason=0, saved=False, label=label(port=0, address="192.0.2.7")
    )
    assert str(observe.endpoint(found)) == "tcp:192.0.2.7:8080"
    found = DomainInfo(name=NAME, uuid="u", id=1, state=1, reason=0, saved=False, label=label(port=0))
    assert observe.endpoint(found) is None


def test_the_data_disk_is_the_one_that_is_counted(tmp_path):
    data = tmp_path / "data.raw"
    data.write_bytes(b"x" * 8192)
    stats = {
        "block.count": 3,
        "block.0.path": "/pool/root-data.qcow2",
        "block.0.allocation": 7,
        "block.1.path": str(data),
        "block.1.allocation": 9,
        "block.1.capacity": 1 << 30,
    }
    here = observe.usage_of(stats, local=True)
    assert here.disk == data.stat().st_blocks * 512 and here.disk_limit == 1 << 30
    assert observe.usage_of(stats | {"block.1.path": "NAME.data-3.raw"}, local=False).disk == 9
    assert observe.usage_of({"block.count": 0}, local=True).disk is None
