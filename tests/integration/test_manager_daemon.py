"""The manager as a process of its own, with the real provider and real agents."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time

import pytest

from dispatcher.client.manager_client import ManagerClient
from dispatcher.client.transport import Transport
from dispatcher.plugin.errors import Conflict, Forbidden, ManagerUnreachable
from tests.support.installation import PASSWORD, Installation, until
from tests.support.manager_process import Worker

ADDRESS = "192.0.2.1"


@pytest.fixture
def place(short_tmp):
    with Installation(short_tmp) as place:
        yield place


def client(place, which="manager"):
    return ManagerClient(f"unix://{place.base}/run/{which}.sock")


def log(place):
    return (place.base / "manager.log").read_text(errors="replace")


def kill(place, number=signal.SIGKILL):
    process = place.processes["manager"]
    process.send_signal(number)
    return process.wait(20)


def pid_of(place, name):
    """The app's own process id, asked through its endpoint."""
    import http.client as http

    from dispatcher.plugin.endpoints import connect
    from dispatcher.plugin.model import Endpoint

    with_endpoint = client(place)
    endpoint = with_endpoint.runtime(name)["endpoint"]
    with_endpoint.close()
    connection = http.HTTPConnection("localhost", timeout=10)
    connection.sock = connect(Endpoint.parse(endpoint), None, 10)
    connection.request("GET", "/pid")
    import json

    pid = json.loads(connection.getresponse().read())["pid"]
    connection.close()
    return pid


def test_kill_minus_nine_then_the_same_agents_and_sessions(place):
    place.start("manager")
    admin, proxy = client(place), client(place, "proxy")
    admin.create_agent("alice", PASSWORD)
    session = proxy.login("alice", PASSWORD, ADDRESS)["session"]["sha256"]
    assert admin.set_state("alice", "running", wait=20)["state"] == "running"
    started = admin.runtime("alice")["started_at"]
    pid = pid_of(place, "alice")
    for _ in range(3):
        kill(place)
        assert (place.base / "run/manager.sock").is_socket()  # left over
        with pytest.raises(ManagerUnreachable):
            admin.agents()
        assert pid_of_alive(place, pid)
        place.start("manager")
        assert admin.state("alice")["state"] == "running"
        assert admin.runtime("alice")["started_at"] == started
        assert pid_of(place, "alice") == pid
        assert proxy.lookup(session)["user"] == "alice"
    text = log(place)
    assert "removed a leftover socket" in text
    assert "the last manager did not stop cleanly" in text
    assert PASSWORD not in text
    admin.close()
    proxy.close()


def pid_of_alive(place, pid):
    """Whether the agent goes on: its socket still answers, though nobody manages it."""
    found = list((place.base / "run/a").glob("*/s"))
    with socket.socket(socket.AF_UNIX) as sock:
        sock.settimeout(5)
        sock.connect(str(found[0]))
        sock.sendall(b"GET /pid HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n")
        return f'"pid": {pid}'.encode() in b"".join(iter(lambda: sock.recv(65536), b""))


def test_a_clean_end_leaves_no_socket_and_no_warning(place):
    process = place.start("manager")
    assert process.poll() is None
    admin = client(place)
    admin.create_agent("alice", PASSWORD)
    admin.set_state("alice", "running", wait=20)
    pid = pid_of(place, "alice")
    began = time.monotonic()
    assert kill(place, signal.SIGTERM) == 0
    assert time.monotonic() - began < 5
    assert not list((place.base / "run").glob("*.sock"))
    place.start("manager")
    assert pid_of(place, "alice") == pid
    assert "leftover" not in log(place)
    assert "did not stop cleanly" not in log(place)
    admin.close()


def test_it_ends_whichever_of_its_threads_the_kernel_hands_the_signal_to(place):
    """Seen: a main thread that waited for a lock slept on when another thread got the signal."""
    import ctypes
    import platform

    tgkill = {"x86_64": 234, "aarch64": 131}[platform.machine()]
    process = place.start("manager")
    others = [int(name) for name in os.listdir(f"/proc/{process.pid}/task") if name != str(process.pid)]
    library = ctypes.CDLL(None)
    # A thread may have ended by now.
    assert any(library.syscall(tgkill, process.pid, other, signal.SIGTERM) == 0 for other in sorted(others)[::-1])
    assert process.wait(10) == 0


def test_a_second_manager_is_refused_and_the_first_goes_on(place):
    place.start("manager")
    second = subprocess.run(
        [sys.executable, "-m", "dispatcher", "--config", str(place.config), "manager"],
        capture_output=True,
        text=True,
        timeout=30,
    )
    assert second.returncode == Conflict.exit_code
    assert "Another manager is running" in second.stderr
    assert str(place.processes["manager"].pid) in second.stderr
    assert "Traceback" not in second.stderr
    with_first = client(place)
    assert with_first.healthz()["status"] == "ok"
    with_first.close()


def test_the_same_state_from_another_run_directory_is_refused_too(place):
    place.start("manager")
    other = place.base / "other.toml"
    other.write_text(
        place.config.read_text().replace(f'run_dir = "{place.base}/run"', f'run_dir = "{place.base}/r2"')
    )
    second = subprocess.run(
        [sys.executable, "-m", "dispatcher", "--config", str(other), "manager"],
        capture_output=True,
        text=True,
        timeout=30,
    )
    assert second.returncode == Conflict.exit_code
    assert "manager.lock" in second.stderr


def test_sighup_and_reload_use_a_good_configuration_and_refuse_a_bad_one(place):
    place.start("manager")
    good = place.config.read_text()
    place.config.write_text('[auth]\nsession_idle = "2h"\n' + good)
    place.processes["manager"].send_signal(signal.SIGHUP)
    until("the log tells", lambda: "read the configuration again" in log(place))
    admin, proxy = client(place), client(place, "proxy")
    admin.create_agent("alice", PASSWORD)
    assert proxy.login("alice", PASSWORD, ADDRESS)["session"]["ttl"] == pytest.approx(7200, abs=5)
    place.config.write_text('[auth]\nsession_idel = "1h"\n' + good)
    place.processes["manager"].send_signal(signal.SIGHUP)
    until("the log tells", lambda: "session_idle" in log(place))
    answer = place.admin("POST", "/reload")
    assert answer.status == 400
    assert "did you mean" in answer.body.decode()
    assert admin.healthz()["configuration_changed"]
    assert proxy.login("alice", PASSWORD, ADDRESS)["session"]["ttl"] == pytest.approx(7200, abs=5)
    place.config.write_text(good)
    assert any("session" in sentence for sentence in admin.reload()["changed"])
    assert not admin.healthz()["configuration_changed"]
    admin.close()
    proxy.close()


def test_systemd_is_told(place, short_tmp):
    path = short_tmp / "notify"
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sock:
        sock.bind(str(path))
        sock.settimeout(20)
        os.environ["NOTIFY_SOCKET"] = str(path)
        try:
            place.start("manager")
        finally:
            del os.environ["NOTIFY_SOCKET"]
        assert sock.recv(100) == b"READY=1"
        kill(place, signal.SIGTERM)
        assert sock.recv(100) == b"STOPPING=1"


def test_an_unusable_state_directory_is_reported_in_one_line(place):
    (place.base / "state").write_text("in the way")
    ended = subprocess.run(
        [sys.executable, "-m", "dispatcher", "--config", str(place.config), "manager"],
        capture_output=True,
        text=True,
        timeout=30,
    )
    (place.base / "state").unlink()
    assert ended.returncode != 0
    assert "Traceback" not in ended.stderr
    assert str(place.base / "state") in ended.stderr


def test_the_feed_of_a_killed_manager_ends_and_a_new_one_begins(place):
    place.start("manager")
    admin, proxy = client(place), client(place, "proxy")
    admin.create_agent("alice", PASSWORD)
    session = proxy.login("alice", PASSWORD, ADDRESS)["session"]["sha256"]
    worker = Worker(place.base / "run/feed.sock")
    hello, agents, sessions = worker.snapshot()
    assert session in sessions
    if agents["alice"]["state"] != "running":
        worker.until(lambda m: any(row["state"] == "running" for row in m.get("agents", [])))
    kill(place)
    while worker.read() is not None:
        pass
    worker.close()
    place.start("manager")
    worker = Worker(place.base / "run/feed.sock")
    again, agents, sessions = worker.snapshot()
    assert again["installation"] == hello["installation"]
    assert agents["alice"]["state"] == "running"
    assert agents["alice"]["endpoint"].startswith("unix:")
    assert session in sessions
    worker.close()
    admin.close()
    proxy.close()


def test_removal_ends_the_sessions_within_a_moment_and_data_does_not_come_back(place):
    place.start("manager")
    admin, proxy = client(place), client(place, "proxy")
    admin.create_agent("alice", PASSWORD)
    session = proxy.login("alice", PASSWORD, ADDRESS)["session"]["sha256"]
    worker = Worker(place.base / "run/feed.sock")
    worker.snapshot()
    began = time.monotonic()
    admin.delete_agent("alice")
    worker.until(lambda m: session in m.get("sessions_gone", []))
    assert time.monotonic() - began < 2
    until("alice is gone", lambda: not admin.agents()["agents"])
    with pytest.raises(Forbidden):
        proxy.login("alice", PASSWORD, ADDRESS)
    admin.create_agent("alice", "another password")
    with pytest.raises(Forbidden):
        proxy.login("alice", PASSWORD, ADDRESS)
    worker.close()
    admin.close()
    proxy.close()


#: Runs a command as an ordinary user, who may read what lies below root's home, as the interpreter may lie there.
AS_ORDINARY_USER = [
    "setpriv",
    "--reuid=65534",
    "--regid=65534",
    "--clear-groups",
    "--inh-caps=-all,+dac_read_search",
    "--ambient-caps=-all,+dac_read_search",
]


@pytest.mark.root
def test_an_ordinary_user_can_run_it(short_tmp):
    """Without root its own user may do everything, another user nothing."""
    base = short_tmp / "u"
    base.mkdir()
    os.chown(base, 65534, 65534)
    config = base / "d.toml"
    config.write_text(f'[manager]\nstate_dir = "{base}/state"\nrun_dir = "{base}/run"\n')
    with (base / "log").open("wb") as output:
        command = [*AS_ORDINARY_USER, sys.executable, "-m", "dispatcher", "--config", str(config), "manager"]
        process = subprocess.Popen(command, stderr=output, env=os.environ | {"HOME": str(base)})

    def alive():
        assert process.poll() is None, (base / "log").read_text()
        return (base / "run/manager.sock").is_socket()

    try:
        until("it listens", alive)
        # A bound socket is not listening yet.
        admin = ManagerClient(Transport(f"unix://{base}/run/manager.sock", patience=20))
        until("it answers", lambda: admin.healthz()["status"])
        admin.create_agent("alice", PASSWORD)
        assert (base / "state/dispatcher.db").stat().st_uid == 65534
        assert (base / "run/manager.sock").stat().st_uid == 65534
        admin.delete_agent("alice", wait=20)
        admin.close()
    finally:
        process.terminate()
        ended = process.wait(20)
    assert ended == 0, (base / "log").read_text()
    assert "Traceback" not in (base / "log").read_text()
