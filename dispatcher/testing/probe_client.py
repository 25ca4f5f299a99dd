"""A client of the running probe."""

from __future__ import annotations

import http.client
from urllib.parse import urlencode

from dispatcher.common.peer_credentials import peer_credentials
from dispatcher.plugin import endpoints
from dispatcher.plugin.errors import DispatcherError
from dispatcher.plugin.model import Endpoint


class Refused(Exception):
    """The probe could not carry out a request; `str` is the error's symbolic name."""


class _Connection(http.client.HTTPConnection):
    def __init__(self, endpoint: Endpoint, owner_uid: int | None, timeout: float) -> None:
        super().__init__("agent", timeout=timeout)
        self._endpoint, self._owner_uid, self._seconds = endpoint, owner_uid, timeout

    def connect(self) -> None:
        self.sock = endpoints.connect(self._endpoint, self._owner_uid, self._seconds)


class Inside:
    """The view from inside one agent.

    :param endpoint: where its probe listens; :param owner_uid: who must own a Unix socket.
    """

    def __init__(self, endpoint: Endpoint, owner_uid: int | None = None, *, timeout: float = 10.0) -> None:
        self.endpoint = endpoint
        self.owner_uid = owner_uid
        self.timeout = timeout

    def request(
        self, method: str, path: str, body: bytes = b"", /, *, timeout: float | None = None, **query: object
    ) -> bytes:
        """Return the answer's body.

        :raises Refused: the probe could not do it; :raises OSError: no answer.
        """
        connection = _Connection(self.endpoint, self.owner_uid, timeout or self.timeout)
        try:
            target = f"{path}?{urlencode(query)}" if query else path
            connection.request(method, target, body=body or None, headers={"Connection": "close"})
            response = connection.getresponse()
            answer = response.read()
        except http.client.HTTPException as error:
            raise ConnectionResetError(f"the agent closed the connection: {error!r}") from error
        finally:
            connection.close()
        if response.status >= 400:
            raise Refused(answer.decode(errors="replace").strip())
        return answer

    def get(self, path: str, /, **query: object) -> bytes:
        """GET."""
        return self.request("GET", path, **query)  # type: ignore[arg-type]

    def post(self, path: str, body: bytes = b"", /, **query: object) -> bytes:
        """POST."""
        return self.request("POST", path, body, **query)  # type: ignore[arg-type]

    def answers(self) -> bool:
        """Whether the probe answers now."""
        try:
            return self.request("GET", "/", timeout=min(2.0, self.timeout)) == b"probe\n"
        except (OSError, Refused, DispatcherError):
            return False

    def id(self) -> dict[str, str]:
        """Who the probe is: uid, gid, groups, pid, start, host, cwd, umask."""
        return dict(line.split("=", 1) for line in self.get("/id").decode().splitlines())

    def environment(self) -> dict[str, str]:
        """The environment that the app was started with."""
        entries = self.get("/env").decode(errors="surrogateescape").split("\0")
        return dict(entry.split("=", 1) for entry in entries if "=" in entry)

    def read(self, path: str) -> bytes:
        """Read a file as the agent."""
        return self.get("/read", path=path)

    def write(self, path: str, content: bytes) -> None:
        """Write a file as the agent."""
        self.post("/write", content, path=path)

    def refused(self, path: str, /, **query: object) -> str:
        """Return the error's name if the probe may not do this, "" if it may."""
        try:
            self.get(path, **query)
        except Refused as error:
            return str(error)
        return ""

    def peer_uid(self) -> int | None:
        """Return the user id of the listener on the host; None where the endpoint is not a Unix socket."""
        if self.endpoint.kind != "unix":
            return None
        with endpoints.connect(self.endpoint, self.owner_uid, self.timeout) as sock:
            return peer_credentials(sock)[1]
