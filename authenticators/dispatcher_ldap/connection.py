"""Connections to the servers of the directory: encrypted, with a time limit for each wait.

The library is ldap3, not python-ldap: libldap as Debian builds it waits without end for a server that accepts a
connection to ldaps:// and says nothing.
"""

from __future__ import annotations

import ssl
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from typing import Any, TypeVar
from urllib.parse import urlsplit

import ldap3
from ldap3.core import results
from ldap3.core.exceptions import LDAPException

from dispatcher.plugin import Deadline, DeadlineExceeded, Unavailable
from dispatcher_ldap.options import LdapOptions

_T = TypeVar("_T")
LATER = 30.0  # seconds for which a server that failed is tried last
#: An entry: its name, and the values of its attributes by their name in lower case.
Entry = tuple[str, Mapping[str, Sequence[bytes]]]
#: The server refuses this name or password (RFC 4511, appendix A); some lock accounts with `CONSTRAINT_VIOLATION`.
_REFUSED = {
    results.RESULT_INVALID_CREDENTIALS,
    results.RESULT_INAPPROPRIATE_AUTHENTICATION,
    results.RESULT_NO_SUCH_OBJECT,
    results.RESULT_INVALID_DN_SYNTAX,
    results.RESULT_CONSTRAINT_VIOLATION,
}
PAGE = 500  # entries of one answer; Active Directory sends 1,000 at most
_PAGES = "1.2.840.113556.1.4.319"  # RFC 2696; servers without it ignore it
#: What to do about an error of a search.
_FIXES = {
    results.RESULT_SIZE_LIMIT_EXCEEDED: "raise the server's limit for auth.ldap.bind_dn, or use a narrower base",
    results.RESULT_REFERRAL: "it is on another server: name that one in auth.ldap.servers",
}
_MISSING = {results.RESULT_NO_SUCH_OBJECT, results.RESULT_INVALID_DN_SYNTAX}
#: Another server may be able to answer.
_AWAY = {results.RESULT_BUSY, results.RESULT_UNAVAILABLE, results.RESULT_TIME_LIMIT_EXCEEDED}
#: Password policy for LDAP directories (draft-behera-ldap-password-policy-10, 6.2): the last element of the answer
#: is the error `changeAfterReset`.
_POLICY = "1.3.6.1.4.1.42.2.27.8.5.1"
_MUST_CHANGE = b"\x81\x01\x02"


class Away(Exception):
    """A server does not answer."""


class NoEntry(Exception):
    """The base of a search does not exist, or the server does not show it."""


class _Tls(ldap3.Tls):  # type: ignore[misc]
    """TLS as Python's `ssl` does it: certificate, host name or address, and time limit of the handshake."""

    def __init__(self, context: ssl.SSLContext, host: str) -> None:
        super().__init__(validate=ssl.CERT_REQUIRED)
        self._context = context
        self._host = host
        self.error = ""  # why the certificate was refused

    def wrap_socket(self, connection: Any, do_handshake: bool = False) -> None:
        try:
            connection.socket = self._context.wrap_socket(connection.socket, server_hostname=self._host)
        except ssl.SSLCertVerificationError as error:
            self.error = f"certificate verify failed: {error.verify_message}"
            raise


class Connection:
    """A connection to one server.

    :raises Away: it cannot be made.
    """

    def __init__(self, server: str, options: LdapOptions, deadline: Deadline) -> None:
        self.server = server
        self._deadline = deadline
        parts = urlsplit(server)
        host, secure = parts.hostname or "", parts.scheme == "ldaps"
        try:
            context = ssl.create_default_context(cafile=options.ca_file)
        except (OSError, ssl.SSLError) as error:
            raise Unavailable(
                f"{options.ca_file} has no certificates", why=str(error), fix="correct auth.ldap.ca_file"
            ) from error
        self._tls = _Tls(context, host)
        self._ldap: Any = ldap3.Connection(
            ldap3.Server(
                host,
                port=parts.port or (636 if secure else 389),
                use_ssl=secure,
                tls=self._tls,
                get_info=ldap3.NONE,
                connect_timeout=self._seconds(),
            ),
            client_strategy=ldap3.SYNC,
            auto_referrals=False,
            check_names=False,
            read_only=True,
        )
        try:
            self._call(self._ldap.open, read_server_info=False)
            if not secure and options.start_tls:
                self._call(self._ldap.start_tls, read_server_info=False)
                if not isinstance(self._ldap.socket, ssl.SSLSocket):  # it can also fail by its result alone
                    raise Away("the connection is not encrypted")
        except BaseException:
            self.close()
            raise

    def bind(self, dn: str, password: bytes) -> bool:
        """Sign in to the directory; return whether it accepts the password.

        An account that must change its password first is refused: it may do nothing else in the directory.
        """
        self._ldap.user, self._ldap.password, self._ldap.authentication = dn, password, ldap3.SIMPLE
        try:
            self._call(self._ldap.bind, read_server_info=False, controls=[(_POLICY, False, None)])
        finally:
            self._ldap.password = None
        result = self._ldap.result
        if result["result"] in _REFUSED:
            return False
        self._check(f"refuses to check the password of {dn}")
        policy = (result.get("controls") or {}).get(_POLICY) or {}
        return not bytes(policy.get("value") or b"").endswith(_MUST_CHANGE)

    def search(
        self, base: str, filter_: str, attributes: Sequence[str], *, entry_alone: bool = False, limit: int = 0
    ) -> list[Entry]:
        """Return the entries that match.

        :param entry_alone: look at the base, not below it; :param limit: return at most so many, 0: all.
        :raises NoEntry: the base is missing.
        """
        scope = ldap3.BASE if entry_alone else ldap3.SUBTREE
        paged = not (entry_alone or limit)
        entries: list[Entry] = []
        cookie = b""
        while True:
            pages = {"paged_size": PAGE, "paged_cookie": cookie} if paged else {"size_limit": limit}
            self._call(self._ldap.search, base, filter_, scope, attributes=list(attributes), **pages)
            code = self._ldap.result["result"]
            if code in _MISSING:
                raise NoEntry
            if not (limit and code == results.RESULT_SIZE_LIMIT_EXCEEDED):
                self._check(f"cannot search in {base}")
            entries += [
                (found["dn"], {key.lower(): values for key, values in found["raw_attributes"].items()})
                for found in self._ldap.response or ()
                if found["type"] == "searchResEntry"
            ]
            answer = (self._ldap.result.get("controls") or {}).get(_PAGES) or {}
            cookie = (answer.get("value") or {}).get("cookie") or b""
            if not cookie:
                return entries

    def close(self) -> None:
        """End the connection."""
        with suppress(LDAPException, OSError):
            self._ldap.unbind()
        # A connection that failed half-way is not known to the library as open.
        with suppress(AttributeError, OSError):
            self._ldap.socket.close()

    def _call(self, method: Callable[..., object], *arguments: Any, **options: Any) -> None:
        seconds = self._seconds()
        if self._ldap.socket is not None:
            self._ldap.socket.settimeout(seconds)
        try:
            method(*arguments, **options)
        except (LDAPException, OSError) as error:
            raise Away(self._tls.error or " ".join(str(error).split())) from error

    def _seconds(self) -> float:
        if self._deadline.expired:
            raise Away("no answer in time")
        return max(self._deadline.remaining(), 0.01)

    def _check(self, what: str) -> None:
        """Check the result of the last call."""
        result = self._ldap.result
        code, why = result["result"], f"{result['description']}: {result['message']}".removesuffix(": ")
        if code in _AWAY:
            raise Away(why)
        if code != results.RESULT_SUCCESS:
            raise Unavailable(f"{self.server} {what}", why=why, fix=_FIXES.get(code, ""))


class Servers:
    """The servers of the directory; one that failed is tried last for a while."""

    def __init__(self, options: LdapOptions) -> None:
        self._options = options
        self._failed: dict[str, float] = {}
        self._lock = threading.Lock()

    def ask(self, question: Callable[[Connection], _T], deadline: Deadline, only: Sequence[str] = ()) -> _T:
        """Return the answer of the first server that gives one.

        :param question: asked with a connection, once for each server that is tried.
        :param only: servers to try, by default all.
        :raises Unavailable: none answers, or one answers with an error.
        :raises DeadlineExceeded: the time is over.
        """
        problems: list[str] = []
        servers = list(only) or self._in_order()
        for number, server in enumerate(servers):
            if deadline.expired:
                break
            share = deadline.remaining() / (len(servers) - number)
            connection = None
            try:
                connection = Connection(server, self._options, deadline.bounded(min(share, self._options.timeout)))
                answer = question(connection)
            except Away as error:
                problems.append(f"{server}: {error}")
                self._note(server, failed=True)
                continue
            finally:
                if connection is not None:
                    connection.close()
            self._note(server, failed=False)
            return answer
        if not problems:
            raise DeadlineExceeded("The directory was not asked in time")
        raise Unavailable(
            "The directory does not answer",
            why="; ".join(problems),
            fix=(
                "correct the certificate, or name its authority in auth.ldap.ca_file"
                if any("certificate verify failed" in problem for problem in problems)
                else "check auth.ldap.servers, and that this host reaches them"
            ),
        )

    def _in_order(self) -> list[str]:
        since = time.monotonic() - LATER
        with self._lock:
            return sorted(self._options.servers, key=lambda server: self._failed.get(server, since) > since)

    def _note(self, server: str, *, failed: bool) -> None:
        with self._lock:
            if failed:
                self._failed[server] = time.monotonic()
            else:
                self._failed.pop(server, None)
