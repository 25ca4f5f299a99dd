"""The supervisor on real, sandboxed processes: killed managers, many starts, loops, hostile files, small disks."""

import contextlib
import os
import signal
import socket
import subprocess
import threading
import time

import psutil
import pytest

from dispatcher.plugin.endpoints import connect
from dispatcher.manager.storage.rows import Desired
from dispatcher.manager.agents.lifecycle import State
from tests.support.manager_world import gone, reach, until
from tests.support.supervised import Place, python

pytestmark = [pytest.mark.bubblewrap, pytest.mark.xdist_group("supervised")]


@pytest.fixture
def place():
    made = Place()
    yield made
    made.close()


def running(supervisor, name="alice", seconds=30):
    if name not in supervisor.registry.agents:
        supervisor.commands.create(name, app=None, password_hash="hash")
    supervisor.commands.set_desired(name, Desired.RUNNING)
    return reach(supervisor, name, "running", seconds=seconds)


def ask(view, path="/"):
    with connect(view.endpoint, view.owner_uid, 10) as sock:
        sock.sendall(f"GET {path} HTTP/1.1\r\nHost: x\r\n\r\n".encode())
        answer = b""
        with contextlib.suppress(ConnectionResetError):
            while block := sock.recv(4096):
                answer += block
    return answer.partition(b"\r\n\r\n")[2].decode()


def processes(place):
    """Return the app's processes of this installation, seen from the host."""
    found = []
    for process in psutil.process_iter(["cmdline", "status"]):
        line = process.info["cmdline"] or []
        if process.info["status"] != psutil.STATUS_ZOMBIE and any("cannot go on" in part for part in line):
            with contextlib.suppress(psutil.Error, OSError):
                if str(place.directory) in " ".join(line) or _socket_below(process, place):
                    found.append(process)
    return found


def _socket_below(process, place):
    """Whether a process belongs to an agent here: inside a sandbox paths look the same from outside."""
    with open(f"/proc/{process.pid}/mountinfo") as file:
        return str(place.directory) in file.read()


def apps(place):
    """Return the pids of the app itself, without what wraps it."""
    return [p.pid for p in processes(place) if "python" in os.path.basename(p.exe() or "python")]


def kinds(supervisor, name="alice"):
    return [event.kind for event in supervisor.queries.events(name, 100)]


# --- killed managers


@pytest.mark.parametrize("step", ["preparing", "starting", "started", "waiting for the app"])
def test_kill_9_at_every_step_of_a_start(place, step):
    process = place.process(step)
    process.say("create alice")
    process.say("running alice")
    assert process.wait() == -signal.SIGKILL
    supervisor = place.supervisor()
    view = reach(supervisor, "alice", "running", seconds=30)
    assert ask(view)
    assert len(apps(place)) == 1
    supervisor.commands.remove("alice", keep_data=False)
    gone(supervisor, "alice", seconds=20)
    assert processes(place) == []


@pytest.mark.parametrize(
    ("command", "step"),
    [
        ("stopped", "stopping"),
        ("stopped", "stopped"),
        ("restart", "stopped"),
        ("reset", "deleting the data"),
        ("remove", "removing"),
        ("remove", "forgetting"),
    ],
)
def test_kill_9_in_other_operations(place, command, step):
    process = place.process(step)
    for line in ("create alice", "running alice", "wait alice running", f"{command} alice"):
        process.say(line)
    assert process.wait() == -signal.SIGKILL
    supervisor = place.supervisor()
    if command == "remove":
        until(lambda: supervisor.queries.views() == [], 20)
        assert processes(place) == []
    elif command == "stopped":
        reach(supervisor, "alice", "stopped", seconds=20)
        assert processes(place) == []
    else:
        reach(supervisor, "alice", "running", seconds=20)
        assert len(apps(place)) == 1


def test_a_manager_that_was_killed_finds_its_agents_again(place):
    process = place.process()
    names = [f"user{number}" for number in range(10)]
    for name in names:
        process.say(f"create {name}")
        process.say(f"running {name}")
    for name in names:
        process.say(f"wait {name} running")
    process.kill()
    before = sorted(apps(place))
    assert len(before) == 10
    began = time.monotonic()
    supervisor = place.supervisor()
    assert time.monotonic() - began < 2  # the figure that counts is measured on a quiet machine: bench/
    views = supervisor.queries.views()
    assert {view.state for view in views} == {State.RUNNING}
    assert {ask(view) for view in views}
    assert sorted(apps(place)) == before


# --- many, and against each other


def test_fifty_starts_at_once(place):
    supervisor = place.supervisor()
    names = [f"user{number}" for number in range(50)]
    for name in names:
        supervisor.commands.create(name, app=None, password_hash="h")
    threads = [
        threading.Thread(target=supervisor.commands.set_desired, args=(name, Desired.RUNNING)) for name in names
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    views = [reach(supervisor, name, "running", seconds=60) for name in names]
    assert len({str(view.endpoint) for view in views}) == 50
    assert all(ask(view) for view in views)
    assert len(apps(place)) == 50
    for name in names:
        supervisor.commands.set_desired(name, Desired.STOPPED)
    for name in names:
        reach(supervisor, name, "stopped", seconds=60)
    assert processes(place) == []


def test_stop_and_start_race(place):
    supervisor = place.supervisor()
    running(supervisor)
    for _ in range(5):
        supervisor.commands.set_desired("alice", Desired.STOPPED)
        supervisor.commands.set_desired("alice", Desired.RUNNING)
        supervisor.commands.restart("alice")
    view = reach(supervisor, "alice", "running", seconds=30)
    until(lambda: supervisor.queries.view("alice").state is State.RUNNING and len(apps(place)) == 1)
    assert ask(supervisor.queries.view("alice"))
    assert view.failure is None


def test_a_slow_start_is_cancelled(place):
    place.app["environment"] = {"DELAY": "60"}
    supervisor = place.supervisor()
    supervisor.commands.create("alice", app=None, password_hash="h")
    supervisor.commands.set_desired("alice", Desired.RUNNING)
    until(lambda: supervisor.queries.view("alice").stage == "waiting for the app")
    supervisor.commands.set_desired("alice", Desired.STOPPED)
    assert reach(supervisor, "alice", "stopped", seconds=10).failure is None
    assert processes(place) == []


def test_two_installations_leave_each_other_alone(place):
    other = Place()
    try:
        one, two = place.supervisor(), other.supervisor()
        running(one)
        running(two)
        one.commands.remove("alice", keep_data=False)
        gone(one, "alice", seconds=20)
        assert ask(two.queries.view("alice"))
        assert processes(place) == []
        assert len(apps(other)) == 1
    finally:
        other.close()


# --- ends


def test_a_killed_agent_shows_within_a_second_and_comes_back(place):
    supervisor = place.supervisor()
    running(supervisor)
    (pid,) = apps(place)
    os.kill(pid, signal.SIGKILL)
    began = time.monotonic()
    supervisor.reconciler.check_endpoint("alice")
    until(lambda: "died" in kinds(supervisor), 5)
    assert time.monotonic() - began < 2
    view = reach(supervisor, "alice", "running")
    assert ask(view)
    assert apps(place) != [pid]
    died = next(event for event in supervisor.queries.events("alice", 20) if event.kind == "died")
    assert "9" in died.detail


def test_an_app_that_ends_by_itself_has_its_exit_code_told(place):
    supervisor = place.supervisor()
    view = running(supervisor)
    ask(view, "/exit")
    supervisor.reconciler.check_endpoint("alice")
    until(lambda: "died" in kinds(supervisor), 5)
    died = next(event for event in supervisor.queries.events("alice", 20) if event.kind == "died")
    assert "7" in died.detail
    reach(supervisor, "alice", "running")


def test_an_app_that_ends_in_a_loop_is_failed_with_its_last_lines(place):
    place.app |= {"environment": {"EXIT": "3"}, "max_restarts": 1}
    supervisor = place.supervisor()
    supervisor.commands.create("alice", app=None, password_hash="h")
    supervisor.commands.set_desired("alice", Desired.RUNNING)
    view = reach(supervisor, "alice", "failed", seconds=20)
    assert "exit code 3" in view.failure.why
    assert "cannot go on" in view.failure.log[-1]
    until(
        lambda: (
            supervisor.registry.find("alice").row.retry_at is None and supervisor.queries.view("alice").failure
        ),
        20,
    )
    assert kinds(supervisor).count("starting") == 2
    assert any("gave up" in sentence for sentence in supervisor.queries.why("alice"))
    assert processes(place) == []


def test_the_process_sleeps_and_wakes_with_its_memory(place):
    supervisor = place.supervisor()
    if "suspend" not in supervisor.queries.providers()[0]["capabilities"]:
        pytest.skip("the provider cannot suspend here")
    running(supervisor)
    before = apps(place)
    supervisor.commands.set_desired("alice", Desired.SUSPENDED)
    assert reach(supervisor, "alice", "suspended").feed_state == "asleep"
    supervisor.commands.wake("alice")
    assert ask(reach(supervisor, "alice", "running"))
    assert apps(place) == before


def test_output_is_followed(place):
    supervisor = place.supervisor()
    view = running(supervisor)
    until(lambda: supervisor.queries.logs("alice", tail=10, after=None)[0] == ["begins"])  # it is on its way
    _, cursor = supervisor.queries.logs("alice", tail=10, after=None)
    seen = []
    for number in range(5):
        ask(view, f"/say/{number}")

    def more():
        nonlocal cursor
        found, cursor = supervisor.queries.logs("alice", tail=10, after=cursor)
        seen.extend(found)
        return len(seen) >= 5

    until(more)
    assert seen == [f"/say/{number}" for number in range(5)]


# --- hostile files and small disks


def test_reset_and_remove_follow_no_link(place, tmp_path):
    victim = tmp_path / "victim"
    victim.mkdir()
    (victim / "file").write_text("precious")
    supervisor = place.supervisor()
    running(supervisor)
    data = supervisor.data.data_dir("alice")
    endpoint = supervisor.data.paths.endpoint_dir("alice")
    for directory in (data, endpoint):
        (directory / "link").symlink_to(victim)
        (directory / "deep").mkdir()
        (directory / "deep/file").symlink_to(victim / "file")
    supervisor.commands.reset_data("alice")
    until(lambda: "reset" in kinds(supervisor), 20)
    reach(supervisor, "alice", "running", seconds=20)
    assert {path.name for path in data.iterdir()} <= {".tmp"}  # for temporary files
    (data / "link").symlink_to(victim)
    supervisor.commands.remove("alice", keep_data=False)
    gone(supervisor, "alice", seconds=20)
    assert (victim / "file").read_text() == "precious"
    assert not endpoint.exists()


@pytest.mark.root
def test_an_agent_s_socket_that_is_a_link_is_refused(place):
    """The agent swaps its socket for a link to the manager's: nothing reaches the target."""
    supervisor = place.supervisor()
    target = place.directory / "run/manager.sock"
    with socket.socket(socket.AF_UNIX) as manager:
        manager.bind(str(target))
        manager.listen()
        manager.settimeout(0.2)
        os.chmod(target, 0o600)
        code = "import os,sys,time; os.symlink(sys.argv[2], sys.argv[1]); print('swapped', flush=True); time.sleep(60)"
        place.app["subprocess"]["command"][4:] = [code, "{socket}", str(target)]
        place.app |= {"start_timeout": 3, "max_restarts": 0}
        supervisor.apply_config(place.config())
        supervisor.commands.create("mallory", app=None, password_hash="h")
        supervisor.commands.set_desired("mallory", Desired.RUNNING)
        reach(supervisor, "mallory", "failed", seconds=20)
        with pytest.raises(TimeoutError):
            manager.accept()
        assert os.stat(target).st_mode & 0o777 == 0o600


#: Serves at a socket, then replaces that by another one, which is a link if the second argument says so.
REPLACES = """
import os, socket, sys, threading, time
def serve(path):
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(path)
    listener.listen()
    while True:
        with listener.accept()[0] as client:
            client.recv(4096)
            client.sendall(b"HTTP/1.1 204 No Content\\r\\n\\r\\n")
path, how = sys.argv[1:]
threading.Thread(target=serve, args=(path,)).start()
time.sleep(1)
threading.Thread(target=serve, args=(path + ".new",)).start()
time.sleep(0.2)
if how == "link":
    os.symlink(path + ".new", path + ".link")
    os.rename(path + ".link", path)
else:
    os.rename(path + ".new", path)
print("replaced", flush=True)
"""


@pytest.mark.parametrize("how", ["socket", "link"])
def test_an_agent_that_replaced_its_socket_is_restarted(place, how):
    place.app |= {"start_timeout": 10, "max_restarts": 0}
    place.app["subprocess"] = {"command": [python(), "-S", "-E", "-c", REPLACES, "{socket}", how]}
    supervisor = place.supervisor()
    supervisor.commands.create("alice", app=None, password_hash="hash")
    supervisor.commands.set_desired("alice", Desired.RUNNING)
    reach(supervisor, "alice", "running", seconds=20)
    first = supervisor.queries.view("alice")
    logs = place.directory / "state/agents"
    until(lambda: any(b"replaced" in path.read_bytes() for path in logs.glob("*/*/output.log")), 10)
    supervisor.commands.restart("alice")
    until(lambda: supervisor.queries.view("alice").since > first.since, 20)
    assert reach(supervisor, "alice", "running", seconds=20).failure is None


def test_an_app_that_listens_on_the_wrong_address_is_told_so(place):
    wrong = "import socket, time; s = socket.create_server(('127.0.0.1', 8888)); time.sleep(60)"
    place.app |= {"start_timeout": 2, "max_restarts": 0}
    place.app["subprocess"] = {"command": [python(), "-S", "-E", "-c", wrong, "{socket}"]}
    supervisor = place.supervisor()
    supervisor.commands.create("alice", app=None, password_hash="hash")
    supervisor.commands.set_desired("alice", Desired.RUNNING)
    failure = reach(supervisor, "alice", "failed", seconds=20).failure
    assert failure.why == "it does not listen yet; it listens at tcp:127.0.0.1:8888 instead"
    assert "{socket}" in failure.fix
    assert any("tcp:127.0.0.1:8888" in sentence for sentence in supervisor.queries.why("alice"))


@pytest.fixture
def small_disk(place, request):
    """The state directory on a small file system."""
    state = place.directory / "state"
    made = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", f"size={request.param},mode=0711", "tmpfs", str(state)], capture_output=True
    )
    if made.returncode:
        pytest.skip(f"no tmpfs can be mounted: {made.stderr.decode()}")
    yield state
    (state / "ballast").unlink(missing_ok=True)
    for supervisor in list(place.supervisors):
        for view in supervisor.queries.views():
            supervisor.commands.remove(view.name, keep_data=False)
            supervisor.queries.wait(view.name, lambda view: view is None, 30)
        place.end(supervisor)
    subprocess.run(["umount", "-l", str(state)], check=True)


@pytest.mark.root
@pytest.mark.parametrize("small_disk", ["64m"], indirect=True)
def test_who_fills_the_disk_can_be_stopped_and_removed_and_others_still_sign_in(place, small_disk, monkeypatch):
    monkeypatch.setattr("dispatcher.manager.agents.composition.DISK_FIRST", 0.0)
    supervisor = place.supervisor()
    running(supervisor)
    running(supervisor, "bob")
    log = small_disk / "dispatcher.db-wal"
    until(
        lambda: log.exists() and log.stat().st_size > 1 << 22 and (small_disk / "dispatcher.db-reserve").exists()
    )
    ballast = supervisor.data.data_dir("alice") / "much"

    def fill():
        with contextlib.suppress(OSError), open(ballast, "ab", buffering=0) as file:
            while True:
                file.write(b"x" * 512)

    fill()
    database = supervisor.store.database
    for number in range(500):  # as many writes as sign-ins
        database.set_meta(f"key{number}", "x" * 200)
    supervisor.commands.create("carol", app=None, password_hash="hash")
    assert supervisor.store.get_user("carol") is not None
    fill()
    supervisor.commands.set_desired("alice", Desired.STOPPED)
    reach(supervisor, "alice", "stopped", seconds=20)
    place.end(supervisor)
    fill()
    new = place.supervisor()  # it starts on a full disk
    assert {view.name for view in new.queries.views()} == {"alice", "bob", "carol"}
    new.commands.remove("alice", keep_data=False)
    until(lambda: "alice" not in new.registry.agents, 20)
    assert not ballast.exists()
    assert ask(new.queries.view("bob"))


@pytest.mark.root
@pytest.mark.parametrize("small_disk", ["4m"], indirect=True)
def test_a_disk_that_was_never_free_is_a_clear_error_and_nothing_is_lost(place, small_disk):
    from dispatcher.plugin.errors import DispatcherError

    supervisor = place.supervisor()
    running(supervisor)
    ballast = small_disk / "ballast"
    with contextlib.suppress(OSError), open(ballast, "wb", buffering=0) as file:
        while True:
            file.write(b"x" * 4096)
    errors = []
    for number in range(200):  # whatever room was left is used up by the journal
        try:
            supervisor.commands.create(f"user{number}", app=None, password_hash="h" * 100)
        except DispatcherError as error:
            errors.append(error)
            break
    assert "disk is full" in str(errors[0])
    assert "free some space" in errors[0].fix
    assert ask(supervisor.queries.view("alice"))
    assert supervisor.queries.view("alice").state is State.RUNNING
    os.unlink(ballast)
    supervisor.commands.set_desired("alice", Desired.STOPPED)
    reach(supervisor, "alice", "stopped", seconds=20)
    running(supervisor, "bob")
    assert supervisor.store.get_user("alice") is not None
