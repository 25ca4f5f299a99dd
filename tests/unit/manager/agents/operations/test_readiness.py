"""Ready means that the app answered through its endpoint, and only the agent's own endpoint will do."""

import contextlib
import os
import socket
import stat
import threading
import time

import pytest

from dispatcher.plugin.deadline import Deadline
from dispatcher.plugin.errors import Cancelled, InsecureEndpoint, StartFailed, Unavailable
from dispatcher.manager.storage.rows import Kind
from dispatcher.manager.agents.operations.readiness import Probe, await_ready, refuses
from dispatcher.manager.agents.agent import Operation
from dispatcher.plugin.model import BackendState, Endpoint, Handle, Observation

OK = b"HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n"
HANDLE = Handle(provider="fake", agent="alice", name="x")


@pytest.fixture
def serve(tmp_path):
    """Start servers that answer every request with some bytes; return their endpoint."""
    sockets = []

    def start(answer, kind="tcp", mode=0o600):
        if kind == "tcp":
            listener = socket.create_server(("127.0.0.1", 0))
            endpoint = Endpoint.tcp("127.0.0.1", listener.getsockname()[1])
        else:
            listener = socket.socket(socket.AF_UNIX)
            path = tmp_path / f"s{len(sockets)}"
            listener.bind(str(path))
            path.chmod(mode)
            listener.listen()
            endpoint = Endpoint.unix(path)
        sockets.append(listener)

        def run():
            while True:
                try:
                    connection, _ = listener.accept()
                except OSError:
                    return
                with connection, contextlib.suppress(OSError):
                    connection.settimeout(5)
                    requests.append(connection.recv(4096))
                    answer(connection) if callable(answer) else connection.sendall(answer)

        threading.Thread(target=run, daemon=True).start()
        return endpoint

    requests = start.requests = []
    yield start
    for listener in sockets:
        try:
            listener.shutdown(socket.SHUT_RDWR)
        except OSError:
            pass
        listener.close()


def probe(endpoint, path="/", gid=None, seconds=2, owner=None, directory=None):
    directory = os.path.dirname(endpoint.path) if directory is None else directory
    return Probe(path, gid, directory, os.geteuid())(endpoint, owner, Deadline(seconds), lambda: None)


@pytest.mark.parametrize(
    ("answer", "reason"),
    [
        (OK, ""),
        (b"HTTP/1.0 302 Found\r\n\r\n", ""),
        (b"HTTP/1.1 404 Not Found\r\n\r\n", ""),
        (b"HTTP/1.1 499\r\n\r\n", ""),
        (b"HTTP/1.1 500 Oops\r\n\r\n", "it responds with status 500"),
        (b"HTTP/1.1 503 Later\r\n\r\n", "it responds with status 503"),
        (b"SSH-2.0-OpenSSH_9.2\r\n", "invalid HTTP response"),
        (b"HTTP/2.0 200 OK\r\n", "invalid HTTP response"),
        (b"", "it closes the connection without a response"),
        (b"HTTP/1", "it closes the connection without a response"),
    ],
)
def test_what_counts_as_ready(serve, answer, reason):
    assert probe(serve(answer)).startswith(reason)
    assert bool(probe(serve(answer))) == bool(reason)


def test_the_request_is_as_configured(serve):
    probe(serve(OK), path="/healthz?x=1")
    assert serve.requests[0].startswith(b"GET /healthz?x=1 HTTP/1.1\r\nHost: localhost\r\n")


def test_an_answer_in_pieces_counts(serve):
    def slowly(connection):
        for byte in OK[:20]:
            connection.sendall(bytes([byte]))
            time.sleep(0.002)

    assert probe(serve(slowly)) == ""


def test_nobody_there(tmp_path):
    assert probe(Endpoint.unix(tmp_path / "nothing")) == "it does not listen yet"
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
    assert probe(Endpoint.tcp("127.0.0.1", port)) == "it refuses connections"
    assert refuses(Endpoint.tcp("127.0.0.1", port), None)
    assert refuses(Endpoint.unix(tmp_path / "nothing"), None)


def test_one_that_accepts_and_is_silent_is_not_ready_but_does_not_refuse(serve):
    endpoint = serve(lambda connection: time.sleep(2))
    before = time.monotonic()
    assert probe(endpoint, seconds=0.3) == "it does not respond"
    assert time.monotonic() - before < 1
    assert not refuses(endpoint, None)


def test_a_wait_for_an_answer_can_be_cancelled(serve):
    def cancelled():
        raise Cancelled("enough")

    before = time.monotonic()
    with pytest.raises(Cancelled):
        Probe("/", None, "/", 0)(serve(lambda connection: time.sleep(2)), None, Deadline(30), cancelled)
    assert time.monotonic() - before < 1


@pytest.mark.root
def test_a_private_socket_is_opened_to_the_proxy_and_to_nobody_else(serve):
    endpoint = serve(OK, "unix", mode=0o600)
    assert probe(endpoint, gid=300_000, owner=0) == ""
    found = os.stat(endpoint.path)
    assert (found.st_gid, stat.S_IMODE(found.st_mode)) == (300_000, 0o660)
    os.chmod(endpoint.path, 0o777)
    probe(endpoint, gid=300_000, owner=0)
    assert stat.S_IMODE(os.stat(endpoint.path).st_mode) == 0o660


def test_an_ordinary_user_s_socket_stays_as_it_is(serve):
    endpoint = serve(OK, "unix", mode=0o600)
    assert probe(endpoint, gid=None, owner=os.geteuid()) == ""
    assert stat.S_IMODE(os.stat(endpoint.path).st_mode) == 0o600


@pytest.mark.root
@pytest.mark.parametrize("where", ["outside", "another's"])
def test_a_socket_that_is_not_the_agents_own_is_left_as_it_is(serve, tmp_path, where):
    """A provider may name any socket: one elsewhere, or one that another user has put into the directory."""
    endpoint = serve(OK, "unix", mode=0o600)
    os.chown(endpoint.path, 12345 if where == "another's" else 0, 0)
    directory = str(tmp_path / "agent") if where == "outside" else None
    assert probe(endpoint, gid=300_000, owner=None, directory=directory) == ""
    found = os.stat(endpoint.path)
    assert (found.st_gid, stat.S_IMODE(found.st_mode)) == (0, 0o600)


@pytest.mark.parametrize("gid", [None, pytest.param(300_000, marks=pytest.mark.root)])
def test_a_link_another_s_socket_and_a_file_are_refused(serve, tmp_path, gid):
    good = serve(OK, "unix")
    before = os.stat(good.path)
    link = tmp_path / "link"
    link.symlink_to(good.path)
    with pytest.raises((InsecureEndpoint, OSError)):
        assert probe(Endpoint.unix(link), gid=gid, owner=os.geteuid()) == ""
        raise InsecureEndpoint("refused")
    file = tmp_path / "file"
    file.write_text("x")
    file.chmod(0o600)
    with pytest.raises(InsecureEndpoint):
        probe(Endpoint.unix(file), gid=gid, owner=os.geteuid())
    with pytest.raises(InsecureEndpoint):
        probe(good, gid=gid, owner=12345)
    assert refuses(good, 12345)
    after = os.stat(good.path)
    assert (before.st_mode, before.st_gid) == (after.st_mode, after.st_gid)
    assert stat.S_IMODE(file.stat().st_mode) == 0o600
    assert serve.requests == []


# --- waiting


class ContainedProvider:
    """Observations in turn; the last one stays."""

    def __init__(self, *seen):
        self.seen = list(seen)
        self.asked = 0
        self.found = []

    def listeners(self, _handle, *, deadline):
        if isinstance(self.found, Exception):
            raise self.found
        return self.found

    def observe(self, _handle, *, deadline):
        self.asked += 1
        found = self.seen.pop(0) if len(self.seen) > 1 else self.seen[0]
        if isinstance(found, Exception):
            raise found
        return found


def wait(provider, seconds=2, operation=None, seen=None, report=None):
    operation = operation or Operation(Kind.START, 0.0)
    return await_ready(
        provider,
        HANDLE,
        Probe("/", None, "/", 0),
        operation=operation,
        deadline=Deadline(seconds),
        seen=seen,
        report=report,
    )


def running(endpoint=None, **more):
    return Observation(state=BackendState.RUNNING, endpoint=endpoint, **more)


def test_ready_at_once_costs_one_question(serve):
    provider = ContainedProvider(running(serve(OK)))
    assert wait(provider).state is BackendState.RUNNING
    assert provider.asked == 1


def test_an_address_that_is_not_known_yet_is_waited_for(serve):
    provider = ContainedProvider(running(), running(), running(serve(OK)))
    assert wait(provider).endpoint
    assert provider.asked == 3


def test_what_the_backend_says_meanwhile_is_told(serve):
    booting = [Observation(state=BackendState.STARTING, detail=detail) for detail in ("disks", "network")]
    told = []
    wait(
        ContainedProvider(*booting, running(serve(OK))), report=lambda seen: told.append((seen.state, seen.detail))
    )
    assert list(dict.fromkeys(told)) == [
        (BackendState.STARTING, "disks"),
        (BackendState.STARTING, "network"),
        (BackendState.RUNNING, ""),
    ]


def test_a_backend_that_is_away_for_a_moment_is_waited_for(serve):
    assert wait(ContainedProvider(Unavailable("away"), running(serve(OK)))).endpoint


def test_an_app_that_ended_is_not_waited_for(tmp_path):
    provider = ContainedProvider(
        running(Endpoint.unix(tmp_path / "no")), Observation(state=BackendState.STOPPED, exit_reason="exit code 3")
    )
    operation = Operation(Kind.START, 0.0)
    operation.observe_again = True
    before = time.monotonic()
    with pytest.raises(StartFailed, match="ended before") as caught:
        wait(provider, 30, operation)
    assert caught.value.why == "exit code 3"
    assert time.monotonic() - before < 3


def test_the_backend_s_report_makes_it_look_at_once(tmp_path):
    provider = ContainedProvider(running(Endpoint.unix(tmp_path / "no")), Observation(state=BackendState.ABSENT))
    operation = Operation(Kind.START, 0.0)
    threading.Timer(0.1, lambda: setattr(operation, "observe_again", True)).start()
    before = time.monotonic()
    with pytest.raises(StartFailed):
        wait(provider, 30, operation)
    assert time.monotonic() - before < 0.9


@pytest.mark.parametrize(
    ("endpoint", "listeners", "why", "fix"),
    [
        (
            "unix",
            ["tcp:127.0.0.1:8888"],
            "it does not listen yet; it listens at tcp:127.0.0.1:8888 instead",
            "{socket}",
        ),
        (
            "tcp",
            ["tcp:127.0.0.1:80"],
            "it refuses connections; it listens at tcp:127.0.0.1:80 instead",
            "at 0.0.0.0",
        ),
        (
            "tcp",
            ["tcp:0.0.0.0:81"],
            "it refuses connections; it listens at tcp:0.0.0.0:81 instead",
            "on the port that {port} stands for",
        ),
        ("unix", [], "it does not listen yet", "read its last lines"),
        ("unix", Unavailable("away"), "it does not listen yet", "read its last lines"),
    ],
)
def test_an_app_that_listens_elsewhere_is_told_where_and_what_to_change(tmp_path, endpoint, listeners, why, fix):
    expected = Endpoint.unix(tmp_path / "no") if endpoint == "unix" else Endpoint.tcp("127.0.0.1", 1)
    provider = ContainedProvider(running(expected))
    provider.found = listeners
    with pytest.raises(StartFailed) as caught:
        wait(provider, 0.1)
    assert caught.value.why == why
    assert fix in caught.value.fix


def test_an_app_that_answers_with_an_error_is_not_told_to_listen_elsewhere(serve):
    provider = ContainedProvider(running(serve(b"HTTP/1.1 503 Later\r\n\r\n")))
    provider.found = ["tcp:127.0.0.1:8888"]
    with pytest.raises(StartFailed) as caught:
        wait(provider, 0.2)
    assert caught.value.why == "it responds with status 503"
    assert "last lines" in caught.value.fix


def test_too_late_has_the_last_reason(serve, tmp_path):
    with pytest.raises(StartFailed, match="in time") as caught:
        wait(ContainedProvider(running(serve(b"HTTP/1.1 503 Later\r\n\r\n"))), 0.2)
    assert caught.value.why == "it responds with status 503"
    with pytest.raises(StartFailed) as caught:
        wait(ContainedProvider(running(Endpoint.unix(tmp_path / "no"))), 0.1)
    assert caught.value.why == "it does not listen yet"
    with pytest.raises(StartFailed) as caught:
        wait(ContainedProvider(running(detail="the guest has no lease")), 0.2)
    assert caught.value.why == "the guest has no lease"


def test_a_wait_is_cancelled_at_once(tmp_path):
    operation = Operation(Kind.START, 0.0)
    threading.Timer(0.05, operation.cancel).start()
    before = time.monotonic()
    with pytest.raises(Cancelled):
        wait(ContainedProvider(running(Endpoint.unix(tmp_path / "no"))), 30, operation)
    assert time.monotonic() - before < 0.5


def test_waiting_adds_little_to_a_start(tmp_path):
    """An app that listens after 60 ms is found ready soon after: trying gets rarer, in proportion to the time."""
    path = tmp_path / "late"
    opened = []

    def open_up():
        time.sleep(0.06)
        listener = socket.socket(socket.AF_UNIX)
        listener.bind(str(path))
        listener.listen()
        opened.append(time.monotonic())
        connection, _ = listener.accept()
        connection.recv(4096)
        connection.sendall(OK)
        connection.close()
        listener.close()

    app = threading.Thread(target=open_up)
    app.start()
    wait(ContainedProvider(running(Endpoint.unix(path))), 5)
    late = time.monotonic() - opened[0]
    app.join()
    assert late < 0.1
