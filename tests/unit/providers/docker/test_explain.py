"""Options that are refused, and findings about isolation."""

import logging
import os
import pytest
from dispatcher.plugin.errors import ConfigError, Unsupported
from dispatcher.plugin.model import App, Capability, Level, Limits, Network
from dispatcher.plugin.provider import ProviderContext
from dispatcher_docker import explain
from dispatcher_docker.engine import Engine
from dispatcher_docker.options import DockerAppOptions, DockerOptions, Mount


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
        refuse(app(limits=limits), context, frozenset({Capability.NETWORK_NONE, Capability.OWN_DATA}))


def test_data_on_this_host_is_limited_by_the_core(context):
    refuse(app(limits=Limits(disk=1)), context, frozenset({Capability.NETWORK_NONE}))
    made = app(limits=Limits(disk=1), seccomp="unconfined")
    found = list(explain.explain_app(made, Engine(DockerOptions(url="unix:///x"), context.run_dir)))
    assert any("can leave the quota" in one.what and one.level is Level.WARNING for one in found)
    elsewhere = Engine(DockerOptions(url="tcp://10.0.0.1:2376"), context.run_dir)
    found = list(explain.explain_app(made, elsewhere))
    assert any("disk limit" in one.what and one.level is Level.ERROR for one in found)


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
    found = list(explain.explain_app(made, Engine(DockerOptions(url="unix:///x"), context.run_dir)))
    assert [one for one in found if words in one.what and one.level is Level.WARNING and one.fix]


def test_a_safe_app_has_no_warning(context):
    made = app(limits=Limits(memory=1 << 28, pids=100))
    found = list(explain.explain_app(made, Engine(DockerOptions(url="unix:///x"), context.run_dir)))
    assert {one.level for one in found} == {Level.INFO}


@pytest.mark.parametrize("bounds", [False, True])
def test_connections_without_a_bound_are_a_warning(context, bounds):
    options = DockerOptions()
    engine = Engine(options, context.run_dir)
    found = explain.explain_backend(
        engine, options, None, own_volume=False, protects_host=True, bounds_connections=bounds
    )
    told = [one for one in found if one.level is Level.WARNING and "tracked connections" in one.what]
    assert bool(told) is not bounds


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"command": ["x", "{port}"]}, "{port} has no value without a port; set port, or write {socket}"),
        (
            {"command": ["x", "{socket}"], "port": 80},
            "{socket} has no value with a port; remove port, or write {port}",
        ),
        ({"entrypoint": ["x", "{port}"], "command": ["{socket}"]}, "{port} has no value without a port"),
    ],
)
def test_each_placeholder_of_a_command_has_a_value(context, options, told):
    made = app(on=Network.PRIVATE, **options)
    found = list(explain.faults(made, Engine(DockerOptions(), context.run_dir), context))
    assert [one for one in found if one.startswith(f"apps.web.docker.port: {told}")] == found != []
