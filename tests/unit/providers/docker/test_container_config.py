"""From a spec to the engine's description of a container: safe by default, each loosening where it belongs."""

import json
from pathlib import Path

import pytest

from dispatcher.plugin.model import AgentSpec, App, Limits, Network
from dispatcher_docker import container_config
from dispatcher_docker.options import ROOT_CAPABILITIES, DockerAppOptions, DockerOptions, Mount


def spec(options=None, *, secrets=None, stdin=None, **app):
    return AgentSpec(
        installation="0123abcd",
        agent="alice",
        user="alice",
        app=App(
            name="web",
            provider="docker",
            options=options or DockerAppOptions(image="web:1", command=["run"]),
            **app,
        ),
        uid=300001,
        gid=300001,
        proxy_gid=300000,
        data_dir=Path("/state/alice/data"),
        run_dir=Path("/run/d/a/1"),
        log_dir=Path("/state/alice/log"),
        secrets=secrets or {},
        stdin=stdin,
    )


def body(made, *, backend=None, own_volume=False, secrets_dir=None, seccomp="", userns=False):
    settings = container_config.ContainerSettings(
        image_id="sha256:1",
        own_volume=own_volume,
        secrets_dir=secrets_dir,
        seccomp=seccomp,
        user=container_config.User(name="alice", shell="/bin/bash", directory=Path("/run/x/users/a")),
        host_user_namespace=userns,
        groups=[44],
    )
    return container_config.container(made, backend or DockerOptions(), settings)


def test_the_walls_stand_by_default():
    made = body(spec())
    host = made["HostConfig"]
    assert made["User"] == "300001:300001"
    assert (host["CapDrop"], host["CapAdd"], host["Privileged"]) == (["ALL"], [], False)
    assert host["SecurityOpt"] == ["no-new-privileges:true"]
    assert (host["ReadonlyRootfs"], host["NetworkMode"], host["IpcMode"]) == (True, "none", "private")
    assert (host["Devices"], host.get("DeviceRequests")) == ([], None)
    assert host["RestartPolicy"] == {"Name": "no"}
    assert made["Healthcheck"] == {"Test": ["NONE"]}
    assert {one["Target"] for one in host["Mounts"]} == {
        "/data",
        "/run/dispatcher",
        "/etc/passwd",
        "/etc/group",
    }
    assert all(one["ReadOnly"] for one in host["Mounts"] if one["Target"].startswith("/etc"))
    assert host["GroupAdd"] == ["44"]


def test_each_loosening_is_one_key():
    options = DockerAppOptions(
        image="x",
        user="root",
        read_only=False,
        cap_add=["NET_BIND_SERVICE"],
        no_new_privileges=False,
        seccomp="unconfined",
        apparmor="mine",
        devices=["/dev/fuse", "/dev/a:/dev/b:r"],
        gpus=2,
        mounts=[Mount(source="/srv/shared", target="/shared")],
    )
    made = body(spec(options), seccomp="unconfined")
    host = made["HostConfig"]
    assert made["User"] == "0:0"
    assert not host["ReadonlyRootfs"]
    assert host["CapAdd"] == sorted(["NET_BIND_SERVICE", *ROOT_CAPABILITIES])
    assert host["SecurityOpt"] == ["seccomp=unconfined", "apparmor=mine"]
    assert host["Devices"][0] == {
        "PathOnHost": "/dev/fuse",
        "PathInContainer": "/dev/fuse",
        "CgroupPermissions": "rwm",
    }
    assert host["Devices"][1] == {"PathOnHost": "/dev/a", "PathInContainer": "/dev/b", "CgroupPermissions": "r"}
    assert host["DeviceRequests"] == [{"Driver": "", "Count": 2, "Capabilities": [["gpu"]]}]
    shared = next(one for one in host["Mounts"] if one["Target"] == "/shared")
    assert (shared["Source"], shared["ReadOnly"]) == ("/srv/shared", True)


def test_limits_arrive():
    limits = Limits(memory=100 << 20, swap=50 << 20, cpus=1.5, pids=77)
    options = DockerAppOptions(image="x", shm=8 << 20, ulimits={"nofile": 512}, tmpfs={"/tmp": 1 << 20})
    host = body(spec(options, limits=limits))["HostConfig"]
    assert (host["Memory"], host["MemorySwap"]) == (100 << 20, 150 << 20)
    assert (host["NanoCpus"], host["PidsLimit"], host["ShmSize"]) == (1_500_000_000, 77, 8 << 20)
    assert host["Ulimits"] == [{"Name": "nofile", "Soft": 512, "Hard": 512}]
    assert "size=1048576" in host["Tmpfs"]["/tmp"]


def test_memory_without_a_limit_of_swap_leaves_swap_alone():
    assert body(spec(limits=Limits(memory=1 << 30)))["HostConfig"]["MemorySwap"] == -1


def test_placeholders_are_replaced_in_commands_and_environment_alone():
    options = DockerAppOptions(
        image="x", command=["run", "--at={socket}", "{data}/x", "{other}", "{port}"], port=80
    )
    made = body(spec(options, network=Network.PRIVATE, environment={"WHERE": "{data}", "JSON": '{"a": {}}'}))
    assert made["Cmd"] == ["run", "--at=/run/dispatcher/s", "/data/x", "{other}", "80"]
    assert "WHERE=/data" in made["Env"]
    assert 'JSON={"a": {}}' in made["Env"]


def test_an_app_cannot_pretend_to_be_somebody_else():
    user = container_config.User(name="alice")
    environment = container_config.environment(spec(environment={"DISPATCHER_USER": "bob", "HOME": "/x"}), user)
    assert environment["DISPATCHER_USER"] == "alice"


def test_an_operators_list_of_users_goes_before_ours():
    options = DockerAppOptions(image="x", mounts=[Mount(source="/srv/passwd", target="/etc/passwd")])
    mounts = body(spec(options))["HostConfig"]["Mounts"]
    assert [one["Source"] for one in mounts if one["Target"] == "/etc/passwd"] == ["/srv/passwd"]


def test_a_port_is_published_on_loopback_on_a_bridge_of_the_agent():
    made = body(spec(DockerAppOptions(image="x", port=8080), network=Network.PRIVATE))
    assert made["HostConfig"]["NetworkMode"] == spec().backend_name
    assert made["HostConfig"]["PortBindings"] == {"8080/tcp": [{"HostIp": "127.0.0.1", "HostPort": ""}]}
    assert "/run/dispatcher" not in {one["Target"] for one in made["HostConfig"]["Mounts"]}


def test_a_named_network_replaces_the_bridge():
    made = body(spec(DockerAppOptions(image="x", port=8080, network="team"), network=Network.PRIVATE))
    assert made["HostConfig"]["NetworkMode"] == "team"


def test_data_can_be_a_volume():
    mounts = body(spec(), own_volume=True)["HostConfig"]["Mounts"]
    data = next(one for one in mounts if one["Target"] == "/data")
    assert (data["Type"], data["Source"]) == ("volume", spec().backend_name + "-data")


def test_standard_input_is_open_only_for_credentials():
    assert not body(spec())["OpenStdin"]
    made = body(spec(stdin=b"x", credentials="stdin"))
    assert made["OpenStdin"] and made["StdinOnce"]


def test_nothing_secret_is_in_the_description():
    made = spec(secrets={"token": "s3cret-value"}, stdin=b"s3cret-input", credentials="stdin")
    text = json.dumps(body(made, secrets_dir=Path("/dev/shm/x")))
    assert "s3cret" not in text
    assert "DISPATCHER_SECRETS=/run/secrets" in text


def test_the_labels_are_enough_to_adopt():
    made = spec()
    labels = container_config.labels(made, "sha256:1")
    assert labels["dispatcher.installation"] == "0123abcd"
    assert labels["dispatcher.hash"] == made.hash
    assert labels["dispatcher.endpoint"] == f"unix:{made.socket}"
    assert labels["dispatcher.handle"] == container_config.handle_of(made).to_json()


@pytest.mark.parametrize("name", ["a b", 'a"b', "<x>", "ä" * 100])
def test_odd_agent_names_stay_data(name):
    from dataclasses import replace

    made = replace(spec(), agent=name)
    assert container_config.labels(made, "sha256:1")["dispatcher.agent"] == name
    assert container_config.handle_of(made).name.isascii()
