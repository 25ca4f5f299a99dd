"""The files of an agent's user, which the agent reads in its container."""

import os
import stat
from pathlib import Path
from types import SimpleNamespace

import pytest

from dispatcher.plugin import AgentSpec, App, Deadline
from dispatcher_docker.options import DockerAppOptions
from dispatcher_docker.data import Users


@pytest.fixture
def strict_umask():
    before = os.umask(0o077)
    yield
    os.umask(before)


def test_the_agent_can_read_its_user_whatever_the_managers_umask(tmp_path, strict_umask, monkeypatch):
    users = Users(SimpleNamespace(is_local=True), "7e570001", tmp_path / "users")
    monkeypatch.setattr(users, "_of_image", lambda *_: (b"root:x:0:0::/root:/bin/sh\n", b"root:x:0:\n"))
    spec = AgentSpec(
        installation="7e570001",
        agent="alice",
        user="alice",
        app=App(name="web", provider="docker", options=DockerAppOptions(image="web:1", command=["run"])),
        uid=300001,
        gid=300001,
        proxy_gid=300000,
        data_dir=Path("/state/alice/data"),
        run_dir=Path("/run/d/a/1"),
        log_dir=Path("/state/alice/log"),
    )
    for _ in range(2):
        made = users.prepare(spec, "sha256:1", Deadline(1))
        for name in ("passwd", "group"):
            assert stat.S_IMODE((made.directory / name).stat().st_mode) == 0o644
            (made.directory / name).chmod(0o600)  # as an earlier version has left it
