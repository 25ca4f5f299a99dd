"""libvirt: domain XML of a specification.  Names and options stay data; libvirt's schema validates the whole."""

import dataclasses
import ipaddress
from pathlib import Path

import pytest

pytest.importorskip("libvirt")

from lxml import etree

from dispatcher.plugin.model import AgentSpec, App, Limits, Network
from dispatcher_libvirt import domain_xml, xml_input
from dispatcher_libvirt.domain_xml import Start
from dispatcher_libvirt.host import Host
from dispatcher_libvirt.network import Interface
from dispatcher_libvirt.options import AppOptions

SCHEMA = Path("/usr/share/libvirt/schemas/domain.rng")
HOST = Host(
    kind="qemu", arch="x86_64", qemu=(64055, 64055), own_users=True, why_not="", cpu_limits=True, vsock=False
)
EVIL = """a"b'c<d>&amp;&e;]]>--><x/>,hostfwd=tcp::22-:22 -drive file=/etc/shadow {port}"""


def spec(agent="alice", *, limits=Limits(), network=Network.NONE, environment=None, **options):
    options = {"kernel": "/k", "initrd": "/i"} | options
    app = App(
        name="vm",
        provider="libvirt",
        options=AppOptions.model_validate(options),
        limits=limits,
        network=network,
        environment=environment or {},
    )
    return AgentSpec(
        installation="0123abcd",
        agent=agent,
        user=agent,
        app=app,
        uid=200_123,
        gid=200_124,
        proxy_gid=1,
        data_dir=Path("/d"),
        run_dir=Path("/r"),
        log_dir=Path("/l"),
    )


def xml(one, **changes):
    values = {
        "host": HOST,
        "root": Path("/m/root.qcow2"),
        "data": Path("/m/data.raw"),
        "cloud_init": Path("/s/seed.iso"),
        "console": Path("/l/console.log"),
        "started": 1234.5,
        "port": 18_123,
    }
    return domain_xml.build(one, Start(**values | changes))


def interface(network="n"):
    return Interface(
        network=network,
        filter="dispatcher-f",
        address=ipaddress.IPv4Interface("192.0.2.7/24"),
        gateway=ipaddress.IPv4Address("192.0.2.1"),
    )


def tree(one, **changes):
    return etree.fromstring(xml(one, **changes))


def label_of(root):
    text = etree.tostring(root.find(f"metadata/{{{domain_xml.NAMESPACE}}}agent"), encoding="unicode")
    return domain_xml.parse_label(text)


SHAPES = {
    "direct boot": (spec(), {}),
    "limits": (spec(limits=Limits(memory=256 << 20, cpus=1.5, disk=1 << 30), cpu_shares=100, balloon="128M"), {}),
    "bandwidth": (spec(disk_bandwidth="10M", disk_iops=100), {}),
    "image": (spec(image="/base.qcow2", kernel=None, initrd=None), {}),
    "raw image": (spec(image="/base.raw", format="raw", firmware="efi", kernel=None, initrd=None), {}),
    "network": (
        spec(network=Network.PRIVATE, network_bandwidth="1M"),
        {"interface": interface("default"), "port": 0},
    ),
    "vsock": (spec(endpoint="vsock"), {"port": 0}),
    "kvm": (spec(guest_agent=True), {"host": dataclasses.replace(HOST, kind="kvm", own_users=False)}),
    "emulated": (spec(), {"host": dataclasses.replace(HOST, bounded_cache=True)}),
    "model": (spec(cpu="Nehalem", machine="pc"), {}),
    "extra": (
        spec(
            xml=["<watchdog model='i6300esb' action='reset'/>", "<memoryBacking><nosharepages/></memoryBacking>"]
        ),
        {},
    ),
}


@pytest.fixture(scope="module")
def schema():
    if not SCHEMA.exists():
        pytest.skip("libvirt's schemas are not installed")
    return etree.RelaxNG(file=str(SCHEMA))


@pytest.mark.parametrize("shape", SHAPES)
def test_libvirt_accepts_the_description(schema, shape):
    one, changes = SHAPES[shape]
    assert schema.validate(tree(one, **changes)), schema.error_log


def test_the_translation_cache_of_emulation_is_bounded():
    emulated = tree(spec(), host=dataclasses.replace(HOST, bounded_cache=True)).find("features/tcg/tb-cache")
    assert (emulated.text, emulated.get("unit")) == ("64", "MiB")
    assert tree(spec()).find("features/tcg") is None, "libvirt is too old, or there is nothing to translate"


def test_an_emulated_processor_lacks_features_that_are_slow_to_emulate():
    def disabled(**changes):
        cpu = tree(spec(), host=dataclasses.replace(HOST, **changes)).find("cpu")
        return cpu.get("mode"), [feature.get("name") for feature in cpu.iterfind("feature[@policy='disable']")]

    assert disabled() == ("maximum", ["erms", "fsrm"])
    assert disabled(arch="aarch64") == ("maximum", [])
    assert disabled(kind="kvm") == ("host-passthrough", [])


@pytest.mark.parametrize("field", ["agent", "cmdline", "console", "root", "network"])
def test_every_value_stays_data(field):
    given = {"interface": interface(), "port": 0}
    path = Path("/" + EVIL.replace("/", "_"))
    before = tree(spec(image="/base.qcow2"), **given)
    after = {
        "agent": lambda: tree(spec(agent=EVIL, image="/base.qcow2"), **given),
        "cmdline": lambda: tree(spec(cmdline=EVIL, image="/base.qcow2"), **given),
        "console": lambda: tree(spec(image="/base.qcow2"), **given | {"console": path}),
        "root": lambda: tree(spec(image="/base.qcow2"), **given | {"root": path}),
        "network": lambda: tree(spec(image="/base.qcow2"), **given | {"interface": interface(EVIL)}),
    }[field]()
    assert [one.tag for one in before.iter()] == [one.tag for one in after.iter()]
    if field == "agent":
        assert label_of(after).agent == EVIL
        return
    assert any(
        EVIL.replace("/", "_") in value.replace("/", "_")
        for one in after.iter()
        for value in (one.text or "", *one.attrib.values())
    )


def test_qemu_gets_numbers_only_and_the_guest_no_way_out():
    root = tree(spec(port=9000))
    arguments = [one.get("value") for one in root.iter(f"{{{domain_xml.QEMU}}}arg")]
    assert arguments[0:3:2] == ["-netdev", "-device"]
    assert arguments[1] == ("user,id=dispatcher0,restrict=on,ipv6=off,hostfwd=tcp:127.0.0.1:18123-10.0.2.15:9000")
    assert root.find("devices/interface") is None


def test_a_machine_on_a_network_has_the_address_that_was_chosen_for_it():
    root = tree(spec(network=Network.PRIVATE), interface=interface(), port=0)
    shown = root.find("devices/interface")
    assert shown.find("mac").get("address") == "52:54:c0:00:02:07"
    parameters = {one.get("name"): one.get("value") for one in shown.iterfind("filterref/parameter")}
    assert (shown.find("filterref").get("filter"), parameters) == ("dispatcher-f", {"IP": "192.0.2.7"})
    assert (label_of(root).network, label_of(root).address) == ("n", "192.0.2.7")


def test_identity_and_labels():
    one = spec(limits=Limits(memory=256 << 20, disk=100 << 20))
    root = tree(one)
    label = label_of(root)
    assert (label.installation, label.agent, label.spec, label.port) == ("0123abcd", "alice", one.hash, 18_123)
    assert label.started == 1234.5
    handle = label.handle(one.backend_name)
    assert handle == domain_xml.handle_of(one, remote=False)
    assert handle.data["disk"] == 100 << 20
    assert root.findtext("memory") == str(256 * 1024)
    assert root.findtext("seclabel/label") == "+200123:+64055"
    assert root.find("seclabel").get("relabel") == "no"
    assert [one.text for one in root.iterfind("devices/disk/serial")] == [
        domain_xml.DATA_SERIAL,
        domain_xml.CLOUD_INIT_SERIAL,
    ]


def test_two_starts_have_two_identities():
    one = spec()
    assert tree(one).findtext("uuid") != tree(one).findtext("uuid")


def test_the_overlays_base_is_given_explicitly_and_never_relabelled():
    shared = dataclasses.replace(HOST, own_users=False)
    root = tree(spec(image="/base.qcow2", kernel=None, initrd=None), host=shared)
    disk = root.find("devices/disk")
    assert disk.find("backingStore/source").get("file") == "/base.qcow2"
    assert disk.find("backingStore/source/seclabel").get("relabel") == "no"
    assert disk.find("backingStore/backingStore") is not None, "nothing is probed below it"
    assert root.find("seclabel") is None


def test_limits_reach_libvirt():
    root = tree(spec(limits=Limits(cpus=1.5), cpu_shares=300, balloon="128M", default_memory="256M"))
    assert root.findtext("vcpu") == "2"
    assert root.findtext("cputune/global_quota") == "150000"
    assert root.findtext("cputune/shares") == "300"
    assert (root.findtext("memory"), root.findtext("currentMemory")) == ("262144", "131072")
    unlimited = dataclasses.replace(HOST, cpu_limits=False)
    assert tree(spec(limits=Limits(cpus=1.5)), host=unlimited).find("cputune") is None


def test_a_saved_machine_moves_to_another_port():
    text = domain_xml.with_port(xml(spec(port=9000)), 18_999)
    root = etree.fromstring(text)
    assert [one.get("value") for one in root.iter(f"{{{domain_xml.QEMU}}}arg")][1].endswith(
        ":18999-10.0.2.15:9000"
    )
    assert label_of(root).port == 18_999
    for bad in ("<domain/>", "no xml", xml(spec(endpoint="vsock"), port=0)):
        with pytest.raises(ValueError, match="not a domain|not well-formed"):
            domain_xml.with_port(bad, 1)


@pytest.mark.parametrize(
    "text", ["", "<x/>", "<agent xmlns='urn:other'/>", "<a", "<agent>{}</agent>", "<agent>[]</agent>"]
)
def test_damaged_labels_are_refused(text):
    with pytest.raises(ValueError, match="damaged"):
        domain_xml.parse_label(text)


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("", "well-formed"),
        ("<watchdog", "well-formed"),
        ("<watchdog/><watchdog/>", "well-formed"),
        ("text", "well-formed"),
        ("<name>x</name>", "may be added"),
        ("<disk type='file'/>", "may be added"),
        ("<interface type='user'/>", "may be added"),
        ("<seclabel type='none'/>", "may be added"),
        ("<memory>1</memory>", ""),
        ("<commandline xmlns='http://libvirt.org/schemas/domain/qemu/1.0'/>", "without namespaces"),
        ("<rng><x:y xmlns:x='urn:x'/></rng>", "without namespaces"),
        ("<!DOCTYPE rng [<!ENTITY e 'x'>]><rng>&e;</rng>", "document type|namespaces"),
        ("<!DOCTYPE rng SYSTEM 'file:///etc/passwd'><rng/>", "document type"),
        ("<rng>" + "x" * 20_000 + "</rng>", "characters"),
    ],
)
def test_extra_elements_are_validated(text, why):
    if not why:
        assert xml_input.parse_extra(text).tag == "memory"
        return
    with pytest.raises(ValueError, match=why):
        xml_input.parse_extra(text)


def test_extra_elements_find_their_place():
    extra = ["<cpu mode='host-model'/>", "<watchdog model='i6300esb'/>", "<iothreads>2</iothreads>"]
    root = tree(spec(xml=extra))
    assert [one.get("mode") for one in root.iterfind("cpu")] == ["host-model"], "it replaces the provider's"
    assert root.find("devices/watchdog") is not None
    assert root.findtext("iothreads") == "2"
