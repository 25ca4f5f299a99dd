"""Findings and capabilities."""

import platform
import grp
import os
import socket

from dataclasses import replace

import pytest

from dispatcher_subprocess import host, network, seccomp
from dispatcher_subprocess.processes import cgroups
from dispatcher_subprocess.explain import capabilities, findings
from dispatcher_subprocess.host import Host
from dispatcher_subprocess.options import AppOptions, endpoint_kind
from dispatcher.plugin.errors import Unsupported
from dispatcher.plugin.model import App, Capability, Level, Limits, Network


def app(network=Network.NONE, command=("x", "{socket}"), seccomp=True, **limits):
    return App(
        name="notes",
        provider="subprocess",
        options=AppOptions(command=list(command), seccomp=seccomp),
        network=network,
        limits=Limits(**limits),
    )


def warnings(machine, chosen=None):
    return [one.what for one in findings(machine, chosen) if one.level in {Level.WARNING, Level.ERROR}]


def test_what_is_not_isolated_is_said_in_words(monkeypatch):
    walls = Host(privileged=True, bwrap="/usr/bin/bwrap", setpriv="/usr/bin/setpriv")
    open_ = Host(privileged=False, reason="bubblewrap is not installed")
    assert not [one for one in warnings(walls) if "sandbox" in one or "same user" in one]
    said = " ".join(warnings(open_))
    for words in ("without a sandbox", "not installed", "can read each other's data", "not enforced"):
        assert words in said
    assert any("open to every local user" in one for one in warnings(walls, app(command=("x", "{port}"))))
    assert any("host's network" in one for one in warnings(walls, app(Network.HOST)))
    assert any("not enforced without a sandbox" in one for one in warnings(open_, app()))
    assert any("limit memory is not enforced" in one for one in warnings(walls, app(memory=1)))
    assert warnings(walls, app(disk=1)) == [], "the core limits the data"
    assert any("leave its quota" in one for one in warnings(walls, app(disk=1, seccomp=False)))
    assert warnings(walls, app(pids=5)) == [], "counted per user id"
    assert any("AF_VSOCK" in one for one in warnings(walls, app(seccomp=False)))
    monkeypatch.setattr(platform, "machine", lambda: "vax")
    seccomp.program.cache_clear()
    assert any("no filter for this processor" in one for one in warnings(walls))
    seccomp.program.cache_clear()
    assert all(one.what and not one.what.endswith(".") for one in findings(open_, None))


@pytest.mark.root
def test_what_an_app_sees_of_the_host_by_its_options_is_said(tmp_path):
    walls = Host(privileged=True, bwrap="/usr/bin/bwrap", setpriv="/usr/bin/setpriv")
    path = tmp_path / "docker.sock"
    disk = tmp_path / "sdz"
    disk.touch()
    os.chown(disk, -1, grp.getgrnam("disk").gr_gid)
    disk.chmod(0o660)
    with socket.socket(socket.AF_UNIX) as service:
        service.bind(str(path))
        options = AppOptions(
            command=["x", "{socket}"],
            read_only=["/root"],
            writable=["/", str(path)],
            devices=["/dev/null", str(disk)],
        )
        said = warnings(walls, App(name="notes", provider="subprocess", options=options))
    assert [one.split(" of the host")[0].split(": ")[0] for one in said] == [
        "It reads /root",
        "It changes /",
        f"It sends commands to the host's service at {path}",
        "It uses /dev/null",
        f"It uses {disk}",
        "Its agents are in the group disk",
    ]


def test_capabilities_follow_the_host(tmp_path):
    open_ = capabilities(Host(privileged=False, reason="no"))
    assert Capability.NETWORK_NONE not in open_ and Capability.PIDS_LIMIT not in open_
    assert {Capability.SUSPEND, Capability.LOGS, Capability.EVENTS, Capability.CREDENTIALS} <= open_
    groups = cgroups.Cgroups(directory=tmp_path, controllers=frozenset({"memory", "cpu"}))
    full = capabilities(Host(privileged=True, bwrap="/b", setpriv="/s", cgroups=groups))
    assert {
        Capability.NETWORK_NONE,
        Capability.MEMORY_LIMIT,
        Capability.CPU_LIMIT,
        Capability.PIDS_LIMIT,
    } <= full
    assert Capability.DISK_LIMIT not in full and Capability.HIBERNATE not in full


@pytest.mark.parametrize("program", ["pasta", "slirp"])
def test_what_a_private_network_does_not_bound_is_told(monkeypatch, program):
    monkeypatch.setattr(Host, "private_fault", None)
    made = dict(privileged=True, bwrap="/usr/bin/bwrap", setpriv="/usr/bin/setpriv") | {program: "/usr/bin/x"}
    tracks = Host(**made, tracks_connections=True)
    assert "tracked connections" not in " ".join(one.what for one in findings(tracks, None))
    told = " ".join(warnings(replace(tracks, unbounded=("nft is not installed", "install nftables"))))
    assert "can fill the table of tracked connections" in told and "nft is not installed" in told
    assert ("UDP" in " ".join(warnings(Host(**made)))) is (program == "slirp")


@pytest.mark.parametrize(
    ("device", "why"), [("none", "there is no "), ("closed", "this user may not open ")], ids=["missing", "closed"]
)
def test_without_the_kernels_tunnels_the_alternatives_are_told(monkeypatch, tmp_path, device, why):
    (tmp_path / "closed").touch()
    monkeypatch.setattr(host, "_TUN", str(tmp_path / device))
    monkeypatch.setattr(host, "find_program", lambda name: f"/usr/bin/{name}")
    real = os.access
    monkeypatch.setattr(os, "access", lambda path, mode: path != host._TUN and real(path, mode))
    walls = Host(privileged=True, bwrap="/usr/bin/bwrap", setpriv="/usr/bin/setpriv", pasta="/usr/bin/pasta")
    (told,) = [one for one in findings(walls, None) if "private" in one.what]
    assert why in told.what
    assert 'network = "none" or "host"' in told.fix
    for command, none in (
        (("x", "{socket}"), '"none" for'),
        (("x", "{port}"), '"none" and {socket} in the command'),
    ):
        chosen = app(Network.PRIVATE, command)
        with pytest.raises(Unsupported, match=why) as caught:
            network.verify(chosen, endpoint_kind(chosen), walls)
        assert f"network = {none}" in caught.value.fix
        assert 'network = "host"' in caught.value.fix
        assert 'provider = "docker"' in caught.value.fix
        assert not [one for one in findings(walls, chosen) if "It reaches the outside" in one.what]
