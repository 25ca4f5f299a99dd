"""The connection to one Docker engine: made when needed, bounded by deadlines, its errors translated.

All use of docker-py goes through `Engine.call`.
"""

from __future__ import annotations

import contextlib
import hashlib
import itertools
import os
import socket
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

import docker.errors
import docker.utils
import requests
from docker.api.client import APIClient
from docker.constants import DEFAULT_DOCKER_API_VERSION
from docker.tls import TLSConfig
from docker.transport.unixconn import UnixHTTPAdapter, UnixHTTPConnection, UnixHTTPConnectionPool
from docker.types import CancellableStream

from dispatcher.plugin import ConfigError, Deadline, DeadlineExceeded, ProviderError, SshMultiplexer
from dispatcher_docker.errors import NoSuchObject, translated
from dispatcher_docker.options import LABEL, DockerOptions

DEFAULT_URL = "unix:///var/run/docker.sock"
_REMOTE_SOCKET = "/var/run/docker.sock"
_CONNECT_SECONDS = 10.0
#: Connections that are kept for the next request.
_KEEP = 32
#: Docker's defaults, in place of those that Podman's containers.conf may have.
_NAMESPACES = {"UsernsMode": "host", "PidMode": "private", "UTSMode": "private"}
#: How Podman's list fails when a container is removed meanwhile, which need not be one of dispatcher's.
_REMOVED = ("container not known", "no such container", "no container with")
_LIST_TRIES = 5
#: The deadline of this thread's call, which docker-py has no parameter for.
_current = threading.local()


class _Connection(UnixHTTPConnection):
    """One connection, closed if it cannot be made."""

    def connect(self) -> None:
        """Connect."""
        sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            sock.settimeout(self.timeout)
            sock.connect(self.unix_socket)
        except BaseException:
            sock.close()
            raise
        self.sock = sock


class _Pool(UnixHTTPConnectionPool):
    """Connections that are kept for later requests."""

    def _new_conn(self) -> Any:
        return _Connection(self.base_url, self.socket_path, self.timeout)  # type: ignore[arg-type]  # stubs say int


class _Adapter(UnixHTTPAdapter):
    """Carries requests over a Unix socket, with one pool for all URLs.

    docker-py has a pool for every URL, so few connections are used twice and dozens stay open.

    :param path: of the socket; :param keep: connections that are kept for later requests.
    """

    def __init__(self, path: str, keep: int) -> None:
        super().__init__(f"http+unix://{path}")
        self._pool = _Pool("http+docker://localhost", path, maxsize=keep)

    def get_connection(self, url: str | bytes, proxies: object = None) -> _Pool:
        """Return the one pool."""
        return self._pool

    def close(self) -> None:
        """Close all connections."""
        self._pool.close()
        super().close()


class Client(APIClient):
    """docker-py's client with a deadline for every request, and streams that can be closed.

    The constructor requests the engine's version.
    """

    def __init__(self, url: str, tls: TLSConfig | None) -> None:
        # With a version given, the constructor sends no request: that must wait for the adapter below.
        super().__init__(
            base_url=url, version=DEFAULT_DOCKER_API_VERSION, tls=tls or False, user_agent="dispatcher"
        )
        self.trust_env = False  # REQUESTS_CA_BUNDLE, proxies and .netrc are not for this engine
        if url.startswith("unix://"):
            self.mount("http+docker://", _Adapter(url.removeprefix("unix://"), _KEEP))
        try:
            # Podman runs other programs to answer /version, which takes seconds on a busy host.
            pinged = self._get(self._url("/_ping", versioned_api=False)).headers  # type: ignore[attr-defined]  # not in the stubs
            #: Podman has the same interface, but for some answers.
            self.is_podman = "Libpod-API-Version" in pinged
            version = pinged.get("API-Version") if self.is_podman else None
            found = {"ApiVersion": version} if version else self.version(api_version=False)
        except BaseException:
            self.close()
            raise
        self._version = min(str(found["ApiVersion"]), DEFAULT_DOCKER_API_VERSION, key=as_numbers)
        if as_numbers(self._version) < as_numbers(str(found.get("MinAPIVersion") or "1.0")):
            self._version = str(found["MinAPIVersion"])

    def _set_request_timeout(self, kwargs: dict[str, Any]) -> dict[str, Any]:
        deadline: Deadline | None = getattr(_current, "deadline", None)
        seconds = max(0.01, deadline.remaining()) if deadline else 60.0
        kwargs["timeout"] = (min(_CONNECT_SECONDS, seconds), seconds)
        return kwargs

    def request(self, method: str | bytes, url: str | bytes, *args: Any, **kwargs: Any) -> requests.Response:
        """Send a request; a GET is sent again if the connection was dead, as kept ones may be."""
        try:
            return super().request(method, url, *args, **kwargs)
        except requests.exceptions.ConnectionError as error:
            if str(method).upper() != "GET" or isinstance(error, requests.exceptions.Timeout):
                raise
            return super().request(method, url, *args, **kwargs)

    def archive(self, container: str, path: str, most: int) -> bytes:
        """Return a file of a container as a tar; b"" if there is none, or if it has more than `most` bytes."""
        try:
            stream, status = self.get_archive(container, path)
        except docker.errors.NotFound:
            return b""
        with contextlib.closing(stream):
            return b"" if int(status["size"]) > most else b"".join(stream)

    def image(self, reference: str) -> dict[str, Any]:
        """Return the inspection of an image."""
        found: dict[str, Any] = self.inspect_image(reference)  # type: ignore[no-untyped-call]
        return found

    def _stream_helper(self, response: requests.Response, decode: bool = False) -> Any:
        self._raise_for_status(response)  # type: ignore[attr-defined]  # CancellableStream would take an error for the end
        stream = super()._stream_helper(response, decode)  # type: ignore[misc]
        return CancellableStream(stream, response)


def as_numbers(version: str) -> tuple[int, ...]:
    """Return a version such as 1.41 so that it compares."""
    return tuple(int(part) for part in version.split("."))


class Engine:
    """One engine.  Thread-safe; connects at the first `call`.

    :param options: ``[providers.docker]``; without a `url` the environment (DOCKER_HOST, DOCKER_TLS_VERIFY,
        DOCKER_CERT_PATH) decides, as it does for the `docker` program.
    :param run_dir: for the sockets of an ssh connection, private to the provider.
    :ivar ssh: the connection to the host of an ``ssh://`` engine, whose socket it forwards (docker-py's own has no
        deadlines); else None.
    """

    def __init__(self, options: DockerOptions, run_dir: Path) -> None:
        self._options = options
        self.url = options.url or os.environ.get("DOCKER_HOST") or DEFAULT_URL
        self._from_environment = not options.url
        self.ssh: SshMultiplexer | None = None
        if self.url.startswith("ssh://"):
            directory = run_dir / "ssh" / hashlib.sha256(self.url.encode()).hexdigest()[:8]
            self.ssh, self._remote = ssh_to(self.url, directory / "control")
            self._forwarded = str(directory / "engine")
        self._client: Client | None = None
        self._lock = threading.Lock()

    @property
    def is_local(self) -> bool:
        """Whether containers see this host's files and this host sees their processes."""
        return self.url.startswith("unix://") if self._options.local is None else self._options.local

    @property
    def is_podman(self) -> bool:
        """Whether the engine is Podman; False before the first call."""
        return self._client is not None and self._client.is_podman

    @property
    def name(self) -> str:
        """The engine's name; before the first call as its URL suggests."""
        return "Podman" if self.is_podman or "/podman/" in self.url else "Docker"

    @property
    def socket_path(self) -> str:
        """Path of the engine's own socket on this host, or ""."""
        return self.url.removeprefix("unix://") if self.url.startswith("unix://") else ""

    @contextlib.contextmanager
    def call(self, doing: str, deadline: Deadline) -> Iterator[Client]:
        """Yield the client for a few requests that end by `deadline`.

        :param doing: a verb phrase that completes "Docker could not ...".
        :raises Unavailable: the engine does not answer; :raises DeadlineExceeded: not in time;
        :raises NoSuchObject: the object does not exist; :raises ProviderError: the engine refuses.
        """
        outer = getattr(_current, "deadline", None)
        _current.deadline = deadline
        try:
            with translated(doing, self.url, deadline, self.name):
                yield self._connected(doing, deadline)
        finally:
            _current.deadline = outer

    def containers(self, installation: str, deadline: Deadline, **options: Any) -> list[dict[str, Any]]:
        """Return the engine's list of an installation's containers: those that run, or with ``all=True`` all."""
        filters = {"label": [f"{LABEL}installation={installation}"]}
        for tries in itertools.count(1):
            try:
                with self.call("list the containers", deadline) as client:
                    return list(client.containers(filters=filters, **options))
            except (ProviderError, NoSuchObject) as error:
                if tries == _LIST_TRIES or not any(words in error.why for words in _REMOVED):
                    raise
        raise AssertionError

    def make(self, body: dict[str, Any], name: str, deadline: Deadline, platform: str = "") -> str:
        """Create a container from the body of `POST /containers/create`; return its id."""
        with self.call("create the container", deadline) as client:
            if client.is_podman:
                body = {**body, "HostConfig": {**_NAMESPACES, **(body.get("HostConfig") or {})}}
            made = client.create_container_from_config(body, name=name, platform=platform or None)  # type: ignore[no-untyped-call]
            return str(made["Id"])

    def _connected(self, doing: str, deadline: Deadline) -> Client:
        if deadline.expired:
            raise DeadlineExceeded(f"There was no time left to {doing}", fix="try again with more time")
        if self.ssh:
            self.ssh.forward(self._forwarded, self._remote, deadline)
        if self._client:
            return self._client
        with deadline.holding(
            self._lock,
            f"There was no time left to {doing}",
            why=f"{self.url} accepts connections and does not answer",
            fix="check whether the engine hangs (docker info)",
        ):
            if self._client is None:
                url, tls = (f"unix://{self._forwarded}", None) if self.ssh else (self.url, self._tls())
                self._client = Client(url, tls)
            return self._client

    def _tls(self) -> TLSConfig | None:
        options = self._options
        if self._from_environment:
            found: TLSConfig | None = docker.utils.kwargs_from_env().get("tls")
            return found
        if not (options.tls_ca or options.tls_cert):
            return None
        pair = (str(options.tls_cert), str(options.tls_key)) if options.tls_cert else None
        ca = str(options.tls_ca) if options.tls_ca else None
        return TLSConfig(client_cert=pair, ca_cert=ca, verify=options.tls_verify)

    def close(self) -> None:
        """Close all connections; the next `call` makes new ones."""
        with self._lock:
            client, self._client = self._client, None
        if client:
            client.close()


def ssh_to(url: str, control: Path) -> tuple[SshMultiplexer, str]:
    """Return the connection for ``ssh://[USER@]HOST[:PORT][/PATH/OF/THE/SOCKET]``, and that path.

    :raises ConfigError: another form.
    """
    parts = urlsplit(url)
    host = parts.hostname or ""
    if not host or host.startswith("-") or (parts.username or "").startswith("-") or parts.password:
        raise ConfigError(
            f"Bad url of the Docker engine {url!r}",
            fix="write ssh://USER@HOST, the key in ssh's configuration",
        )
    destination = f"{unquote(parts.username)}@{host}" if parts.username else host
    options = ["-p", str(parts.port)] if parts.port else []
    return SshMultiplexer(destination, control, options=options), unquote(parts.path.rstrip("/")) or _REMOTE_SOCKET
