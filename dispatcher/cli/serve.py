"""Manager and proxy as two child processes of one program, for `serve` and `demo`.

A child that dies is reported and started again, a limited number of times; a child that does not become ready ends
the program.  SIGTERM and SIGINT end both, the proxy first, so that it can drain.
"""

from __future__ import annotations

import fcntl
import os
import select
import signal
import struct
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import urlsplit

import click

from dispatcher.cli.parent_death import ParentPipe
from dispatcher.client.trust import is_loopback
from dispatcher.common import humanize
from dispatcher.config.app_secrets import secret_variables
from dispatcher.config.default_paths import PROXY_LOCK
from dispatcher.config.layout import Paths
from dispatcher.plugin.endpoints import connect
from dispatcher.plugin.errors import Conflict, DispatcherError, InsecureEndpoint, ManagerUnreachable, Unavailable
from dispatcher.plugin.model import Endpoint

if TYPE_CHECKING:
    from dispatcher.client.manager_client import ManagerClient
    from dispatcher.config.load import Config, ProxyConfig

STARTUP = 120.0  # seconds until a child must be ready
GRACE = 20.0  # seconds beyond proxy.drain_timeout until a child that should end is killed
RESTARTS = 5  # within WINDOW, then the program gives up
WINDOW = 60.0  # seconds
PROBE = 1.0  # seconds for a request of the sign-in page
_PROXY_LOCAL = b"\x20\0\0\0"  # PROXY protocol, version 2: LOCAL, a connection without an address
_FLOCK = struct.Struct("hhqqi")  # struct flock: kind, whence, start, length, process
_ENDED = frozenset({"stopped", "hibernated", "failed"})  # states of agents without a process
_FORWARDED = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
#: `-m dispatcher`, but nothing is imported from the working directory, which may be another user's.
_RUN_MODULE = """\
import sys
sys.path.remove("")
import runpy
runpy.run_module("dispatcher", run_name="__main__", alter_sys=True)
"""
_PROGRAM = ["-P", "-m", "dispatcher"] if sys.version_info >= (3, 11) else ["-c", _RUN_MODULE]


class Ended(Unavailable):
    """A child ended before it was ready; `child_code` is its exit code."""

    code = "child-ended"

    def __init__(self, what: str, child_code: int) -> None:
        super().__init__(what, fix="see its messages above")
        self.child_code = child_code


class Daemons:
    """The two daemons as child processes.

    :param arguments: the program's global options for both.
    :param say: prints a message for people.
    """

    def __init__(self, config: Config, arguments: Sequence[str], say: Callable[[str], None]) -> None:
        self.config = config
        self.paths = Paths.of(config)
        self._arguments = list(arguments)
        self._say = say
        self._children: dict[str, subprocess.Popen[bytes]] = {}
        self._deaths: list[float] = []
        self._wake, self._woken = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
        self._pipes: dict[str, ParentPipe] = {}

    @property
    def url(self) -> str:
        """The address that people open."""
        return browser_url(self.config)

    def client(self) -> ManagerClient:
        """Return a client of the manager."""
        from dispatcher.client.manager_client import ManagerClient

        return ManagerClient(f"unix://{self.paths.manager_socket}")

    def live_agents(self) -> list[str]:
        """Return the names of the agents that outlive this program; empty where the manager does not answer."""
        client = self.client()
        try:
            return [agent["name"] for agent in client.agents()["agents"] if agent["state"] not in _ENDED]
        except DispatcherError:
            return []
        finally:
            client.close()

    def say_where(self) -> None:
        """Print the address that people open; on a remote host also how to reach it from here."""
        click.echo(f"Open {self.url}")
        if command := tunnel(self.url):
            click.echo(f"From your own computer, first: {command}")

    def run(self, ready: Callable[[], None], *, before_stop: Callable[[], None] = lambda: None) -> int:
        """Start both, call `ready` when users can sign in, and run until a signal.

        :param before_stop: called before both are ended, if they were ready.
        :returns: exit code: 0 after a signal.
        :raises Conflict: a manager of this installation is already running.
        """
        if self._manager_answers():
            raise Conflict(
                "A manager is already running",
                why=f"it answers at {self.paths.manager_socket}",
                fix="stop it first, or choose another manager.run_dir and manager.state_dir",
            )
        with self._signals() as received:
            try:
                for name in ("manager", "proxy"):
                    self._start(name)
                    if not self._until_ready(name, received):
                        return 0
                self._call_ready(ready)
                try:
                    return self._watch(received)
                finally:
                    before_stop()
            except Ended as error:
                self._say(str(error))
                return error.child_code
            finally:
                self._stop()

    def _call_ready(self, ready: Callable[[], None]) -> None:
        """Call `ready`; if it fails because a child has ended, report that instead."""
        try:
            ready()
        except ManagerUnreachable:
            for name in self._children:
                self._check_alive(name)
            raise

    def _check_alive(self, name: str) -> None:
        code = self._children[name].poll()
        if code is not None:
            raise Ended(f"The {name} {_ending(code)}", code if code > 0 else 1)

    def _watch(self, received: Callable[[float], list[int]]) -> int:
        while True:
            for number in received(1.0):
                if number in {signal.SIGTERM, signal.SIGINT}:
                    drain = humanize.duration(self.config.proxy.drain_timeout)
                    self._say(f"ending; requests in progress have {drain} at most")
                    return 0
                if number == signal.SIGHUP:
                    self._signal_all(signal.SIGHUP)
            for name, child in list(self._children.items()):
                if child.poll() is not None and not self._restart(name, child.returncode):
                    return 1

    def _restart(self, name: str, code: int) -> bool:
        """Start a child that died again; return False when it dies too often."""
        now = time.monotonic()
        self._deaths = [death for death in self._deaths if now - death < WINDOW] + [now]
        if len(self._deaths) > RESTARTS:
            self._say(f"the {name} {_ending(code)}; it ends too often, giving up")
            return False
        self._say(f"the {name} {_ending(code)}; starting it again (agents keep running)")
        time.sleep(min(0.2 * 2 ** (len(self._deaths) - 1), 5.0))
        self._start(name)
        return True

    def _start(self, name: str) -> None:
        # Own process groups: Ctrl-C reaches this program alone, which then ends them in order.
        command = [sys.executable, *_PROGRAM, *self._arguments, name]
        if name in self._pipes:
            self._pipes[name].close()
        pipe = self._pipes[name] = ParentPipe()
        hidden = secret_variables(self.config.apps.values()) if name == "proxy" else frozenset()
        self._children[name] = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            start_new_session=True,
            pass_fds=(pipe.descriptor,),
            env={key: value for key, value in pipe.environment().items() if key not in hidden},
        )

    def _until_ready(self, name: str, received: Callable[[float], list[int]]) -> bool:
        """Wait until a child is ready; return False when a signal ends the program."""
        answers = self._manager_answers if name == "manager" else self._proxy_answers
        until = time.monotonic() + STARTUP
        while not answers():
            if {signal.SIGTERM, signal.SIGINT} & set(received(0.05)):
                return False
            self._check_alive(name)
            if time.monotonic() > until:
                raise Ended(f"The {name} is not ready after {STARTUP:.0f} s", 1)
        return True

    def _manager_answers(self) -> bool:
        client = self.client()
        try:
            client.healthz()
        except ManagerUnreachable:
            return False
        except DispatcherError:
            return True  # it answers; the error shows elsewhere
        finally:
            client.close()
        return True

    def _proxy_answers(self) -> bool:
        # Another program may listen there: the proxy takes its lock once it has its listeners.
        found = proxy_process(self.paths.run_dir)
        if found is None or found[0] != self._children["proxy"].pid:
            return False
        endpoint = listen_endpoint(self.config.proxy.listen[0]) if self.config.proxy.listen else None
        return endpoint is None or sign_in_page_answers(endpoint, self.config.proxy, browser_url(self.config))

    def _signal_all(self, number: int) -> None:
        for child in self._children.values():
            if child.poll() is None:
                child.send_signal(number)

    def _stop(self) -> None:
        for name in ("proxy", "manager"):
            child = self._children.get(name)
            if child is None or child.poll() is not None:
                continue
            child.terminate()
            try:
                child.wait(GRACE + (self.config.proxy.drain_timeout if name == "proxy" else 0.0))
            except subprocess.TimeoutExpired:
                self._say(f"the {name} does not end in time; killing it")
                child.kill()
                child.wait()

    @contextmanager
    def _signals(self) -> Iterator[Callable[[float], list[int]]]:
        """Yield a function that waits for signals, the given seconds at most, and returns their numbers."""

        def received(seconds: float) -> list[int]:
            if not select.select([self._wake], [], [], seconds)[0]:
                return []
            return list(os.read(self._wake, 64))

        numbers = (*_FORWARDED, signal.SIGCHLD)
        before = {number: signal.signal(number, lambda *_: None) for number in numbers}
        old = signal.set_wakeup_fd(self._woken)
        try:
            yield received
        finally:
            signal.set_wakeup_fd(old)
            for number, handler in before.items():
                signal.signal(number, handler)


def proxy_process(run_dir: Path) -> tuple[int, int] | None:
    """Return process id of the proxy of this run directory, and the owner of its lock; None where none runs.

    The kernel names the process that holds the lock (F_GETLK, fcntl(2)), by its id in this process's own PID
    namespace: the proxy's may be another one, in a container.  The proxy's user can put any file there.
    """
    try:
        fd = os.open(run_dir / PROXY_LOCK, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    except OSError:
        return None
    try:
        kind, *_, pid = _FLOCK.unpack(fcntl.fcntl(fd, fcntl.F_GETLK, _FLOCK.pack(fcntl.F_RDLCK, 0, 0, 0, 0)))
        return (pid, os.fstat(fd).st_uid) if kind != fcntl.F_UNLCK and pid > 0 else None
    except OSError:
        return None
    finally:
        os.close(fd)


def listen_endpoint(address: str) -> Endpoint | None:
    """Return the endpoint to connect to for a listener; None for one that systemd opens.

    A wildcard address is reached over the loopback.
    """
    if address.startswith("unix:"):
        return Endpoint.unix(address.removeprefix("unix:"))
    host, _, port = address.rpartition(":")
    if not port.isdigit():
        return None
    plain = host.strip("[]")
    return Endpoint.tcp({"0.0.0.0": "127.0.0.1", "::": "::1"}.get(plain, plain), int(port))  # noqa: S104 - compared, not bound


def sign_in_page_answers(endpoint: Endpoint, proxy: ProxyConfig, url: str) -> bool:
    """Request the sign-in page from one of the proxy's listeners.

    An answer shows that a worker serves, a status below 500 that the portal does.

    :param url: the address that people open.
    """
    host = urlsplit(url).netloc or "localhost"
    request = f"GET {proxy.prefix}/login HTTP/1.1\r\nHost: {host}\r\nConnection: close\r\n\r\n"
    try:
        sock = connect(endpoint, None, PROBE)
    except (OSError, InsecureEndpoint):
        return False
    try:
        if proxy.proxy_protocol:
            from dispatcher.proxy.edge.http.proxy_protocol import SIGNATURE

            sock.sendall(SIGNATURE + _PROXY_LOCAL)
        if proxy.tls_cert is not None:
            from dispatcher.common.tls import client_context

            # Not verified: this process has started the listener.
            sock = client_context(verify=False).wrap_socket(sock)
        sock.sendall(request.encode())
        line = sock.recv(32)
    except OSError:
        return False
    finally:
        sock.close()
    return line.startswith(b"HTTP/1.1 ") and line[9:12] < b"500"


def browser_url(config: Config) -> str:
    """Return the address that people open."""
    if config.proxy.public_url:
        return config.proxy.public_url.rstrip("/") + "/"
    scheme = "https" if config.proxy.tls_cert else "http"
    for address in config.proxy.listen:
        endpoint = listen_endpoint(address)
        if endpoint is not None and endpoint.kind == "tcp":
            host = f"[{endpoint.host}]" if ":" in endpoint.host else endpoint.host
            return f"{scheme}://{host}:{endpoint.port}/"
    return ", ".join(config.proxy.listen)


def tunnel(url: str, environment: Mapping[str, str] = os.environ) -> str:
    """Return the command that brings an address of this host's loopback to the computer of who is here by ssh.

    "" where that is not needed.

    :param environment: holds $SSH_CONNECTION of ssh(1): addresses and ports of client and server.
    """
    host, port, connection = (
        urlsplit(url).hostname,
        urlsplit(url).port,
        environment.get("SSH_CONNECTION", "").split(),
    )
    if len(connection) != 4 or not host or not port or not is_loopback(host):
        return ""
    _, _, server, ssh_port = connection
    there = f"[{host}]" if ":" in host else host
    other = "" if ssh_port == "22" else f"-p {ssh_port} "
    return f"ssh {other}-L {port}:{there}:{port} {environment.get('USER', 'USER')}@{server}"


def _ending(code: int) -> str:
    if code < 0:
        return f"was killed by signal {-code} ({signal.strsignal(-code) or 'unknown'})"
    return f"ended with exit code {code}"


def global_options(config_path: Path | None) -> list[str]:
    """Return the options that make a child read the same configuration."""
    return ["--config", str(config_path.absolute())] if config_path else []
