"""An engine that is killed, stopped, hung or far away; its events; engines over TLS.  Each has an engine of its own."""

import os
import signal
import socket
import subprocess
import time

import pytest

from dispatcher.plugin.errors import DeadlineExceeded, ProviderError, Unavailable
from dispatcher.plugin.model import BackendState, Limits
from dispatcher.testing.kit import eventually
from tests.support.docker_tools import DockerWorld, PrivateEngine, docker, images

pytestmark = [pytest.mark.docker, pytest.mark.root, pytest.mark.slow]


def engine_with(*options):
    images()
    engine = PrivateEngine(*options)
    engine.start()
    engine.load("dispatcher-test/probe")
    return engine


@pytest.fixture(scope="module")
def lasting():
    """An engine whose containers outlive it."""
    engine = engine_with("--live-restore")
    yield engine
    engine.close()


@pytest.fixture
def world(lasting):
    world = DockerWorld(lasting.url)
    yield world
    if lasting.process.poll() is not None:
        lasting.start()
    world.close()


class Heard(list):
    def __call__(self, name):
        self.append(name)


def test_killed_with_agents_up_that_live_on(lasting, world):
    alice, bob = world.run("alice"), world.run("bob")
    start = alice.inside.id()["start"]
    alice.inside.write("/data/note", b"mine\n")
    heard = Heard()
    watch = world.driver.watch(heard)
    time.sleep(0.3)
    lasting.kill()
    try:
        began = time.monotonic()
        for call in (
            lambda: world.observe(alice),
            world.driver.list,
            world.driver.check,
            lambda: world.driver.ensure(alice.spec),
            lambda: world.driver.stop(bob.handle),
            lambda: world.driver.suspend(bob.handle),
        ):
            with pytest.raises(Unavailable) as caught:
                call()
            assert caught.value.fix
        assert time.monotonic() - began < 10
        assert alice.inside.id()["start"] == start, "the app goes on being served meanwhile"
    finally:
        lasting.start()
    assert eventually(lambda: "" in heard, 10), "the gap is told"
    watch.close()
    assert world.observe(alice).state is BackendState.RUNNING
    world.driver.ensure(alice.spec)
    assert alice.inside.id()["start"] == start
    assert set(world.driver.list()) == {"alice", "bob"}


def test_killed_with_agents_up_that_die_with_it(world):
    """Without live-restore the engine ends what it finds: the truth is told, what should run runs again, data stays."""
    engine = engine_with()
    other = DockerWorld(engine.url)
    try:
        alice = other.run("alice")
        start = alice.inside.id()["start"]
        alice.inside.write("/data/note", b"mine\n")
        engine.kill()
        with pytest.raises(Unavailable):
            other.observe(alice)
        engine.start()
        assert eventually(lambda: other.observe(alice).state in {BackendState.STOPPED, BackendState.RUNNING}, 20)
        again = other.run("alice")
        assert again.inside.id()["start"] != start or other.observe(again).state is BackendState.RUNNING
        assert again.inside.read("/data/note") == b"mine\n"
    finally:
        other.close()
        engine.close()


def test_hung_is_unavailable_in_time(lasting, world):
    alice = world.run("alice")
    lasting.signal(signal.SIGSTOP)
    try:
        for call in (
            lambda: world.driver.observe(alice.handle, seconds=1),
            lambda: world.driver.list(seconds=1),
            lambda: world.driver.check(seconds=1),
            lambda: world.driver.stop(alice.handle, seconds=1),
        ):
            began = time.monotonic()
            with pytest.raises(DeadlineExceeded):
                call()
            assert time.monotonic() - began < 2.5
        assert alice.inside.answers(), "a hung engine does not stop its containers"
    finally:
        lasting.signal(signal.SIGCONT)
    assert eventually(lambda: world.observe(alice).state is BackendState.RUNNING, 10)


def test_other_providers_do_not_notice(lasting, world):
    """An instance for another engine works while this one hangs."""
    other = DockerWorld()
    lasting.signal(signal.SIGSTOP)
    try:
        agent = other.run("elsewhere")
        assert agent.inside.answers()
    finally:
        lasting.signal(signal.SIGCONT)
        other.close()


def test_killed_in_the_middle_of_a_start(lasting, world):
    spec = world.make("middle")
    calls = []

    def progress(step, detail="", fraction=None):
        calls.append(step)
        if step == "starting the container":
            lasting.kill()

    with pytest.raises((Unavailable, ProviderError)):
        world.driver.ensure(spec, progress=progress)
    assert "starting the container" in calls
    lasting.start()
    agent = world.run("middle")
    assert agent.inside.answers()
    assert list(world.driver.list()) == ["middle"]


@pytest.mark.parametrize(
    ("how", "reason"),
    [
        (lambda world, agent: docker("kill", agent.handle.name, host=world.host), "killed by signal 9"),
        (lambda world, agent: agent.inside.post("/exit", code=9), "exit code 9"),
        (lambda world, agent: grow(agent), "out of memory"),
    ],
    ids=["killed", "exited", "out of memory"],
)
def test_an_end_shows_within_a_second_with_its_reason(world, how, reason):
    agent = world.run("short-lived", limits=Limits(memory=48 << 20, swap=0))
    heard = Heard()
    watch = world.driver.watch(heard)
    time.sleep(0.3)
    how(world, agent)
    began = time.monotonic()
    assert eventually(lambda: agent.handle.name in heard, 2)
    assert eventually(lambda: world.observe(agent).exit_reason == reason, 1), world.observe(agent)
    assert time.monotonic() - began < 3, "a fraction of a second on a machine that has nothing else to do"
    watch.close()


def grow(agent):
    with pytest.raises(OSError):
        agent.inside.post("/memory", bytes=200 << 20)


# -- over the network


@pytest.fixture(scope="module")
def authority(tmp_path_factory):
    """A certificate authority with one server and one client, as openssl makes them."""
    here = tmp_path_factory.mktemp("tls")
    run = lambda *words: subprocess.run(["openssl", *words], cwd=here, check=True, capture_output=True)
    run(
        "req",
        "-x509",
        "-newkey",
        "rsa:2048",
        "-nodes",
        "-keyout",
        "ca-key.pem",
        "-out",
        "ca.pem",
        "-days",
        "2",
        "-subj",
        "/CN=test-ca",
        "-addext",
        "basicConstraints=critical,CA:TRUE",
        "-addext",
        "keyUsage=critical,keyCertSign,cRLSign",
    )
    for name, use in (("server", "serverAuth"), ("client", "clientAuth")):
        (here / f"{name}.ext").write_text(
            f"subjectAltName=IP:127.0.0.1,DNS:localhost\nextendedKeyUsage={use}\n"
            "authorityKeyIdentifier=keyid\nkeyUsage=critical,digitalSignature,keyEncipherment\nbasicConstraints=critical,CA:FALSE\n"
        )
        run(
            "req",
            "-newkey",
            "rsa:2048",
            "-nodes",
            "-keyout",
            f"{name}-key.pem",
            "-out",
            f"{name}.csr",
            "-subj",
            f"/CN={name}",
        )
        run(
            "x509",
            "-req",
            "-in",
            f"{name}.csr",
            "-CA",
            "ca.pem",
            "-CAkey",
            "ca-key.pem",
            "-CAcreateserial",
            "-days",
            "2",
            "-out",
            f"{name}.pem",
            "-extfile",
            f"{name}.ext",
        )
    (here / "cert.pem").symlink_to("client.pem")
    (here / "key.pem").symlink_to("client-key.pem")
    return here


@pytest.fixture(scope="module")
def far(authority):
    """An engine behind TLS that wants a client's certificate."""
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        port = sock.getsockname()[1]
    engine = engine_with(
        f"--host=tcp://127.0.0.1:{port}",
        "--tlsverify",
        f"--tlscacert={authority}/ca.pem",
        f"--tlscert={authority}/server.pem",
        f"--tlskey={authority}/server-key.pem",
    )
    engine.address = f"tcp://127.0.0.1:{port}"
    yield engine
    engine.close()


def tls(authority, **changes):
    files = {"tls_ca": "ca.pem", "tls_cert": "client.pem", "tls_key": "client-key.pem", **changes}
    return {key: str(authority / name) for key, name in files.items() if name}


def test_over_tls_with_a_client_s_certificate(far, authority):
    # `local` as the engine does run here: its containers' sockets can be reached.
    world = DockerWorld(far.address, local=True, **tls(authority))
    world.host = far.url
    try:
        world.driver.check()
        agent = world.run("alice")
        assert agent.inside.answers()
        heard = Heard()
        watch = world.driver.watch(heard)
        time.sleep(0.3)
        assert b"probe is ready" in world.driver.logs(agent.handle, follow=True, seconds=1)
        docker("kill", agent.handle.name, host=far.url)
        assert eventually(lambda: agent.handle.name in heard, 3)
        watch.close()
        credentials = world.run("carol", credentials="stdin", stdin=b"secret\n")
        assert eventually(lambda: credentials.inside.get("/stdin") == b"end\nsecret\n", 5)
    finally:
        world.close()


def test_over_tls_from_the_environment_as_docker_does(far, authority, monkeypatch):
    from dispatcher_docker.options import DockerOptions
    from dispatcher_docker.provider import DockerProvider

    monkeypatch.setenv("DOCKER_HOST", far.address)
    monkeypatch.setenv("DOCKER_TLS_VERIFY", "1")
    monkeypatch.setenv("DOCKER_CERT_PATH", str(authority))
    world = DockerWorld()
    try:
        provider = DockerProvider(context=world.context, options=DockerOptions())
        from dispatcher.plugin.deadline import Deadline

        provider.check(deadline=Deadline(10))
        assert [one.what for one in provider.explain(None) if far.address in one.what]
        provider.close()
    finally:
        world.close()


@pytest.mark.parametrize(
    ("changes", "url_host"),
    [
        ({"tls_cert": "", "tls_key": ""}, "127.0.0.1"),
        ({"tls_ca": "client.pem"}, "127.0.0.1"),
    ],
    ids=["no client certificate", "wrong authority"],
)
def test_bad_certificates_are_refused(far, authority, changes, url_host):
    world = DockerWorld()
    world.options = world.options.model_validate({"url": far.address, **tls(authority, **changes)})
    driver = world.another()
    try:
        with pytest.raises((Unavailable, ProviderError)) as caught:
            driver.check(seconds=5)
        assert "certificate" in str(caught.value).lower() or "tls" in str(caught.value).lower()
    finally:
        driver.provider.close()
        world.close()


def test_a_far_engine_is_used_by_port_with_volumes_and_statistics(far, authority):
    """Nothing of this host's files is used: data in volumes, usage from the engine, a port published there."""
    world = DockerWorld(far.address, publish="127.0.0.1", usage_cache="1s", **tls(authority))
    world.host = far.url
    try:
        provider = world.driver.provider
        from dispatcher.plugin.model import Capability

        assert Capability.OWN_DATA in provider.capabilities
        assert Capability.NETWORK_NONE not in provider.capabilities
        said = " ".join(one.what for one in provider.explain(None))
        assert "not encrypted" in said
        source = world.root / "source"
        source.mkdir()
        (source / "note").write_text("from here\n")
        source.chmod(0o755)
        spec = world.make("alice")
        for path in (source, source / "note"):
            os.chown(path, spec.uid, spec.gid)
        handle = world.driver.handle(spec)
        world.fresh(handle)
        world.driver.import_data(handle, source)
        assert docker("volume", "ls", "-q", host=far.url) == f"{handle.name}-data"
        target = world.root / "target"
        target.mkdir()
        world.driver.export_data(handle, target)
        assert (target / "note").read_text() == "from here\n"
        assert (target / "note").stat().st_uid == spec.uid
    finally:
        world.close()


def test_what_a_far_engine_cannot_do_is_refused_with_the_reason(far, authority):
    from dispatcher.plugin.errors import ConfigError, Unsupported
    from dispatcher.plugin.model import Network
    from tests.support.docker_tools import PORTED

    world = DockerWorld(far.address, data="bind", **tls(authority))
    world.host = far.url
    try:
        with pytest.raises(ConfigError, match="cannot be bind"):
            world.driver.check()
        world.options = world.options.model_copy(update={"data": "volume"})
        driver = world.another()
        spec = world.make("secretive", options=PORTED, network=Network.PRIVATE, values={"token": "x"})
        with pytest.raises(Unsupported, match="secrets"):
            driver.ensure(spec)
        with pytest.raises(ConfigError, match="cannot be shared with an engine on another host"):
            driver.ensure(world.make("socketed"))
        driver.provider.close()
    finally:
        world.close()
