"""libvirt: specifications that no machine can satisfy."""

import pytest

pytest.importorskip("libvirt")

from dispatcher.plugin.errors import ConfigError, Unsupported
from dispatcher.plugin.model import Limits, Network
from dispatcher_libvirt import start
from dispatcher_libvirt.options import Options
from tests.unit.providers.libvirt.test_domain_xml import HOST, spec


def test_control_characters_are_refused():
    for bad in (spec(agent="a\x01b"), spec(cmdline="x\x1b[31m"), spec(command=["/x", "a\x07"])):
        with pytest.raises(ConfigError, match="control characters"):
            start.check_spec(bad, Options(), HOST)


@pytest.mark.parametrize(
    ("one", "options", "error", "why"),
    [
        (spec(network=Network.HOST), Options(), Unsupported, "cannot use the host"),
        (spec(network=Network.PRIVATE), Options(), Unsupported, "providers.libvirt.network"),
        (spec(endpoint="vsock"), Options(), Unsupported, "vhost-vsock"),
        (spec(network_bandwidth="1M"), Options(), ConfigError, "no effect"),
        (spec(endpoint="vsock", network=Network.PRIVATE), Options(network="n"), ConfigError, "excludes a network"),
        (spec(limits=Limits(memory=1 << 20)), Options(), ConfigError, "too little for a machine"),
        (spec(limits=Limits(disk=1 << 20)), Options(), ConfigError, "too little for a data disk"),
    ],
)
def test_impossible_specifications_are_refused(one, options, error, why):
    with pytest.raises(error, match=why):
        start.check_spec(one, options, HOST)
