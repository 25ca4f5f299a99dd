"""Requests to the provider: bounded in time and size, without redirects to other hosts.

The library is `http.client` on a socket whose waits all end at the deadline: the time-outs of HTTP libraries are
for a single read, so a provider that sends a byte now and then would hold a thread without end.
"""

from __future__ import annotations

import http.client
import io
import json
import socket
import ssl
from collections.abc import Mapping
from typing import Any, cast
from urllib.parse import SplitResult, urlencode, urljoin, urlsplit

from dispatcher.plugin import Deadline, DeadlineExceeded, Unavailable
from dispatcher_oidc.options import OidcOptions, is_safe

MAX_BODY = 1 << 20  # bytes
MAX_REDIRECTS = 3
Json = dict[str, Any]


class _Reader(io.RawIOBase):
    def __init__(self, sock: socket.socket, deadline: Deadline) -> None:
        self._sock = sock
        self._deadline = deadline

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        self._sock.settimeout(_seconds(self._deadline))
        return self._sock.recv_into(buffer)


class _Socket:
    """What `http.client` uses of a socket."""

    def __init__(self, sock: socket.socket, deadline: Deadline) -> None:
        self._sock = sock
        self._deadline = deadline

    def sendall(self, data: bytes) -> None:
        self._sock.settimeout(_seconds(self._deadline))
        self._sock.sendall(data)

    def makefile(self, _mode: str) -> io.BufferedReader:
        return io.BufferedReader(_Reader(self._sock, self._deadline))

    def close(self) -> None:
        """The response is read after this."""


def _seconds(deadline: Deadline) -> float:
    if deadline.expired:
        raise TimeoutError("timed out")
    return deadline.remaining()


class Provider:
    """The HTTP client of one provider.  Each request has a connection of its own."""

    def __init__(self, options: OidcOptions) -> None:
        self._options = options

    def get(self, url: str, deadline: Deadline) -> Json:
        """Return the JSON object at a URL.

        :raises Unavailable: there is none.
        """
        return self._json(url, self._get(url, deadline)[0])

    def get_user(self, url: str, deadline: Deadline, *, token: str) -> Json | str:
        """Return user information: claims, or a JSON Web Token with them (OpenID Connect Core 1.0, section 5.3.2).

        :param token: an access token; redirects are not followed.
        :raises Unavailable: there is neither.
        """
        body, kind = self._get(url, deadline, token)
        if kind.partition(";")[0].strip().lower() == "application/jwt":
            return body.decode("ascii", "replace").strip()
        return self._json(url, body)

    def _get(self, url: str, deadline: Deadline, token: str | None = None) -> tuple[bytes, str]:
        """Return body and type of what is at a URL."""
        headers = {"Authorization": f"Bearer {token}"} if token else {}
        deadline = deadline.bounded(self._options.timeout)
        place = url
        for _ in range(1 if token else MAX_REDIRECTS + 1):
            status, found, answer = self._request("GET", place, None, headers, deadline)
            if status not in {301, 302, 303, 307, 308}:
                break
            place = urljoin(place, answer.getheader("Location") or "")
            if not is_safe(place) or urlsplit(place)[:2] != urlsplit(url)[:2]:
                raise self.unusable(url, "it redirects to another host")
        if status != 200:
            raise self.unusable(url, f"it answers with the status {status}")
        return found, answer.getheader("Content-Type") or ""

    def post(
        self, url: str, form: Mapping[str, str], headers: Mapping[str, str], deadline: Deadline
    ) -> tuple[int, Json]:
        """Send a form; return status and JSON object of the answer, an empty one if an error has none.

        :raises Unavailable: there is no answer, or not one in JSON.
        """
        body = urlencode(form).encode()
        headers = {"Content-Type": "application/x-www-form-urlencoded", **headers}
        status, found, _ = self._request("POST", url, body, headers, deadline.bounded(self._options.timeout))
        try:
            return status, self._json(url, found)
        except Unavailable:
            if 200 <= status < 300:
                raise
            return status, {}

    def unusable(self, url: str, why: str, fix: str = "") -> Unavailable:
        """Return the error for an answer that cannot be used.

        :param fix: by default: look at the provider and its issuer.
        """
        place = urlsplit(url)._replace(query="").geturl()
        return Unavailable(
            f"{place} cannot be used for signing in with {self._options.shown}",
            why=why,
            fix=fix or f"see whether the provider works, and whether the issuer {self._options.issuer} is right",
        )

    def _json(self, url: str, body: bytes) -> Json:
        try:
            found = json.loads(body)
        except (ValueError, RecursionError):
            found = None
        if not isinstance(found, dict):
            raise self.unusable(url, "its answer is not a JSON object")
        return found

    def _request(
        self, method: str, url: str, body: bytes | None, headers: Mapping[str, str], deadline: Deadline
    ) -> tuple[int, bytes, http.client.HTTPResponse]:
        parts = urlsplit(url)
        target = (parts.path or "/") + (f"?{parts.query}" if parts.query else "")
        sent = {"Accept": "application/json", "Accept-Encoding": "identity", "Connection": "close", **headers}
        try:
            with self._connect(parts, deadline) as sock:
                connection = http.client.HTTPConnection(parts.hostname or "", parts.port or _port(parts))
                connection.sock = cast("socket.socket", _Socket(sock, deadline))
                connection.request(method, target, body, sent)
                answer = connection.getresponse()
                found = answer.read(MAX_BODY + 1)
        except TimeoutError as error:
            raise DeadlineExceeded(
                f"{self._options.shown} does not answer in time",
                why=f"{parts.netloc} took more than {self._options.timeout:g} seconds",
                fix="see whether the provider works and this machine can reach it",
            ) from error
        except ssl.SSLCertVerificationError as error:
            fix = (
                f"correct the certificate, or name its authority in ca_file of the provider {self._options.shown}"
            )
            raise self.unusable(url, f"certificate verify failed: {error.verify_message}", fix) from error
        except (OSError, http.client.HTTPException) as error:
            raise self.unusable(url, _reason(error)) from error
        if len(found) > MAX_BODY:
            raise self.unusable(url, f"its answer has more than {MAX_BODY} bytes")
        return answer.status, found, answer

    def _connect(self, parts: SplitResult, deadline: Deadline) -> socket.socket:
        host = parts.hostname or ""
        sock = socket.create_connection((host, parts.port or _port(parts)), timeout=_seconds(deadline))
        if parts.scheme != "https":
            return sock
        try:
            sock.settimeout(_seconds(deadline))
            return self._tls().wrap_socket(sock, server_hostname=host)
        except BaseException:
            sock.close()
            raise

    def _tls(self) -> ssl.SSLContext:
        """Read the certificates each time: a new file needs no restart."""
        try:
            return ssl.create_default_context(cafile=self._options.ca_file)
        except (OSError, ssl.SSLError) as error:
            raise Unavailable(
                f"{self._options.ca_file} has no certificates",
                why=str(error),
                fix=f"correct ca_file of the provider {self._options.shown}",
            ) from error


def _port(parts: SplitResult) -> int:
    return 443 if parts.scheme == "https" else 80


def _reason(error: BaseException) -> str:
    if isinstance(error, (http.client.HTTPException, ssl.SSLError)):
        return f"its answer is not HTTP: {type(error).__name__} {error}"
    return getattr(error, "strerror", None) or str(error) or type(error).__name__
