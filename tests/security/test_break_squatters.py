"""Another user of the machine, or the proxy's user, in the place of the manager's: who is believed."""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import sys
import tempfile
import threading
from pathlib import Path

import pytest

from dispatcher.cli.commands.daemons import _reload_proxy
from dispatcher.cli.serve import proxy_process
from dispatcher.plugin import SecretFiles
from tests.support import ordinary

VICTIM, THIEF = 61001, 61002
PROGRAM = """
import sys
from dispatcher.client.manager_client import ManagerClient
from dispatcher.plugin.errors import ManagerUnreachable
try:
    ManagerClient("unix://" + sys.argv[1], timeout=5).login("alice", "a secret of alice", "192.0.2.1")
except ManagerUnreachable as error:
    print(error.why)
"""
FEED = """
import asyncio, sys
from dispatcher.proxy.edge.feed_client import Feed
async def main():
    feed = Feed(sys.argv[1], lambda message: None, lambda: None, lambda: None)
    feed.open()
    await asyncio.sleep(1)
    feed.close()
asyncio.run(main())
"""


@pytest.fixture
def trap():
    """A socket at which user THIEF listens; what arrives there."""
    directory = Path(tempfile.mkdtemp(prefix="t-", dir="/tmp"))
    directory.chmod(0o777)
    arrived: list[bytes] = []
    listener = socket.socket(socket.AF_UNIX)

    def listen() -> None:  # the kernel notes who calls listen(2): a thread may have an id of its own
        import ctypes

        libc = ctypes.CDLL(None, use_errno=True)
        assert libc.syscall(117, -1, THIEF, -1) == 0  # setresuid of this thread alone (x86_64)
        listener.bind(str(directory / "manager.sock"))
        (directory / "manager.sock").chmod(0o666)
        listener.listen()

    thread = threading.Thread(target=listen)
    thread.start()
    thread.join()
    listener.settimeout(20)

    def take() -> None:
        try:
            connection, _ = listener.accept()
            connection.settimeout(3)
            arrived.append(connection.recv(65536))
            connection.close()
        except OSError:
            pass

    taker = threading.Thread(target=take)
    taker.start()
    yield directory, arrived, taker
    listener.close()
    shutil.rmtree(directory)


@pytest.mark.root
@pytest.mark.skipif(os.uname().machine != "x86_64", reason="takes another user id by the number of a system call")
@pytest.mark.parametrize("program", [PROGRAM, FEED])
def test_nothing_is_said_to_a_manager_that_is_another_users(trap, tmp_path, program) -> None:
    """A link below /tmp/dispatcher-UID can lead to any directory: only the listening process itself tells whose it is."""
    directory, arrived, taker = trap
    home = Path(tempfile.mkdtemp(prefix="v-", dir="/tmp"))
    os.chown(home, VICTIM, VICTIM)
    try:
        command = ordinary.command(VICTIM, home, sys.executable, "-c", program, str(directory / "manager.sock"))
        done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    finally:
        shutil.rmtree(home)
    taker.join()
    assert arrived == [b""]
    assert str(THIEF) in done.stdout + done.stderr


#: A proxy as far as `dispatcher reload` knows one; SIGHUP ends it with 7.
PROXY = """
import fcntl, os, signal, sys
signal.signal(signal.SIGHUP, lambda *_: os._exit(7))
file = open(sys.argv[1], "w")
fcntl.lockf(file, fcntl.LOCK_EX)
os.setuid(int(sys.argv[2]))
print(flush=True)
input()
"""


@pytest.fixture
def proxy(tmp_path):
    """Start a proxy of another user, in a PID namespace of its own where that is wanted."""
    (tmp_path / "proxy").mkdir()
    started = []

    def start(uid: int, *namespace: str, lock: str = "proxy/proxy.lock") -> subprocess.Popen[bytes]:
        command = [*namespace, sys.executable, "-c", PROXY, tmp_path / lock, str(uid), "proxy"]
        process = subprocess.Popen(command, stdin=-1, stdout=-1)
        started.append(process)
        assert process.stdout is not None
        process.stdout.readline()
        return process

    yield start
    for process in started:
        process.communicate(b"\n", 20)


@pytest.mark.root
def test_the_proxys_user_names_no_process_of_another_user_to_be_signalled(tmp_path, proxy) -> None:
    process = proxy(0)
    file = tmp_path / "proxy/proxy.lock"
    os.chown(file, THIEF, THIEF)
    assert not _reload_proxy(tmp_path)
    os.chown(file, 0, 0)
    assert proxy_process(tmp_path) == (process.pid, 0)
    assert _reload_proxy(tmp_path)
    assert process.wait(20) == 7
    assert proxy_process(tmp_path) is None, "its file is left, and belongs to nobody"


@pytest.mark.root
def test_a_proxy_in_another_pid_namespace_is_reloaded(tmp_path, proxy) -> None:
    """Where the proxy is in a container, a process id that it writes somewhere is another's here."""
    process = proxy(0, "unshare", "--pid", "--fork", "--kill-child")
    found = proxy_process(tmp_path)
    assert found is not None
    assert f"\nNSpid:\t{found[0]}\t1\n" in Path(f"/proc/{found[0]}/status").read_text()
    assert _reload_proxy(tmp_path)
    assert process.wait(20) == 7


@pytest.mark.root
def test_a_file_in_place_of_the_lock_makes_nobody_wait_for_ever(tmp_path, proxy) -> None:
    file = tmp_path / "proxy/proxy.lock"
    os.mkfifo(file)
    assert proxy_process(tmp_path) is None
    file.unlink()
    proxy(0, lock="elsewhere")
    file.symlink_to(tmp_path / "elsewhere")
    assert proxy_process(tmp_path) is None


@pytest.fixture
def memory():
    """A directory in memory where everybody may write."""
    path = Path(tempfile.mkdtemp(prefix="memory-", dir="/dev/shm"))
    path.chmod(0o1777)
    yield path
    shutil.rmtree(path)


@pytest.mark.root
@pytest.mark.parametrize("trap", ["directory", "link", "link into nothing", "file", "writable"])
def test_who_takes_the_name_of_the_secrets_directory_gains_and_stops_nothing(tmp_path, memory, trap) -> None:
    """/dev/shm is everybody's: a link there could lead root to what has an agent's name elsewhere, and delete it."""
    elsewhere = tmp_path / "volumes"
    for parent in (elsewhere, elsewhere / "secrets"):
        (parent / "agent-1").mkdir(parents=True)
        (parent / "agent-1/precious").write_text("alice's")
    name = "dispatcher-0a1b2c3d-secrets"
    files = SecretFiles(name, [memory])
    place = memory / name
    if trap.startswith("link"):
        place.symlink_to(elsewhere if trap == "link" else tmp_path / "nowhere")
    elif trap == "file":
        place.write_text("")
    else:
        (place / "agent-1").mkdir(parents=True)
        place.chmod(0o777)
    os.chown(place, THIEF if trap != "writable" else os.geteuid(), -1, follow_symlinks=False)

    files.remove("agent-1")
    files.write("agent-1", {"token": "t"}, VICTIM, VICTIM)
    (path,) = memory.glob(f"{name}*/agent-1/token")
    assert path.read_text() == "t" and path.stat().st_uid == VICTIM
    assert path.parent.parent.lstat().st_uid == os.geteuid() and not path.is_relative_to(place)
    again = SecretFiles(name, [memory])  # another manager, later
    again.write("agent-1", {"token": "t"}, VICTIM, VICTIM)
    assert len(list(memory.glob(f"{name}*/agent-1/token"))) == 1
    again.remove("agent-1")
    assert not list(memory.glob(f"{name}*/agent-1/token"))
    assert sorted(entry.name for entry in memory.iterdir()) == [name]
    assert (elsewhere / "agent-1/precious").exists() and (elsewhere / "secrets/agent-1/precious").exists()
