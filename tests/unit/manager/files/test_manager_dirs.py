"""Directories that others cannot reach into, and one manager at a time."""

from __future__ import annotations

import os
import stat
import subprocess
import sys

import pytest

from dispatcher.config.host_users import HostAccounts
from dispatcher.plugin.errors import ConfigError, Conflict, Unavailable
from dispatcher.manager.files.manager_dirs import Lock, make_directories
from dispatcher.config.layout import Paths

ME = HostAccounts(proxy_uid=os.geteuid(), proxy_gid=os.getegid(), admin_gid=None, agent_uids=None, made_up=False)


@pytest.fixture
def paths(tmp_path):
    return Paths(tmp_path / "run", tmp_path / "deep/state")


def mode(path):
    return stat.S_IMODE(path.stat().st_mode)


@pytest.mark.parametrize("umask", [0o000, 0o022, 0o077])
def test_modes_do_not_depend_on_the_umask_and_are_repaired(paths, umask):
    before = os.umask(umask)
    try:
        make_directories(paths, ME)
    finally:
        os.umask(before)
    expected = {paths.run_dir: 0o755, paths.state_dir: 0o711, paths.secrets_dir: 0o700, paths.proxy_dir: 0o700}
    assert {path: mode(path) for path in expected} == expected
    for path in (paths.run_dir, paths.state_dir, paths.secrets_dir):
        path.chmod(0o777)
    make_directories(paths, ME)
    assert {path: mode(path) for path in expected} == expected


def test_a_link_in_place_of_a_directory_is_refused(paths, tmp_path):
    (tmp_path / "elsewhere").mkdir()
    paths.run_dir.symlink_to(tmp_path / "elsewhere")
    with pytest.raises(ConfigError) as caught:
        make_directories(paths, ME)
    assert f"{paths.run_dir} is a symbolic link" in str(caught.value)
    assert f"name {tmp_path}/elsewhere in manager" in caught.value.fix, "nobody is told to remove it"
    assert list((tmp_path / "elsewhere").iterdir()) == []


def test_a_parent_that_the_own_group_may_write_to_is_fine(paths, tmp_path):
    tmp_path.chmod(0o775)
    make_directories(paths, ME)


def test_a_parent_that_everybody_may_write_to_is_refused_unless_sticky(paths, tmp_path):
    tmp_path.chmod(0o777)
    with pytest.raises(ConfigError) as caught:
        make_directories(paths, ME)
    assert "chmod" in caught.value.fix
    tmp_path.chmod(0o1777)
    make_directories(paths, ME)


@pytest.mark.root
def test_a_directory_of_somebody_else_is_refused(paths):
    paths.run_dir.mkdir()
    os.chown(paths.run_dir, 54321, 54321)
    with pytest.raises(ConfigError) as caught:
        make_directories(paths, ME)
    assert "54321" in caught.value.why


@pytest.mark.root
def test_a_parent_that_somebody_made_in_tmp_is_refused(tmp_path):
    tmp_path.chmod(0o1777)
    theirs = tmp_path / "dispatcher-0"
    for run_dir in (theirs / "dispatcher", theirs / "a/dispatcher"):
        theirs.mkdir()
        os.chown(theirs, 54321, 54321)
        with pytest.raises(ConfigError) as caught:
            make_directories(Paths(run_dir, tmp_path / "state"), ME)
        assert "belongs to another user" in caught.value.what
        theirs.rmdir()  # nothing was made in it


@pytest.mark.root
@pytest.mark.parametrize("target_owner", [54321, os.geteuid()])
def test_a_link_that_somebody_made_in_tmp_is_refused(tmp_path, target_owner):
    tmp_path.chmod(0o1777)
    target = tmp_path / "target"
    target.mkdir()
    os.chown(target, target_owner, 54321)
    (tmp_path / "dispatcher-0").symlink_to(target)
    os.chown(tmp_path / "dispatcher-0", 54321, 54321, follow_symlinks=False)
    with pytest.raises(ConfigError, match="belongs to another user"):
        make_directories(Paths(tmp_path / "dispatcher-0/dispatcher", tmp_path / "state"), ME)
    assert not list(target.iterdir())


def test_a_file_in_the_way_is_said(paths):
    paths.run_dir.write_text("")
    with pytest.raises(ConfigError):
        make_directories(paths, ME)


def test_a_disk_that_cannot_be_written_is_said(paths, monkeypatch):
    from pathlib import Path

    def full(self, *_args, **_more):
        raise OSError(28, "No space left on device", str(self))

    monkeypatch.setattr(Path, "mkdir", full)
    with pytest.raises(Unavailable) as caught:
        make_directories(paths, ME)
    assert "No space left" in caught.value.why


def test_the_lock_is_held_by_one_and_says_by_whom(tmp_path):
    lock = Lock(tmp_path)
    with pytest.raises(Conflict) as caught:
        Lock(tmp_path)
    assert str(os.getpid()) in caught.value.why
    lock.close()
    Lock(tmp_path).close()
    assert (tmp_path / "manager.lock").read_text() == ""


def test_leftovers_of_a_crash_are_reused(tmp_path):
    (tmp_path / "manager.lock").write_text("4711")
    lock = Lock(tmp_path)
    assert (tmp_path / "manager.lock").read_text() == str(os.getpid())
    lock.close()


def test_a_lock_that_cannot_be_created_is_reported(tmp_path):
    (tmp_path / "manager.lock").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(Unavailable) as caught:
        Lock(tmp_path)
    assert "manager.lock" in caught.value.what
    assert not (tmp_path / "elsewhere").exists()


FORKED = """
import os, pathlib, socket, sys
from dispatcher.manager.files.manager_dirs import Lock
from dispatcher.manager.rest.listeners import tcp_socket
lock, listener = Lock(pathlib.Path(sys.argv[1])), tcp_socket("127.0.0.1:0")
listener.listen()
address = "127.0.0.1:%d" % listener.getsockname()[1]
reader, writer = os.pipe()
forked, told = os.pipe()
if os.fork() == 0:
    os.close(writer)
    os.write(told, b"!")
    os.read(reader, 1)
    os._exit(0)
os.read(forked, 1)
lock.close()
listener.close()
Lock(pathlib.Path(sys.argv[1])).close()
tcp_socket(address).listen()
"""


def test_a_child_that_a_plugin_forked_keeps_neither_lock_nor_port(tmp_path):
    done = subprocess.run([sys.executable, "-c", FORKED, tmp_path], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
