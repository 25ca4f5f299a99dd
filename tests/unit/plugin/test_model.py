"""The values that core and providers exchange: forms that survive, hashes that leave secrets out."""

import json
from dataclasses import FrozenInstanceError, replace
from pathlib import Path

import pytest
from pydantic import BaseModel

from dispatcher.plugin.errors import BadRequest
from dispatcher.plugin.model import AgentSpec, App, Capability, Endpoint, Handle, Isolation, Limits, Network


class Options(BaseModel):
    command: list[str] = ["run"]


APP = App(name="demo", provider="fake", options=Options())
SPEC = AgentSpec(
    installation="0a1b2c3d", agent="alice", user="alice", app=APP, uid=1, gid=1, proxy_gid=2,
    data_dir=Path("/d"), run_dir=Path("/r"), log_dir=Path("/l"),
)  # fmt: skip


@pytest.mark.parametrize(
    "text",
    [
        "unix:/run/a/s",
        "unix:/with space/s",
        "tcp:127.0.0.1:80",
        "tcp:[::1]:8080",
        "tcp:host.example:65535",
        "vsock:3:5000",
    ],
)
def test_endpoints_survive_as_text(text):
    assert str(Endpoint.parse(text)) == text


@pytest.mark.parametrize(
    "text",
    [
        "",
        "unix:",
        "unix:rel",
        "tcp:host",
        "tcp::80",
        "tcp:h:0",
        "tcp:h:65536",
        "tcp:h:x",
        "vsock:x:1",
        "vsock:1",
        "http://x",
        "x",
    ],
)
def test_what_is_no_endpoint_is_refused(text):
    with pytest.raises(BadRequest, match="use unix:/PATH"):
        Endpoint.parse(text)


def test_a_handle_survives_as_json():
    handle = Handle(provider="fake", agent="alice", name="dispatcher-x", data={"pid": 7, "nested": {"a": [1]}})
    assert Handle.from_json(handle.to_json()) == handle
    assert json.loads(handle.to_json())["version"] == 1


@pytest.mark.parametrize(
    "text", ["", "{}", "[]", "null", "7", '{"version": 1}', '{"version": 1, "provider": "x"}']
)
def test_a_damaged_handle_is_told(text):
    with pytest.raises(BadRequest, match="Damaged handle"):
        Handle.from_json(text)


def test_a_handle_of_a_newer_version_is_told():
    with pytest.raises(BadRequest, match="Handle of version 9: this program supports version 1"):
        Handle.from_json('{"version": 9}')


@pytest.mark.parametrize(
    "change",
    [
        {"installation": "ffffffff"}, {"agent": "bob"}, {"user": "bob"}, {"uid": 9}, {"data_dir": Path("/e")},
        {"run_dir": Path("/q")},
        {"app": replace(APP, name="other")},
        {"app": replace(APP, options=Options(command=["other"]))},
        {"app": replace(APP, limits=Limits(memory=1))},
        {"app": replace(APP, limits=Limits(swap=1))},
        {"app": replace(APP, limits=Limits(cpus=1))},
        {"app": replace(APP, limits=Limits(pids=1))},
        {"app": replace(APP, limits=Limits(disk=1))},
        {"app": replace(APP, limits=Limits(memory=1, defaults=frozenset({"memory"})))},
        {"app": replace(APP, network=Network.HOST)},
        {"app": replace(APP, environment={"A": "1"})},
        {"app": replace(APP, credentials="stdin")},
    ],
    ids=str,
)  # fmt: skip
def test_what_defines_an_agent_changes_its_hash(change):
    assert replace(SPEC, **change).hash != SPEC.hash


@pytest.mark.parametrize("change", [{"secrets": {"key": "hunter2"}}, {"stdin": b"password"}], ids=str)
def test_secrets_do_not_change_the_hash_and_do_not_show(change):
    changed = replace(SPEC, **change)
    assert changed.hash == SPEC.hash
    assert "hunter2" not in repr(changed)
    assert "password" not in repr(changed).replace("password_", "")


def test_the_hash_does_not_depend_on_order():
    one = replace(SPEC, app=replace(APP, environment={"A": "1", "B": "2"}))
    two = replace(SPEC, app=replace(APP, environment={"B": "2", "A": "1"}))
    assert one.hash == two.hash


def test_an_app_finds_its_limits_in_its_environment():
    limits = Limits(memory=1 << 30, swap=0, cpus=0.5, pids=4096)
    spec = replace(SPEC, app=replace(APP, limits=limits))
    assert spec.variables("/data") == {
        "DISPATCHER_AGENT": SPEC.agent,
        "DISPATCHER_USER": SPEC.user,
        "DISPATCHER_DATA": "/data",
        "DISPATCHER_MEMORY_LIMIT": "1073741824",
        "DISPATCHER_CPU_LIMIT": "0.5",
        "DISPATCHER_PIDS_LIMIT": "4096",
    }
    own = replace(spec, secrets={"key": "x"}).variables("/data", "/secrets", limits=Limits(disk=1))
    assert (own["DISPATCHER_SECRETS"], own["DISPATCHER_DISK_LIMIT"]) == ("/secrets", "1")
    assert "DISPATCHER_MEMORY_LIMIT" not in own


def test_limits_without_their_capability_are_not_enforced():
    limits = Limits(memory=1 << 30, swap=0, cpus=0.5, pids=4096, disk=1 << 20, defaults=frozenset({"pids"}))
    kept = limits.enforced({Capability.MEMORY_LIMIT, Capability.DISK_LIMIT})
    assert kept == Limits(memory=1 << 30, swap=0, disk=1 << 20, defaults=frozenset({"pids"}))
    own_data = {Capability.CPU_LIMIT, Capability.PIDS_LIMIT, Capability.OWN_DATA}
    assert limits.enforced(own_data) == Limits(cpus=0.5, pids=4096, defaults=frozenset({"pids"}))
    assert limits.enforced(own_data - {Capability.OWN_DATA}).disk == 1 << 20, "by the core"


def test_the_socket_of_a_spec_is_short():
    assert SPEC.socket == Path("/r/s")
    assert SPEC.backend_name.startswith("dispatcher-0a1b2c3d-alice-")


def test_isolation_is_ordered():
    assert Isolation.PROCESS < Isolation.CONTAINER < Isolation.VM


def test_values_are_frozen():
    with pytest.raises((FrozenInstanceError, AttributeError)):
        SPEC.uid = 0
