"""Images pulled from a registry with a password, built from a directory, pinned, missing, slow, cancelled, changed."""

import base64
import json
import threading
import time

import pytest

from dispatcher.plugin.errors import Cancelled, DeadlineExceeded, ProviderError
from dispatcher.testing.driver import Steps, cancel
from dispatcher.testing.kit import eventually
from tests.support.docker_registry import Registry
from tests.support.docker_tools import PROBE, DockerWorld, docker, forget_images, images

pytestmark = [pytest.mark.docker, pytest.mark.root]
COMMAND = {"command": ["/bin/sleep", "1000"]}


@pytest.fixture(scope="module")
def registry():
    images()
    registry = Registry("reader:letmein")
    yield registry
    registry.close()
    forget_images(registry.host)


@pytest.fixture(scope="module")
def world(registry, tmp_path_factory):
    password = tmp_path_factory.mktemp("password") / "file"
    password.write_text("letmein\n")
    world = DockerWorld(registries={registry.host: {"username": "reader", "password_file": str(password)}})
    yield world
    world.close()
    forget_images(f"dispatcher-{world.installation}/")
    docker("image", "prune", "-f", "--filter", f"label=dispatcher.installation={world.installation}")


@pytest.fixture
def image(registry):
    """A name in the registry that the engine does not have yet."""
    name = f"team/app{time.monotonic_ns()}:1"
    registry.push("dispatcher-test/busybox", name)
    yield f"{registry.host}/{name}"
    registry.seconds = 0.0


@pytest.fixture(autouse=True)
def clean(world):
    yield
    world.end_check()


def fresh_layer(registry, name):
    """Put an image with a layer that no engine has seen; return its reference."""
    import io
    import os
    import tarfile

    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as tar:
        entry = tarfile.TarInfo("random")
        entry.size = 300_000
        tar.addfile(entry, io.BytesIO(os.urandom(entry.size)))
    layer = buffer.getvalue()
    import hashlib

    config = {
        "architecture": "amd64",
        "os": "linux",
        "config": {},
        "rootfs": {"type": "layers", "diff_ids": ["sha256:" + hashlib.sha256(layer).hexdigest()]},
    }
    registry.put(json.dumps(config).encode(), [layer], name)
    return f"{registry.host}/{name}"


def test_a_private_registry_with_progress_by_layer(world, registry):
    reference = fresh_layer(registry, "team/progress:1")
    registry.seconds = 1.5
    spec = world.make("puller", options={"image": reference, **COMMAND})
    told = []
    try:
        world.driver.prepare(
            spec.app, progress=lambda step, detail="", fraction=None: told.append((step, detail, fraction))
        )
    finally:
        registry.seconds = 0.0
    layers = [(detail, fraction) for step, detail, fraction in told if "layers" in detail]
    assert layers, told
    fractions = [fraction for _, fraction in layers if fraction is not None]
    assert fractions[-1] == 1.0
    assert any(0 < one < 1 for one in fractions), "a pull that takes a while tells how far it is"
    world.driver.prepare(spec.app, seconds=2)


def test_the_password_can_come_from_docker_s_own_configuration(registry, image, monkeypatch, tmp_path):
    auth = base64.b64encode(b"reader:letmein").decode()
    (tmp_path / "config.json").write_text(json.dumps({"auths": {registry.host: {"auth": auth}}}))
    monkeypatch.setenv("DOCKER_CONFIG", str(tmp_path))
    world = DockerWorld()
    try:
        world.driver.prepare(world.make("config", options={"image": image, **COMMAND}).app)
    finally:
        world.close()


def test_a_wrong_password_says_where_to_set_it(registry, image, tmp_path, monkeypatch):
    monkeypatch.setenv("DOCKER_CONFIG", str(tmp_path))
    (tmp_path / "wrong").write_text("no")
    world = DockerWorld(
        registries={registry.host: {"username": "reader", "password_file": str(tmp_path / "wrong")}}
    )
    try:
        spec = world.make("denied", options={"image": image, **COMMAND})
        with pytest.raises(ProviderError) as caught:
            world.driver.prepare(spec.app)
        assert f'providers.docker.registries."{registry.host}"' in str(caught.value)
        assert "letmein" not in str(caught.value)
    finally:
        world.close()


@pytest.mark.parametrize("policy", ["missing", "always"])
def test_an_image_that_is_nowhere(world, registry, policy):
    reference = f"{registry.host}/team/nowhere:1"
    spec = world.make("nowhere", options={"image": reference, "pull": policy, **COMMAND})
    for call in (lambda: world.driver.prepare(spec.app), lambda: world.driver.ensure(spec)):
        with pytest.raises(ProviderError, match="There is no image") as caught:
            call()
        assert "apps.kit.docker.image" in caught.value.fix


def test_a_registry_that_is_not_there(world):
    spec = world.make("unreachable", options={"image": "127.0.0.1:9/x:1", **COMMAND})
    began = time.monotonic()
    with pytest.raises(ProviderError):
        world.driver.prepare(spec.app)
    assert time.monotonic() - began < 15


def test_never_means_never(world, registry, image):
    spec = world.make("never", options={"image": image, "pull": "never", **COMMAND})
    before = len(registry.requests)
    with pytest.raises(ProviderError, match='pull = "never"'):
        world.driver.ensure(spec)
    assert len(registry.requests) == before


def test_a_digest_pins(world, registry):
    digest = registry.push("dispatcher-test/busybox", "team/pinned:1")
    reference = f"{registry.host}/team/pinned@{digest}"
    spec = world.make("pinned", options={"image": reference, **COMMAND})
    world.driver.prepare(spec.app)
    handle = world.driver.ensure(spec)
    world.fresh(handle)
    labels = json.loads(docker("inspect", "--format", "{{json .Config.Labels}}", handle.name))
    assert labels["dispatcher.image"] == reference
    assert labels["dispatcher.image-id"].startswith("sha256:")


def test_always_notices_a_new_image_and_restart_renews(world, registry, image):
    name = image.removeprefix(f"{registry.host}/")
    options = {"image": image, "pull": "always", **COMMAND}
    spec = world.make("fresh", options=options)
    world.driver.prepare(spec.app)
    handle = world.driver.ensure(spec)
    world.fresh(handle)
    (spec.data_dir / "kept").write_text("kept\n")
    assert world.observe(handle).spec_hash == spec.hash
    fresh_layer(registry, "unused:1")
    registry.push("dispatcher-test/probe", name)
    world.driver.prepare(spec.app)
    seen = world.observe(handle)
    assert seen.spec_hash != spec.hash, "the running agent is outdated now"
    assert "has changed" in seen.detail
    assert world.driver.list()["fresh"][1].spec_hash != spec.hash
    assert world.driver.ensure(spec) == handle, "it is left alone until it is restarted"
    before = docker("inspect", "--format", "{{.Image}}", handle.name)
    world.driver.stop(handle, grace=0.1)
    world.driver.ensure(spec)
    assert docker("inspect", "--format", "{{.Image}}", handle.name) != before
    assert world.observe(handle).spec_hash == spec.hash
    assert (spec.data_dir / "kept").read_text() == "kept\n"


def test_a_fresh_manager_notices_the_new_image_too(world, registry, image):
    spec = world.make("noticed", options={"image": image, **COMMAND})
    handle = world.driver.ensure(spec)
    world.fresh(handle)
    registry.push("dispatcher-test/probe", image.removeprefix(f"{registry.host}/"))
    docker("login", "-u", "reader", "-p", "letmein", registry.host)
    try:
        docker("pull", "-q", image)
    finally:
        docker("logout", registry.host)
    other = world.another()
    try:
        assert other.list()["noticed"][1].spec_hash != spec.hash
    finally:
        other.provider.close()


def test_a_slow_pull_delays_no_other_app_and_can_be_cancelled(world, registry):
    reference = fresh_layer(registry, "team/slow:1")
    registry.seconds = 30
    spec = world.make("slow", options={"image": reference, **COMMAND})
    began, stop = threading.Event(), threading.Event()
    outcome = []

    def progress(step, detail="", fraction=None):
        began.set()
        if stop.is_set():
            cancel()

    def pull():
        try:
            world.driver.prepare(spec.app, progress=progress, seconds=60)
        except BaseException as error:
            outcome.append(error)

    thread = threading.Thread(target=pull)
    thread.start()
    try:
        assert began.wait(10)
        start = time.monotonic()
        agent = world.run("quick", options=PROBE)
        assert agent.inside.answers()
        assert time.monotonic() - start < 8
        stop.set()
        cancelled = time.monotonic()
        thread.join(10)
        assert not thread.is_alive()
        assert time.monotonic() - cancelled < 3, "a cancel is noticed within a second or two"
    finally:
        stop.set()
        registry.seconds = 0.0
        thread.join(60)
    assert isinstance(outcome[0], Cancelled)
    world.driver.prepare(spec.app)


def test_a_slow_pull_ends_at_its_deadline(world, registry):
    reference = fresh_layer(registry, "team/late:1")
    registry.seconds = 30
    try:
        with pytest.raises(DeadlineExceeded):
            world.driver.prepare(world.make("late", options={"image": reference, **COMMAND}).app, seconds=2)
    finally:
        registry.seconds = 0.0


def test_two_starts_of_one_image_pull_it_once(world, registry):
    reference = fresh_layer(registry, "team/shared:1")
    registry.seconds = 1
    app = world.make("shared", options={"image": reference, **COMMAND}).app
    registry.requests.clear()
    try:
        world.together([lambda: world.driver.prepare(app) for _ in range(4)])
    finally:
        registry.seconds = 0.0
    blobs = [one for one in registry.requests if "/blobs/" in one]
    assert len(blobs) == len(set(blobs))


# -- built here


@pytest.fixture
def context(tmp_path):
    (tmp_path / "Dockerfile").write_text(
        "FROM dispatcher-test/probe\nARG WORDS=none\nCOPY note /note\nRUN echo $WORDS > /words\n"
    )
    (tmp_path / "note").write_text("first\n")
    return tmp_path


def test_built_from_a_directory_and_again_only_when_it_changed(world, context):
    options = {"build": str(context), "build_args": {"WORDS": "hello"}, "command": PROBE["command"]}
    steps = Steps()
    spec = world.make("built", options=options)
    world.driver.prepare(spec.app, progress=steps)
    assert "building the image" in steps.reported
    agent = world.run("built", options=options)
    assert agent.inside.read("/note") == b"first\n"
    assert agent.inside.read("/words") == b"hello\n"
    steps = Steps()
    began = time.monotonic()
    world.driver.prepare(spec.app, progress=steps)
    assert "building the image" not in steps.reported
    assert time.monotonic() - began < 1
    (context / "note").write_text("second, longer\n")
    world.driver.prepare(spec.app)
    assert eventually(lambda: world.observe(agent).spec_hash != spec.hash, 2), "built anew: the agent is outdated"
    world.driver.stop(agent.handle)
    agent = world.run("built", options=options)
    assert agent.inside.read("/note") == b"second, longer\n"


def test_a_build_that_fails_says_where(world, context):
    (context / "Dockerfile").write_text("FROM dispatcher-test/busybox\nRUN echo about to fail && false\n")
    spec = world.make("unbuildable", options={"build": str(context)})
    with pytest.raises(ProviderError, match="could not be built") as caught:
        world.driver.prepare(spec.app)
    assert str(context / "Dockerfile") in caught.value.fix
    assert "about to fail" in json.dumps(caught.value.details)


def test_a_directory_without_a_dockerfile(world, tmp_path):
    spec = world.make("empty", options={"build": str(tmp_path)})
    with pytest.raises(ProviderError, match="there is no"):
        world.driver.prepare(spec.app)
