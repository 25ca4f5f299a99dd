"""libvirt: domains of the installation and foreign ones, in libvirt's in-memory driver."""

import pytest

libvirt = pytest.importorskip("libvirt")

from dispatcher.plugin.deadline import Deadline
from dispatcher.plugin.errors import ProviderError
from dispatcher.plugin.model import BackendState
from dispatcher_libvirt import domain_xml, observe
from dispatcher_libvirt.connection import Backend, Lane
from dispatcher_libvirt.domain_xml import Label
from dispatcher_libvirt.domains import Domains

NAME = "dispatcher-0123abcd-alice-2bd806c97f0e"


@pytest.fixture
def backend():
    backend = Backend("test:///default", connections=2, keepalive=5)
    yield backend

    def clean(connection):  # all connections of a process to it share one host
        for domain in connection.listAllDomains():
            if domain.name() == NAME:
                if domain.isActive():
                    domain.destroy()
                domain.undefine()

    backend.call(clean, what="cleaning", deadline=Deadline(5))
    backend.close()


def label(**changes):
    values = {
        "installation": "0123abcd",
        "agent": "alice",
        "spec": "f" * 64,
        "started": 1.0,
        "data": {"uid": 1},
        "port": 18_001,
        "guest_port": 8080,
        "network": "",
        "announce": "",
        "guest_agent": False,
    }
    return Label(**values | changes)


def xml(name=NAME, own=None):
    from lxml import etree

    root = etree.Element("domain", type="test")
    etree.SubElement(root, "name").text = name
    etree.SubElement(root, "memory").text = "1024"
    etree.SubElement(etree.SubElement(root, "os"), "type").text = "hvm"
    if own:
        etree.SubElement(root, "metadata").append(domain_xml.label_element(own))
    return etree.tostring(root, encoding="unicode")


def test_machines_are_found_by_name_and_label(backend, monkeypatch):
    monkeypatch.setattr(libvirt, "VIR_DOMAIN_UNDEFINE_NVRAM", 0)  # the in-memory driver knows no such flag
    domains = Domains(backend, "0123abcd")
    assert domains.find(NAME, Deadline(5)) is None
    domains.define(xml(own=label()), NAME, Deadline(5))
    found = domains.find(NAME, Deadline(5))
    assert found.label == label()
    assert not found.active
    assert domains.start(NAME, Deadline(5), lambda: None) is True
    found = domains.find(NAME, Deadline(5))
    assert found.active
    seen = observe.observation(found)
    assert (seen.state, str(seen.endpoint), seen.started_at) == (BackendState.RUNNING, "tcp:127.0.0.1:18001", 1.0)
    domains.remove(NAME, Deadline(5))
    domains.remove(NAME, Deadline(5))
    assert domains.find(NAME, Deadline(5)) is None


@pytest.mark.parametrize("other", [None, label(installation="ffffffff")])
def test_foreign_machines_are_never_touched(backend, other):
    domains = Domains(backend, "0123abcd")

    def define(connection):
        connection.defineXML(xml(own=other)).create()

    backend.call(define, what="defining", deadline=Deadline(5), lane=Lane.WORK)
    found = domains.find(NAME, Deadline(5))
    assert found is None
    assert observe.observation(found).state is BackendState.ABSENT
    assert domains.all(Deadline(5)) == []
    domains.remove(NAME, Deadline(5))
    for refused in (
        lambda: domains.find(NAME, Deadline(5), refuse_foreign=True),
        lambda: domains.define(xml(own=label()), NAME, Deadline(5)),
    ):
        with pytest.raises(ProviderError, match="not the dispatcher's") as caught:
            refused()
        assert "virsh" in caught.value.fix
    assert backend.call(lambda c: c.lookupByName(NAME).isActive(), what="looking", deadline=Deadline(5))
