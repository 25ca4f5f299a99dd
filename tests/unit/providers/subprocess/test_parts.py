"""Parts of the provider `subprocess` that need no process: journals, filters, cgroup files, listeners, sentences."""

import errno
import json
import os
import struct
import sys
from pathlib import Path

import psutil
import pytest
from dispatcher_subprocess import cgroups, network, observe, plan, procfs, sandbox, seccomp
from dispatcher_subprocess.explain import capabilities, findings
from dispatcher_subprocess.host import Host
from dispatcher_subprocess.journal import Journals, Process, parse, sandbox_status
from dispatcher_subprocess.options import AppOptions
from dispatcher_subprocess.stop import exit_reason

from dispatcher.plugin.errors import ProviderError
from dispatcher.plugin.model import App, Capability, Level, Limits, Network

FIRST = {
    "name": "dispatcher-00000000-a-b",
    "agent": "a",
    "boot": "b",
    "spec_hash": "h",
    "uid": 200001,
    "endpoint": "unix:/r/s",
    "owner_uid": 200001,
    "log_dir": "/l",
    "run_dir": "/r",
    "token": "t",
    "network": "none",
    "sandboxed": True,
    "pipe": 7,
}


# --- journals


def test_a_journal_grows_and_is_read_at_any_length(tmp_path):
    journals = Journals(tmp_path)
    os.close(journals.begin(FIRST))
    name = FIRST["name"]
    record = journals.read(name)
    assert record.main is None and record.ended is None and not record.stop_requested
    journals.append(name, {"main": {"pid": 2, "start": 3}, "started_at": 1.5})
    journals.append(name, {"stop_requested": True})
    whole = journals.path(name).read_bytes()
    assert journals.read(name).main == Process(pid=2, start=3)
    first = whole.index(b"\n") + 1
    for length in range(len(whole)):
        found = parse(whole[:length])
        assert (found is None) == (length < first - 1)
    assert parse(whole[:-2]).stop_requested is False
    journals.remove(name)
    assert journals.read(name) is None and list(tmp_path.iterdir()) == []
    journals.append(name, {"stop_requested": True})  # of one that is gone: nothing
    assert journals.names() == []


def test_a_new_run_forgets_the_old_one(tmp_path):
    journals = Journals(tmp_path)
    for _ in range(2):
        status = journals.begin(FIRST)
        assert sandbox_status(journals.read(FIRST["name"])).exit_code is None
        os.write(status, b'{ "child-pid": 5, "pid-namespace": 6 }\n{ "exit-code": 3 }\n')
        os.close(status)
        said = sandbox_status(journals.read(FIRST["name"]))
        assert (said.child, said.pidns, said.exit_code) == (5, 6, 3)
        journals.append(FIRST["name"], {"ended": "exit code 3"})
    os.close(journals.begin(FIRST))
    assert journals.read(FIRST["name"]).ended is None


@pytest.mark.parametrize("text", [b"", b"\0\xff", b"[]\n", b'{"version": 99}\n', b'{"no": "version"}\n'])
def test_a_journal_that_is_none(text):
    assert parse(text) is None


def test_an_unreadable_journal_directory_is_unavailable_not_empty(tmp_path):
    from dispatcher.plugin.errors import Unavailable

    (tmp_path / "file").touch()
    with pytest.raises(Unavailable):
        Journals(tmp_path / "file").names()
    assert Journals(tmp_path / "absent").names() == []


# --- the filter of system calls


def run(program, machine, number, argument=0, architecture=None):
    """Interpret a classic BPF program as the kernel would; return the errno, 0 when the call is allowed."""
    word = architecture if architecture is not None else seccomp.MACHINES[machine][0]
    data = struct.pack("<IIQQ", number, word, 0, argument)
    at = accumulator = 0
    while True:
        code, if_true, if_false, value = struct.unpack_from("<HBBI", program, at * 8)
        at += 1
        if code == 0x20:
            accumulator = struct.unpack_from("<I", data, value)[0]
        elif code == 0x06:
            return 0 if value == 0x7FFF0000 else value & 0xFFFF
        else:
            test = {0x15: accumulator == value, 0x35: accumulator >= value, 0x45: bool(accumulator & value)}[code]
            at += if_true if test else if_false


@pytest.mark.parametrize("machine", ["x86_64", "aarch64"])
def test_the_filter_refuses_its_list_and_allows_the_rest(machine):
    program = seccomp.program(machine)
    refused, absent = seccomp.refused(machine), seccomp.ABSENT
    assert len(refused) > 30
    makers = [numbers[seccomp.MACHINES[machine][1]] for numbers in seccomp.NAMESPACE_MAKERS.values()]
    for number in range(600):
        expected = errno.EPERM if number in refused.values() else errno.ENOSYS if number in absent.values() else 0
        assert run(program, machine, number) == expected, number
    for number in makers:
        assert run(program, machine, number, 0x10000000 | 17) == errno.EPERM
        assert run(program, machine, number, 0x20000000) == 0, "other namespaces are the capabilities' business"
    assert run(program, machine, 0, architecture=0x40000003) == errno.ENOSYS, "32-bit calls have other numbers"
    if machine == "x86_64":
        assert run(program, machine, 0x40000000 | 56) == errno.ENOSYS
    assert len(program) // 8 < 4096


def test_no_filter_for_unknown_processors():
    assert seccomp.program("vax") == b""


# --- control groups

HYBRID = (
    "30 25 0:26 / {0}/memory rw - cgroup cgroup rw,memory\n"
    "31 25 0:27 / {0}/cpu,cpuacct rw - cgroup cgroup rw,cpu,cpuacct\n"
    "33 25 0:29 / {0}/unified rw - cgroup2 cgroup2 rw\n"
)


@pytest.fixture
def tree(tmp_path):
    for name in ("memory", "cpu,cpuacct", "unified"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "cgroup.procs").touch()
    return tmp_path


def test_version_one_controllers_beside_version_two(tree):
    found = cgroups.discover("dispatcher-x", HYBRID.format(tree), "4:memory:/\n0::/\n")
    assert found.directory == tree / "unified/dispatcher-x"
    assert set(found.legacy) == {"memory", "cpu"}
    assert found.limits("memory") and found.limits("cpu") and not found.limits("pids")
    group = found.group("a")
    for name in ("memory", "cpu,cpuacct"):
        path = tree / name / "dispatcher-x/a"
        path.mkdir()
        for file in ("memory.limit_in_bytes", "cpu.cfs_quota_us"):
            (path / file).touch()
    used = group.create(Limits(memory=1000, cpus=0.5))
    assert [path.parent.parent.name for path in used] == ["memory", "cpu,cpuacct", "unified"]
    assert (tree / "memory/dispatcher-x/a/memory.limit_in_bytes").read_text() == "1000"
    assert (tree / "cpu,cpuacct/dispatcher-x/a/cpu.cfs_quota_us").read_text() == "50000"
    (tree / "memory/dispatcher-x/a/memory.usage_in_bytes").write_text("5000\n")
    (tree / "memory/dispatcher-x/a/memory.stat").write_text("cache 9\ntotal_inactive_file 2000\n")
    (tree / "unified/dispatcher-x/a/cpu.stat").write_text("usage_usec 2500000\n")
    usage = group.usage()
    assert (usage.memory, usage.cpu_seconds) == (3000, 2.5)
    (tree / "memory/dispatcher-x/a/memory.oom_control").write_text("oom_kill_disable 0\nunder_oom 0\noom_kill 2\n")
    assert group.oom_kills() == 2


def test_version_one_alone_is_not_used(tree):
    text = "".join(line + "\n" for line in HYBRID.format(tree).splitlines() if "cgroup2" not in line)
    found = cgroups.discover("dispatcher-x", text, "4:memory:/\n")
    assert found.group("a") is None and not found.limits("memory")
    assert not (tree / "memory/dispatcher-x").exists()


def test_version_two_with_controllers(tmp_path):
    (tmp_path / "cgroup.procs").touch()
    (tmp_path / "cgroup.subtree_control").touch()
    base = tmp_path / "dispatcher-x"
    base.mkdir()
    (base / "cgroup.subtree_control").write_text("cpu memory pids\n")
    mounts = f"33 25 0:29 / {tmp_path} rw - cgroup2 cgroup2 rw\n"
    # Writing appends nothing here; a kernel would answer with what is on.
    found = cgroups.Cgroups(directory=base, controllers=frozenset({"cpu", "memory", "pids"}))
    assert cgroups.discover("dispatcher-x", mounts, "0::/\n").directory == base
    group = found.group("a")
    path = base / "a"
    path.mkdir()
    for name in ("memory.max", "memory.swap.max", "cpu.max", "pids.max", "cgroup.freeze", "cgroup.procs"):
        (path / name).touch()
    assert group.create(Limits(memory=1 << 20, swap=0, cpus=1.5, pids=40)) == [path]
    assert (path / "memory.max").read_text() == str(1 << 20)
    assert (path / "memory.swap.max").read_text() == "0"
    assert (path / "cpu.max").read_text() == "150000 100000"
    assert (path / "pids.max").read_text() == "40"
    (path / "memory.current").write_text("4096\n")
    (path / "memory.stat").write_text("inactive_file 96\n")
    (path / "cpu.stat").write_text("usage_usec 1500000\n")
    (path / "memory.events").write_text("low 0\noom 3\noom_kill 1\n")
    assert group.usage().memory == 4000 and group.usage().cpu_seconds == 1.5 and group.oom_kills() == 1
    cgroups.join([path], 77)
    assert (path / "cgroup.procs").read_text() == "77"


def test_an_ordinary_user_gets_the_highest_group_that_is_theirs(tmp_path):
    slice_ = tmp_path / "user.slice/user-1000.slice/user@1000.service"
    app = slice_ / "app.slice/terminal.scope"
    app.mkdir(parents=True)
    for path in (slice_, slice_ / "app.slice", app):
        (path / "cgroup.procs").touch()
    mounts = f"33 25 0:29 / {tmp_path} rw - cgroup2 cgroup2 rw\n"
    own = "0::/user.slice/user-1000.slice/user@1000.service/app.slice/terminal.scope\n"
    found = cgroups.discover("dispatcher-x", mounts, own)
    assert found.directory == slice_ / "dispatcher-x"


def test_no_control_groups_at_all(tmp_path):
    found = cgroups.discover("dispatcher-x", "", "0::/\n")
    assert found.group("a") is None
    found = cgroups.discover("dispatcher-x", f"33 25 0:29 / {tmp_path}/gone ro - cgroup2 cgroup2 ro\n", "0::/\n")
    assert found.group("a") is None


# --- listeners

TCP = """  sl  local_address rem_address   st tx_queue rx_queue tr tm->when retrnsmt   uid  timeout inode
   0: 0100007F:4E20 00000000:0000 0A 00000000:00000000 00:00000000 00000000     0        0 111 1 0 100 0 0 10 0
   1: 00000000:4E20 00000000:0000 0A 00000000:00000000 00:00000000 00000000     0        0 222 1 0 100 0 0 10 0
   2: 0100007F:4E20 0100007F:9999 01 00000000:00000000 00:00000000 00000000     0        0 333 1 0 100 0 0 10 0
   3: 0200000A:4E20 00000000:0000 0A 00000000:00000000 00:00000000 00000000     0        0 444 1 0 100 0 0 10 0
   4: 0100007F:4E21 00000000:0000 0A 00000000:00000000 00:00000000 00000000     0        0 555 1 0 100 0 0 10 0
"""


def test_listeners_that_a_connection_to_loopback_could_reach(monkeypatch):
    monkeypatch.setattr(procfs, "read", lambda path: TCP.encode() if path.endswith("/tcp") else b"header\n")
    assert observe.listening(20000) == {111, 222}
    assert observe.listening(20001) == {555}
    assert observe.listening(1) == frozenset()


def test_a_listener_is_judged_once_and_anew_when_it_changes(monkeypatch):
    sockets = {10: {111}, 11: {222}}
    asked = []

    def open_inodes(pid, kind):
        asked.append(pid)
        return iter(sockets.get(pid, ()))

    monkeypatch.setattr(procfs, "open_inodes", open_inodes)
    known = observe.PortOwners()
    assert known.fault("run", frozenset(), lambda: [10]) == "it does not listen yet"
    assert "another process" in known.fault("run", frozenset({111, 333}), lambda: [10, 11])
    assert known.fault("run", frozenset({111}), lambda: [10]) == ""
    asked.clear()
    assert known.fault("run", frozenset({111}), lambda: [10]) == "" and not asked
    assert known.fault("run", frozenset({444}), lambda: [10]) and asked
    known.forget("run")
    assert "another process" in known.fault("other", frozenset({222}), lambda: [10])


def test_ports_go_round_and_avoid_what_is_taken(free_port):
    ports = plan.Ports(free_port, free_port)
    assert ports.choose(list) == free_port
    with pytest.raises(ProviderError, match="No TCP port is free") as caught:
        ports.choose(lambda: [free_port])
    assert caught.value.fix


# --- sentences


@pytest.mark.parametrize(
    "code, oom, reason",
    [
        (0, False, "exit code 0"),
        (1, False, "exit code 1"),
        (137, False, "killed by signal 9 (SIGKILL)"),
        (-9, False, "killed by signal 9 (SIGKILL)"),
        (137, True, "out of memory"),
        (-9, True, "out of memory"),
        (1, True, "exit code 1"),
        (139, False, "killed by signal 11 (SIGSEGV)"),
        (255, False, "exit code 255"),
        (None, True, "ended, reason unknown"),
    ],
)
def test_exit_reasons(code, oom, reason):
    assert exit_reason(code, out_of_memory=oom) == reason


def app(network=Network.NONE, command=("x", "{socket}"), **limits):
    return App(
        name="notes",
        provider="subprocess",
        options=AppOptions(command=list(command)),
        network=network,
        limits=Limits(**limits),
    )


def warnings(machine, chosen=None):
    return [one.what for one in findings(machine, chosen) if one.level in {Level.WARNING, Level.ERROR}]


def test_what_is_not_isolated_is_said_in_words(tmp_path):
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
    assert any("limit disk is not enforced" in one for one in warnings(walls, app(disk=1)))
    assert warnings(walls, app(pids=5)) == [], "counted per user id"
    assert all(one.what and not one.what.endswith(".") for one in findings(open_, None))


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


# --- what an agent sees


def test_a_virtual_environment_brings_the_python_it_was_made_from(tmp_path):
    base = tmp_path / "opt/python"
    (base / "bin").mkdir(parents=True)
    (base / "bin/python3.12").write_bytes(b"\x7fELF")
    venv = tmp_path / "home/venv"
    (venv / "bin").mkdir(parents=True)
    (venv / "pyvenv.cfg").write_text(f"home = {base}/bin\nversion = 3.12\n")
    (venv / "bin/python").symlink_to(base / "bin/python3.12")
    (venv / "bin/app").write_text(f"#!{venv}/bin/python\n")
    for program in ("python", "app"):
        assert set(plan.needed(venv / "bin" / program)) == {venv, base}


def test_a_single_program_and_its_interpreter(tmp_path):
    (tmp_path / "run").write_text("#!/bin/sh\n")
    assert plan.needed(tmp_path / "run") == (tmp_path / "run",)
    assert plan.needed(Path("/usr/bin/env")) == ()
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    assert plan.needed(tmp_path / "loop") == ()
    assert Path(sys.base_prefix) in {Path("/usr"), *plan.needed(Path(sys.executable))}


@pytest.mark.parametrize("name", ["nothing-of-that-name", "/nonexistent/app", "relative/app", "./app"])
def test_a_program_that_is_not_there(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "app").write_text("#!/bin/sh\n")
    (tmp_path / "app").chmod(0o755)
    with pytest.raises(ProviderError) as caught:
        plan.find_program(name, "/usr/bin:/bin", "notes")
    assert caught.value.fix and "apps.notes" in str(caught.value)


def test_loader_variables_are_kept_from_roots_programs():
    plain, loader = sandbox.split_environment({"LD_PRELOAD": "x", "GLIBC_TUNABLES": "y", "HOME": "/data"})
    assert plain == {"HOME": "/data"} and set(loader) == {"LD_PRELOAD", "GLIBC_TUNABLES"}


# --- networks


def test_what_a_private_network_must_not_reach(monkeypatch):
    import socket
    from collections import namedtuple

    address = namedtuple("address", "family address netmask")
    monkeypatch.setattr(network, "outgoing_interface", lambda: "eth0")
    monkeypatch.setattr(
        psutil,
        "net_if_addrs",
        lambda: {
            "lo": [address(socket.AF_INET, "127.0.0.1", "255.0.0.0"), address(socket.AF_INET6, "::1", "ffff::")],
            "eth0": [
                address(socket.AF_INET, "10.0.0.5", "255.255.255.0"),
                address(socket.AF_INET6, "fe80::1%eth0", "ffff:ffff:ffff:ffff::"),
                address(socket.AF_INET6, "fd00::5", "ffff:ffff:ffff:ffff::"),
                address(socket.AF_PACKET, "00:00:00:00:00:00", None),
            ],
            "docker0": [address(socket.AF_INET, "172.17.0.1", "255.255.0.0")],
        },
    )
    assert [str(one) for one in network.host_networks()] == [
        "10.0.0.5/32",
        "fd00::5/128",
        "172.17.0.1/32",
        "172.17.0.0/16",
    ]


def test_the_record_is_plain_json():
    json.dumps(FIRST)
