"""What an agent's earlier container has left when its next one starts."""

from types import SimpleNamespace

import pytest

from dispatcher.plugin import AgentSpec, App, Deadline, Handle, ProviderContext
from dispatcher_docker.container_config import User
from dispatcher_docker.options import DockerAppOptions, DockerOptions
from dispatcher_docker.start import Starter


@pytest.mark.parametrize("kind", ["link", "directory", "nothing"])
def test_what_an_agent_left_in_place_of_its_socket_is_gone_before_the_start(tmp_path, monkeypatch, kind):
    """The health check would take a link for an attack, and the start would fail."""
    engine = SimpleNamespace(is_local=True, is_podman=False, make=lambda *_: None)
    context = ProviderContext(
        installation="7e570001", state_dir=tmp_path / "state", run_dir=tmp_path, proxy_gid=0, privileged=False
    )
    starter = Starter(engine, DockerOptions(), context)
    monkeypatch.setattr(starter.users, "prepare", lambda *_: User(name="alice"))
    monkeypatch.setattr(starter.exit_reasons, "forget", lambda _: None)
    run_dir, victim = tmp_path / "run", tmp_path / "victim"
    run_dir.mkdir()
    victim.write_text("precious")
    spec = AgentSpec(
        installation="7e570001",
        agent="alice",
        user="alice",
        app=App(name="web", provider="docker", options=DockerAppOptions(image="web:1", command=["run"])),
        uid=300001,
        gid=300001,
        proxy_gid=300000,
        data_dir=tmp_path / "data",
        run_dir=run_dir,
        log_dir=tmp_path / "log",
    )
    if kind == "link":
        spec.socket.symlink_to(victim)
    elif kind == "directory":
        (spec.socket / "deep").mkdir(parents=True)
    seen = []
    monkeypatch.setattr(starter, "_start", lambda *_: seen.append(list(run_dir.iterdir())))
    starter.run(
        spec,
        Handle(provider="docker", agent="alice", name="d-alice", data={}),
        None,
        image="sha256:1",
        remapped=False,
        deadline=Deadline(5),
        progress=lambda *_: None,
    )
    assert seen == [[]]
    assert victim.read_text() == "precious"
