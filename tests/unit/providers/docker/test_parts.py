"""The Docker provider's small parts: log lines, layers, image names, cgroup files, secrets, explain."""

import logging
import os

import pytest

from dispatcher.plugin.errors import ConfigError, Unsupported
from dispatcher.plugin.model import App, Capability, Level, Limits, Network
from dispatcher.plugin.provider import ProviderContext
from dispatcher_docker import explain
from dispatcher_docker.host import Engine
from dispatcher_docker.images import Layers, _host, _repository_and_tag, directory_digest
from dispatcher_docker.logs import MAX_LINE, lines
from dispatcher_docker.options import DockerAppOptions, DockerOptions, Mount
from dispatcher_docker.usage import CgroupUsage, from_statistics


@pytest.fixture
def context(tmp_path):
    for name in ("state", "run"):
        (tmp_path / name).mkdir()
    return ProviderContext(
        installation="0123abcd",
        state_dir=tmp_path / "state",
        run_dir=tmp_path / "run",
        proxy_gid=os.getegid(),
        privileged=os.geteuid() == 0,
        log=logging.getLogger("test"),
    )


# -- logs


@pytest.mark.parametrize(
    ("chunks", "expected"),
    [
        ([], []),
        ([b"a\nb\n"], [b"a", b"b"]),
        ([b"a", b"b\nc"], [b"ab", b"c"]),
        ([b"\n\n"], [b"", b""]),
        ([b"\xff\x00\n"], [b"\xff\x00"]),
        ([b"x" * (MAX_LINE + 10) + b"\nnext\n"], [b"x" * MAX_LINE, b"next"]),
        ([b"x" * MAX_LINE, b"x" * MAX_LINE, b"x\nnext"], [b"x" * MAX_LINE, b"next"]),
        ([b"x" * (3 * MAX_LINE)], [b"x" * MAX_LINE]),
    ],
)
def test_lines_from_chunks(chunks, expected):
    assert list(lines(chunks)) == expected


# -- images


def test_layers_add_up():
    layers = Layers()
    said = [
        layers.update(message)
        for message in (
            {"status": "Pulling from library/x", "id": "latest"},
            {"status": "Pulling fs layer", "id": "a"},
            {"status": "Downloading", "id": "a", "progressDetail": {"current": 50, "total": 100}},
            {"status": "Downloading", "id": "b", "progressDetail": {"current": 100, "total": 100}},
            {"status": "Pull complete", "id": "a"},
            {"status": "Pull complete", "id": "b"},
        )
    ]
    fractions = [one[1] for one in said[2:]]
    assert fractions == sorted(fractions)
    assert said[-1] == ("2 of 2 layers, b pull complete", 1.0)


def test_layers_bear_nonsense():
    layers = Layers()
    for message in (
        {},
        {"status": "Digest: sha256:1"},
        {"id": "a"},
        {"id": "a", "status": "?", "progressDetail": {}},
    ):
        layers.update(message)


@pytest.mark.parametrize(
    ("reference", "repository", "tag", "host"),
    [
        ("x", "x", "latest", "docker.io"),
        ("x:1", "x", "1", "docker.io"),
        ("r.example.org:5000/a/b", "r.example.org:5000/a/b", "latest", "r.example.org:5000"),
        ("r.example.org:5000/a/b:2", "r.example.org:5000/a/b", "2", "r.example.org:5000"),
        ("x@sha256:00", "x", "sha256:00", "docker.io"),
        ("x:1@sha256:00", "x", "sha256:00", "docker.io"),
        ("localhost/x", "localhost/x", "latest", "localhost"),
        ("team/x", "team/x", "latest", "docker.io"),
    ],
)
def test_image_names(reference, repository, tag, host):
    assert _repository_and_tag(reference) == (repository, tag)
    assert _host(reference) == host


def test_a_build_directory_s_digest_sees_what_matters(tmp_path):
    (tmp_path / "Dockerfile").write_text("FROM scratch\n")
    first = directory_digest(tmp_path, "Dockerfile", {})
    assert directory_digest(tmp_path, "Dockerfile", {}) == first
    assert directory_digest(tmp_path, "Dockerfile", {"A": "1"}) != first
    (tmp_path / "new").symlink_to("/etc/passwd")
    assert directory_digest(tmp_path, "Dockerfile", {}) != first


# -- usage


def test_cgroup_files_version_1(tmp_path):
    proc = tmp_path / "proc/42"
    proc.mkdir(parents=True)
    (proc / "cgroup").write_text("5:memory:/docker/c1\n4:cpuacct,cpu:/docker/c1\n0::/\n")
    for controller in ("memory", "cpuacct", "cpu"):
        (tmp_path / controller / "docker/c1").mkdir(parents=True)
    (tmp_path / "memory/docker/c1/memory.usage_in_bytes").write_text("5000\n")
    (tmp_path / "memory/docker/c1/memory.stat").write_text("cache 1\ntotal_inactive_file 2000\n")
    (tmp_path / "cpuacct/docker/c1/cpuacct.usage").write_text("1500000000\n")
    usage = CgroupUsage(tmp_path, tmp_path / "proc")
    assert usage.read("c1") is None
    usage.learn("c1", 42)
    assert (usage.read("c1").memory, usage.read("c1").cpu_seconds) == (3000, 1.5)
    fresh = CgroupUsage(tmp_path, tmp_path / "proc")
    assert fresh.guess("c1")
    assert fresh.read("c1").memory == 3000


@pytest.mark.parametrize("where", ["docker/c1", "system.slice/docker-c1.scope"])
def test_cgroup_files_version_2(tmp_path, where):
    group = tmp_path / where
    group.mkdir(parents=True)
    (group / "memory.current").write_text("5000\n")
    (group / "memory.stat").write_text("anon 1\ninactive_file 2000\n")
    (group / "cpu.stat").write_text("usage_usec 2500000\nuser_usec 1\n")
    usage = CgroupUsage(tmp_path, tmp_path / "proc")
    assert usage.guess("c1")
    assert (usage.read("c1").memory, usage.read("c1").cpu_seconds) == (3000, 2.5)
    usage.forget([])
    assert not usage.knows("c1")


def test_a_cgroup_that_went_away_is_forgotten(tmp_path):
    group = tmp_path / "docker/c1"
    group.mkdir(parents=True)
    (group / "memory.current").write_text("1\n")
    usage = CgroupUsage(tmp_path, tmp_path)
    assert usage.guess("c1")
    (group / "memory.current").unlink()
    assert usage.read("c1") is None
    assert not usage.knows("c1")


def test_the_engine_s_statistics():
    found = {
        "memory_stats": {"usage": 5000, "stats": {"inactive_file": 1000}},
        "cpu_stats": {"cpu_usage": {"total_usage": 2_000_000_000}},
    }
    assert (from_statistics(found).memory, from_statistics(found).cpu_seconds) == (4000, 2.0)
    assert from_statistics({"memory_stats": {}}) is None


# -- isolation

EVERYTHING = frozenset(Capability)


def app(on=Network.NONE, limits=None, **options):
    made = DockerAppOptions(**{"image": "x", **options})
    return App(name="web", provider="docker", options=made, network=on, limits=limits or Limits())


def refuse(made, context, capabilities=EVERYTHING, url="unix:///var/run/docker.sock"):
    explain.refuse(made, Engine(DockerOptions(url=url), context.run_dir), context, capabilities)


@pytest.mark.parametrize(
    "source", ["/", "/run", "/var/run", "/var/run/docker.sock", "/run/docker.sock", "/run/containerd"]
)
def test_no_mount_reaches_the_engine(context, source):
    with pytest.raises(ConfigError, match=r"apps\.web\.docker\.mounts\.0\.source"):
        refuse(app(mounts=[Mount(source=source, target="/x")]), context)


def test_no_link_reaches_the_engine_either(context, tmp_path):
    (tmp_path / "link").symlink_to("/run")
    with pytest.raises(ConfigError, match="reaches the socket"):
        refuse(app(mounts=[Mount(source=str(tmp_path / "link"), target="/x")]), context)


def test_no_mount_reaches_an_engine_elsewhere(context, tmp_path):
    with pytest.raises(ConfigError, match="reaches the socket"):
        refuse(
            app(mounts=[Mount(source=str(tmp_path), target="/x")]), context, url=f"unix://{tmp_path}/engine.sock"
        )


def test_no_mount_reaches_the_manager(context):
    for source in (context.state_dir, context.run_dir / "below", context.state_dir.parent):
        with pytest.raises(ConfigError, match="manager's own"):
            refuse(app(mounts=[Mount(source=str(source), target="/x")]), context)


def test_other_mounts_are_the_operator_s_business(context, tmp_path):
    (tmp_path / "shared").mkdir()
    refuse(app(mounts=[Mount(source=str(tmp_path / "shared"), target="/x")]), context)


@pytest.mark.parametrize(
    ("made", "words"),
    [
        (app(port=80), 'only be published with network = "private"'),
        (app(on=Network.HOST, port=80), 'only be published with network = "private"'),
        (app(seccomp="/nowhere"), "docker.seccomp"),
        (app(network="team"), "docker.network"),
    ],
)
def test_what_does_not_go_together_is_refused(context, made, words):
    with pytest.raises(ConfigError) as caught:
        refuse(made, context)
    assert words in str(caught.value)


def test_a_remote_engine_needs_a_port(context):
    with pytest.raises(ConfigError, match="cannot be shared"):
        refuse(app(on=Network.PRIVATE), context, url="tcp://10.0.0.1:2376")


@pytest.mark.parametrize(
    ("limits", "key"), [(Limits(disk=1), "disk"), (Limits(memory=1), "memory"), (Limits(cpus=1), "cpus")]
)
def test_limits_that_cannot_be_kept_are_refused(context, limits, key):
    with pytest.raises(Unsupported, match=f"limit {key}"):
        refuse(app(limits=limits), context, frozenset({Capability.NETWORK_NONE}))


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"user": "root"}, "runs as root"),
        ({"read_only": False}, "change the image's files"),
        ({"cap_add": ["SYS_ADMIN"]}, "the capability SYS_ADMIN"),
        ({"no_new_privileges": False}, "setuid"),
        ({"seccomp": "unconfined"}, "no seccomp profile"),
        ({"apparmor": "mine"}, "AppArmor profile is mine"),
        ({"devices": ["/dev/fuse"]}, "device /dev/fuse"),
        ({"gpus": "all"}, "GPUs (all)"),
        ({"mounts": [Mount(source="/srv/x", target="/x", read_only=False)]}, "changes /srv/x"),
        ({"network": "team"}, "shares the network team"),
        ({"port": 80}, "every local user can connect"),
    ],
)
def test_each_loosening_is_explained(context, options, words):
    made = app(on=Network.PRIVATE, **options)
    found = list(explain.explain_app(made, Engine(DockerOptions(url="unix:///x"), context.run_dir), context))
    assert [one for one in found if words in one.what and one.level is Level.WARNING and one.fix]


def test_a_safe_app_has_no_warning(context):
    made = app(limits=Limits(memory=1 << 28, pids=100))
    found = list(explain.explain_app(made, Engine(DockerOptions(url="unix:///x"), context.run_dir), context))
    assert {one.level for one in found} == {Level.INFO}
