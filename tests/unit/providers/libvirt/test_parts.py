"""libvirt: consoles as logs, ports and filters, images that are looked at, disks that are copied."""

import gzip
import ipaddress
import os
import shutil
import socket
import subprocess
import threading
import time
from types import SimpleNamespace

import pytest

pytest.importorskip("libvirt")

from lxml import etree

from dispatcher.plugin.deadline import Deadline
from dispatcher.plugin.errors import Cancelled, ProviderError
from dispatcher.plugin.model import App, Level, Limits, Network
from dispatcher.plugin.provider import no_progress
from dispatcher_libvirt import console, explaining, host, images, network
from dispatcher_libvirt.disks import Disks, copy_sparse
from dispatcher_libvirt.images import Images, Reader
from dispatcher_libvirt.network import Ports
from dispatcher_libvirt.options import AppOptions, Options
from tests.unit.providers.libvirt.test_domain_xml import HOST

needs_qemu_img = pytest.mark.skipif(shutil.which("qemu-img") is None, reason="qemu-img is not installed")


def tail(directory, count):
    return list(console.lines(directory, tail=count, follow=False, deadline=Deadline(1)))


def test_logs_are_the_last_lines_over_rotated_files(tmp_path):
    assert tail(tmp_path, 5) == []
    (tmp_path / "console.log.1").write_bytes(b"one\r\ntwo\r\n")
    (tmp_path / "console.log.0").write_bytes(b"three\r\nfo")
    (tmp_path / "console.log").write_bytes(b"ur\r\nfive\r\n\xff\x00odd\nlast without end")
    assert tail(tmp_path, 3) == [b"five", b"\xff\x00odd", b"last without end"]
    assert tail(tmp_path, 5) == [b"three", b"four", b"five", b"\xff\x00odd", b"last without end"]
    assert tail(tmp_path, 99)[:2] == [b"one", b"two"]
    assert tail(tmp_path, 0) == []


def test_long_lines_are_cut(tmp_path):
    (tmp_path / "console.log").write_bytes(b"y" * 150_000 + b"\nend\n")
    assert [len(line) for line in tail(tmp_path, 10)] == [65_536, 65_536, 18_928, 3]


def test_following_sees_new_lines_over_a_rotation_and_none_twice(tmp_path):
    log = tmp_path / "console.log"
    log.write_bytes(b"old\nhalf")

    def write():
        time.sleep(0.3)
        with log.open("ab") as file:
            file.write(b" a line\nsecond\n")
        time.sleep(0.4)
        log.rename(tmp_path / "console.log.0")
        log.write_bytes(b"third\n")

    writer = threading.Thread(target=write)
    writer.start()
    lines = list(console.lines(tmp_path, tail=1, follow=True, deadline=Deadline(1.6)))
    writer.join()
    assert lines == [b"old", b"half a line", b"second", b"third"]


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        (b"noise\ndispatcher: the app ended: exit code 7\r\n[ 2.0] reboot: Power down\n", "exit code 7"),
        (b"dispatcher: the app ended: exit code 7\ndispatcher: the machine starts\nnoise\n", ""),
        (b"[ 1.0] Kernel panic - not syncing: Attempted to kill init!\n", "kernel panic: Attempted to kill init!"),
        (b"dispatcher: the app ended: \x1b[31m\n", ""),
        (b"", ""),
    ],
)
def test_a_guest_tells_why_it_ended(tmp_path, text, reason):
    (tmp_path / "console.log").write_bytes(text)
    assert console.ending(tmp_path) == reason


def test_what_is_shown_of_a_console_is_harmless(tmp_path):
    console.begin(tmp_path)
    assert console.last_line(tmp_path) == "the machine starts"
    (tmp_path / "console.log").write_bytes(b"\x1b[31mred\x07" + b"x" * 1000 + b"\n")
    shown = console.last_line(tmp_path)
    assert shown.isprintable()
    assert len(shown) <= 120


def test_ports_are_free_and_not_given_twice():
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        ports = Ports(port, port)
        with pytest.raises(ProviderError, match="No port from"):
            ports.take()
    first, last = 21_500, 21_519
    ports = Ports(first, last)
    given = {ports.take() for _ in range(15)}
    assert len(given) == 15
    assert given <= set(range(first, last + 1))
    with pytest.raises(ProviderError, match="widen"):
        Ports(first, first).take(avoid=[first])


def test_mac_addresses_are_an_agents_own():
    assert network.mac_address("a") == network.mac_address("a")
    assert len({network.mac_address(f"dispatcher-{n}") for n in range(500)}) == 500
    assert network.mac_address("x").startswith("52:54:00:")


def test_networks_are_understood():
    info = network.parse_network(
        "<network><name>n</name><forward mode='nat'/><ip address='192.0.2.1' netmask='255.255.255.0'/></network>"
    )
    assert (info.name, info.forward) == ("n", "nat")
    assert (info.gateway, info.subnet) == (ipaddress.ip_address("192.0.2.1"), ipaddress.ip_network("192.0.2.0/24"))
    bare = network.parse_network("<network><name>n</name><bridge name='br0'/></network>")
    assert (bare.forward, bare.gateway) == ("", None)


def test_the_guests_filter_keeps_them_from_the_host():
    info = network.parse_network(
        "<network><name>n</name><forward mode='nat'/><ip address='192.0.2.1' netmask='255.255.255.0'/></network>"
    )
    root = etree.fromstring(network.guest_filter("f", info, [ipaddress.ip_network("198.51.100.7/32")]))
    assert root.find("filterref").get("filter") == "clean-traffic"
    rules = sorted(root.iterfind("rule"), key=lambda rule: int(rule.get("priority")))
    drops = {
        f"{one.get('dstipaddr')}/{one.get('dstipmask')}"
        for rule in rules
        if rule.get("action") == "drop"
        for one in rule
        if one.get("dstipaddr")
    }
    assert {"192.0.2.0/24", "198.51.100.7/32", "169.254.0.0/16"} <= drops
    dns = [rule for rule in rules if rule[0].get("dstportstart") == "53"]
    assert {rule[0].get("dstipaddr") for rule in dns} == {"192.0.2.1"}
    assert rules[-1].get("action") == "drop"
    accept_all = next(rule for rule in rules if rule.get("priority") == "600")
    assert int(accept_all.get("priority")) > max(
        int(rule.get("priority")) for rule in rules if rule[0].get("dstipmask")
    )


def test_networks_of_this_host_alone_are_out_of_reach(monkeypatch):
    import psutil

    def address(ip, mask):
        return SimpleNamespace(family=socket.AF_INET, address=ip, netmask=mask)

    monkeypatch.setattr(
        psutil,
        "net_if_addrs",
        lambda: {
            "eth0": [address("203.0.113.5", "255.255.255.0")],
            "br0": [address("10.9.0.1", "255.255.0.0")],
            "lo": [address("127.0.0.1", "255.0.0.0")],
        },
    )
    route = "Iface\tDestination\nIface2\t0\neth0\t00000000\t01\n"
    found = {str(one) for one in network.host_networks(route)}
    assert found == {"203.0.113.5/32", "10.9.0.1/32", "10.9.0.0/16", "127.0.0.1/32", "127.0.0.0/8"}


def check(options, reader=None, known=None):
    options = AppOptions.model_validate(options)
    return (known or Images()).check(options, reader, deadline=Deadline(20), tick=lambda: None)


@pytest.fixture
def boots(tmp_path):
    kernel, initrd = tmp_path / "vmlinuz", tmp_path / "initrd"
    kernel.write_bytes(bytes(0x202) + b"HdrS" + bytes(4096))
    initrd.write_bytes(gzip.compress(b"x"))
    return {"kernel": str(kernel), "initrd": str(initrd)}


def test_what_boots_is_looked_at(boots, tmp_path):
    base, whole = check(boots)
    assert base == ""
    assert len(whole) == 12
    (tmp_path / "initrd").write_bytes(gzip.compress(b"y"))
    assert check(boots)[1] != whole, "another initrd is another image"


@pytest.mark.parametrize(
    ("change", "why"),
    [
        ({"kernel": "/nonexistent"}, "cannot be used: No such file"),
        ({"kernel": "/dev/null"}, "is no file"),
        ({"kernel": "{initrd}"}, "is no Linux kernel"),
        ({"initrd": "{kernel}"}, "is no initial RAM disk"),
        ({"image": "/nonexistent.qcow2"}, "image /nonexistent.qcow2 cannot be used"),
        ({"image": "{kernel}"}, "is no qcow2 image"),
    ],
)
def test_what_is_missing_or_wrong_is_said(boots, change, why):
    options = boots | {key: value.format(**boots) for key, value in change.items()}
    with pytest.raises(ProviderError, match=why) as caught:
        check(options)
    assert caught.value.fix


@needs_qemu_img
def test_images_are_looked_into(tmp_path, boots):
    def create(name, *arguments):
        path = tmp_path / name
        subprocess.run(["qemu-img", "create", "-q", "-f", *arguments[:1], *arguments[1:], path, "8M"], check=True)
        return path

    good = create("good.qcow2", "qcow2")
    assert check(boots | {"image": str(good)})[0]
    with pytest.raises(ProviderError, match="no boot sector"):
        check({"image": str(good)})
    with pytest.raises(ProviderError, match="is a qcow2 image"):
        check(boots | {"image": str(good), "format": "raw"})
    overlay = create("overlay.qcow2", "qcow2", "-b", str(good), "-F", "qcow2")
    with pytest.raises(ProviderError, match="is an overlay itself"):
        check(boots | {"image": str(overlay)})
    damaged = bytearray(good.read_bytes())
    damaged[48:56] = b"\xff" * 8  # where the table of reference counts lies
    (tmp_path / "bad.qcow2").write_bytes(damaged)
    with pytest.raises(ProviderError, match="is damaged"):
        check(boots | {"image": str(tmp_path / "bad.qcow2")})
    disk = tmp_path / "disk.raw"
    disk.write_bytes(bytes(510) + b"\x55\xaa" + bytes(65_536))
    assert check({"image": str(disk), "format": "raw"})[0]


def test_what_was_found_good_is_not_looked_at_again(boots, monkeypatch):
    known = Images()
    first = check(boots, known=known)
    monkeypatch.setattr(images, "_head", lambda path, length: pytest.fail("looked again"))
    assert check(boots, known=known) == first


def test_files_that_machines_may_not_read_are_said_with_the_command(boots, tmp_path):
    stranger = Reader(54_321, 54_321)
    tmp_path.chmod(0o700)
    with pytest.raises(ProviderError, match="Machines may not read") as caught:
        check(boots, stranger)
    assert caught.value.fix.startswith("chmod o+x ")
    if os.geteuid() == 0:
        for parent in (tmp_path, *tmp_path.parents):
            if parent != parent.parent and parent.stat().st_uid == 0 and str(parent) != "/tmp":
                parent.chmod(parent.stat().st_mode | 0o001)
        (tmp_path / "initrd").chmod(0o600)
        with pytest.raises(ProviderError, match="initrd") as caught:
            check(boots, stranger)
        assert caught.value.fix == f"chmod o+r {tmp_path / 'initrd'}"


def test_copies_keep_holes_owner_and_mode(tmp_path):
    source = tmp_path / "source"
    with source.open("wb") as file:
        file.write(b"begin")
        file.seek(6 << 20)
        file.write(b"middle")
        file.truncate(20 << 20)
    source.chmod(0o600)
    copy_sparse(source, tmp_path / "copy", Deadline(10), lambda: None)
    assert (tmp_path / "copy").read_bytes() == source.read_bytes()
    assert (tmp_path / "copy").stat().st_blocks * 512 < 1 << 20
    assert (tmp_path / "copy").stat().st_mode & 0o777 == 0o600

    def cancel():
        raise Cancelled("no")

    with pytest.raises(Cancelled):
        copy_sparse(source, tmp_path / "other", Deadline(10), cancel)


def test_directories_of_disks_are_passed_through_and_not_listed(tmp_path):
    own = tmp_path / "state"
    own.mkdir(mode=0o700)
    disks = Disks(own / "machines", own=own, privileged=False)
    assert disks.make_directory("dispatcher-x") is True
    assert disks.make_directory("dispatcher-x") is False
    assert [path.stat().st_mode & 0o777 for path in (own, disks.top, disks.directory("dispatcher-x"))] == [
        0o711
    ] * 3
    disks.remove("dispatcher-x", data=False)
    assert not disks.directory("dispatcher-x").exists()
    disks.remove("dispatcher-x", data=True)


def test_old_overlays_are_forgotten_but_the_newest(tmp_path):
    disks = Disks(tmp_path, own=None, privileged=False)
    disks.make_directory("d")
    for number, fingerprint in enumerate(["a" * 12, "b" * 12, "c" * 12, "d" * 12]):
        path = disks.directory("d") / f"root-{fingerprint}.qcow2"
        path.write_bytes(b"")
        os.utime(path, (number, number))
    (disks.directory("d") / "root-x.qcow2").write_bytes(b"")
    disks.forget_roots("d", "a" * 12, 1)
    assert set(disks.roots("d")) == {"a" * 12, "d" * 12}


def test_explanations_say_what_is_not_promised():
    def say(**changes):
        options = AppOptions.model_validate({"kernel": "/k", **changes.pop("own", {})})
        app = App(name="vm", provider="libvirt", options=options, **changes)
        return list(explaining.application(app, changes.pop("options", Options()), HOST))

    assert [one.level for one in say()] == [Level.OK]
    assert any(one.level is Level.ERROR for one in say(network=Network.HOST))
    assert any("limit of processes" in one.what for one in say(limits=Limits(pids=10)))
    assert any("adds to its machine" in one.what for one in say(own={"xml": ["<watchdog model='i6300esb'/>"]}))
    assert any("127.0.0.1" in one.what and one.level is Level.WARNING for one in explaining.backend(HOST))
    assert any("is not known" in one.what for one in explaining.backend(None))
    assert no_progress("nothing") is None


@pytest.mark.parametrize(
    ("program", "why"),
    [
        ("import time; time.sleep(60)", "/dev/kvm makes machines that stand still"),
        ("print('/dev/kvm interprets'); raise SystemExit(1)", "/dev/kvm interprets"),
        ("", ""),
    ],
)
def test_kvm_that_runs_no_machine_at_speed_is_no_kvm(tmp_path, monkeypatch, program, why):
    (tmp_path / "kvm.py").write_text(program)
    monkeypatch.setattr(host.kvm, "__file__", str(tmp_path / "kvm.py"))
    monkeypatch.setattr(host.kvm, "SECONDS", 3.0 if program.startswith("print") or not program else 0.3)
    assert host._tried_kvm.__wrapped__() == why
