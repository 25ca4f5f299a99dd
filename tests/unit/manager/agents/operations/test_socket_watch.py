"""Waiting for an app's socket: woken by it, not by the clock, and never kept busy by the agent."""

import os
import socket
import threading
import time

import pytest

from dispatcher.manager.agents.operations.readiness import watch_directory
from dispatcher.manager.storage.rows import Kind
from dispatcher.manager.agents.agent import Operation
from dispatcher.manager.agents.operations.readiness import MAX_OTHER_FILES, MAX_PAUSE, PollPacer
from dispatcher.plugin.model import Endpoint


@pytest.fixture
def arrived(tmp_path):
    with watch_directory(str(tmp_path)) as wait:
        yield wait


@pytest.fixture
def pauses():
    made = PollPacer(Operation(Kind.START, 0.0))
    yield made
    made.close()


def appear(path):
    sock = socket.socket(socket.AF_UNIX)
    sock.bind(str(path))
    return sock


def test_a_socket_that_appears_ends_the_wait(arrived, tmp_path):
    assert not arrived(0)
    with appear(tmp_path / "s"):
        assert arrived(5)
    assert not arrived(0), "what was told once is not told again"


def test_a_socket_that_is_renamed_into_place_counts(arrived, tmp_path):
    with appear(tmp_path.parent / "elsewhere"):
        os.rename(tmp_path.parent / "elsewhere", tmp_path / "s")
        assert arrived(5)


def test_neither_nothing_nor_a_link_is_watched(tmp_path):
    (tmp_path / "link").symlink_to(tmp_path)
    for name in ("absent", "link"):
        with pytest.raises(OSError, match="No such file|Not a directory"), watch_directory(str(tmp_path / name)):
            pass


def test_a_thread_keeps_one_descriptor_and_gives_it_back(tmp_path):
    def watch():
        for _ in range(20):
            with watch_directory(str(tmp_path)) as wait:
                wait(0)
            with (
                pytest.raises(OSError, match="No such file|Not a directory"),
                watch_directory(str(tmp_path / "absent")),
            ):
                pass
        during.append(len(os.listdir("/proc/self/fd")))

    before, during = len(os.listdir("/proc/self/fd")), []
    for _ in range(3):
        thread = threading.Thread(target=watch)
        thread.start()
        thread.join()
    assert during == [before + 1] * 3
    assert len(os.listdir("/proc/self/fd")) == before


def test_what_came_for_one_agent_is_nothing_to_the_next(tmp_path):
    for name in ("alice", "bob"):
        (tmp_path / name).mkdir()
    with watch_directory(str(tmp_path / "alice")):
        (tmp_path / "alice" / "s").touch()
    with watch_directory(str(tmp_path / "bob")) as wait:
        (tmp_path / "alice" / "t").touch()
        assert not wait(0.02)
        (tmp_path / "bob" / "s").touch()
        assert wait(5)


def test_a_pause_ends_as_the_socket_appears(pauses, tmp_path):
    path = tmp_path / "s"
    timer = threading.Timer(0.03, lambda: appear(path).close())
    timer.start()
    began = time.monotonic()
    while not path.exists():
        pauses.pause(Endpoint.unix(path))
    assert time.monotonic() - began < 2
    timer.join()


def test_an_agent_that_fills_its_directory_is_soon_ignored(pauses, tmp_path):
    endpoint = Endpoint.unix(tmp_path / "s")
    pauses.pause(Endpoint.unix(tmp_path / "s"))
    for number in range(MAX_OTHER_FILES):
        (tmp_path / f"{number}").touch()
        pauses.pause(endpoint)
    began = time.monotonic()
    for number in range(200):  # 2 ms each at the least: no more than if it were quiet
        (tmp_path / f"more{number}").touch()
        pauses.pause(endpoint)
        if time.monotonic() - began > 0.3:
            break
    assert number >= 3
    assert time.monotonic() - began > number * 0.002


def test_without_a_directory_to_watch_time_passes(pauses, tmp_path):
    began = time.monotonic()
    for _ in range(5):
        pauses.pause(Endpoint.unix(tmp_path / "absent" / "s"))
    assert 0.004 < time.monotonic() - began < 5 * MAX_PAUSE + 2
