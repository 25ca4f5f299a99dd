"""What every page needs: the portal's settings, who is signed in, cookies and forms.

`portal()` is the application's, `person()` the request's.  The session is looked up at most once per
request.
"""

from __future__ import annotations

import hashlib
import json
import re
import threading
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, cast
from urllib.parse import urlencode, urlsplit

from flask import Response, current_app, g, request

from dispatcher.common.ip_limits import Tally
from dispatcher.plugin.errors import BadRequest, DispatcherError, Forbidden, NotFound
from dispatcher.proxy import cookies, origins
from dispatcher.proxy.portal import csrf
from dispatcher.proxy.portal.methods import Methods

if TYPE_CHECKING:
    from dispatcher.client.manager_client import ManagerClient
    from dispatcher.config.load import Config

EXTENSION = "dispatcher-portal"
LOGIN_SLOTS = 64
SITE_SLOTS = 32  # of sign-ins at other sites
TOKEN = re.compile(r"[\x21-\x7e]{16,256}")
_NAME = re.compile(r"[!#$%&'*+.^_`|~0-9A-Za-z-]{1,256}")
_LONGEST = 400 * 86400  # browsers keep no cookie longer (RFC 6265bis, 5.5)
_EXPIRED_AT_MOST = 50
#: Bounds of `drop_doubles`: segments of a path, labels of a host.
_DEEPEST = 4
_MOST_PARENTS = 6


class NotSignedIn(DispatcherError):
    """There is no session, or it has ended."""

    code, status = "not-signed-in", 401


class StaleForm(Forbidden):
    """The form's token is not this browser's or not this session's."""

    code = "stale-form"


class LoginSlots:
    """The places of sign-ins in progress; one address takes at most half of them."""

    def __init__(self, size: int) -> None:
        self._lock = threading.Lock()
        self._size = size
        self._taken = 0
        self._by_address = Tally()

    def take(self, address: str) -> bool:
        """Take a place, if there is one; then it must be given back."""
        with self._lock:
            if self._taken >= self._size or self._by_address.of(address) >= self._size // 2:
                return False
            self._taken += 1
            self._by_address.add(address)
            return True

    def give_back(self, address: str) -> None:
        """Free a place."""
        with self._lock:
            self._taken -= 1
            self._by_address.drop(address)


@dataclass(frozen=True, slots=True)
class Portal:
    """Settings of the application.

    :ivar client: for most requests; :ivar login_client: with a longer timeout, for requests that sign in.
    :ivar methods: the ways to sign in.
    """

    config: Config
    client: ManagerClient
    login_client: ManagerClient
    logins: LoginSlots = field(default_factory=lambda: LoginSlots(LOGIN_SLOTS))
    site_logins: LoginSlots = field(default_factory=lambda: LoginSlots(SITE_SLOTS))
    methods: Methods = field(default_factory=Methods)

    @property
    def cookies(self) -> cookies.Names:
        """The names of our cookies."""
        return cookies.names(self.config.secure)

    @property
    def prefix(self) -> str:
        """The portal's path."""
        return self.config.proxy.prefix

    @property
    def public_origin(self) -> str:
        """``SCHEME://HOST`` of `proxy.public_url`, or ""."""
        return origins.origin(self.config.proxy.public_url)

    @property
    def public_host(self) -> str:
        """Host and port of `proxy.public_url`, or ""."""
        return self.public_origin.partition("://")[2]

    @property
    def subdomains(self) -> bool:
        """Whether each agent has its own host."""
        return self.config.proxy.routing == "subdomain"

    def title(self, app: str) -> str:
        """Return an app's title."""
        table = self.config.apps.get(app)
        return (table.title if table else "") or app


@dataclass(frozen=True, slots=True)
class Person:
    """The signed-in user.  `sha256` is the digest of the session's token."""

    sha256: str
    user: str
    agent: str
    agents: tuple[str, ...]


def portal() -> Portal:
    """Return the application's settings."""
    return cast("Portal", current_app.extensions[EXTENSION])


def sha256(token: str) -> str:
    """Return the hexadecimal SHA-256 of a token."""
    return hashlib.sha256(token.encode()).hexdigest()


def on_agent_host() -> bool:
    """Whether the request is for an agent's own host (subdomain routing)."""
    return portal().subdomains and request.host.lower() != portal().public_host


def address() -> str:
    """Return the address of the browser, as seen by the edge."""
    return request.remote_addr or ""


# The session.


def session_digest() -> str:
    """Return the SHA-256 of the session's token, "" without one."""
    token = only_cookie(portal().cookies.session, TOKEN)
    return sha256(token) if token else ""


def person() -> Person | None:
    """Return who is signed in.

    :raises ManagerUnreachable: the manager does not answer.
    """
    if "person" not in g:
        g.person = _look_up()
    return cast("Person | None", g.person)


def signed_in() -> Person:
    """Return who is signed in.

    :raises NotSignedIn: there is no valid session.
    """
    found = person()
    if found is None:
        raise NotSignedIn("You are not signed in", fix=f"sign in at {login_url()} and try again")
    return found


def login_url() -> str:
    """Return the address of the sign-in, a path where that is on this host."""
    return (portal().public_origin if on_agent_host() else "") + local("/login")


def _look_up() -> Person | None:
    digest = session_digest()
    if not digest:
        return None
    try:
        session = portal().client.lookup(digest)
    except (NotFound, Forbidden):
        return None
    if str(session.get("host") or "") != (request.host.lower() if on_agent_host() else ""):
        return None  # of another host: an agent may hold the token of its own
    return Person(digest, str(session["user"]), str(session["agent"]), tuple(session.get("agents", ())))


def agent_of(someone: Person, name: str) -> dict[str, Any]:
    """Return one of a user's agents.

    :raises NotFound: the same for another user's agent and for a missing one.
    """
    for agent in portal().client.my_agents(someone.sha256)["agents"]:
        if agent["name"] == name:
            return cast("dict[str, Any]", agent)
    raise NotFound("You have no such app", fix="choose one of your apps")


# Cookies.


def _sent_cookies(name: str) -> list[str]:
    return cookies.values(request.headers.get("Cookie", ""), name)


def only_cookie(name: str, form: re.Pattern[str]) -> str:
    """Return the value of one of our cookies, "" if it is missing, malformed, or came more than once."""
    found = _sent_cookies(name)
    return found[0] if len(found) == 1 and form.fullmatch(found[0]) else ""


def set_cookie(response: Response, name: str, value: str, max_age: float | None) -> None:
    """Set a cookie of this host that no script can read; None: until the browser is closed."""
    age = None if max_age is None else int(min(max_age, _LONGEST))
    secure = portal().config.secure
    response.set_cookie(name, value, max_age=age, path="/", secure=secure, httponly=True, samesite="Lax")


def set_session(response: Response, token: str, session: dict[str, Any]) -> None:
    """Set the session cookie, for no longer than the session can last."""
    # Use prolongs a session up to its lifetime, while the cookie's age is fixed now.
    set_cookie(response, portal().cookies.session, token, session.get("lifetime", _LONGEST))


def device_token() -> str | None:
    """Return the token that proves an earlier sign-in from this browser."""
    return only_cookie(portal().cookies.device, TOKEN) or None


def forget_session(response: Response) -> None:
    """Clear a session's data in the browser, so that the next user's app does not find it.

    Clear-Site-Data clears the cache and the storage of scripts.  Its "cookies" would clear too much: those of
    all sibling hosts, and the device cookie, which lets the owner sign in while others guess passwords.  So each
    cookie that the browser sent (an app's, if it shares the portal's origin) is expired by name.
    """
    set_cookie(response, portal().cookies.session, "", 0)
    forget_apps(response)


def is_other_person(device: str | None) -> bool:
    """Whether apps of another person may have left data in this browser.  In subdomain routing nothing is shared.

    A session may end without a sign-out.

    :param device: from the sign-in: the browser's own token if this user has signed in from it before.
    """
    return not portal().subdomains and (device is None or device != device_token())


def forget_apps(response: Response) -> None:
    """Clear what apps have left in the browser; in subdomain routing their cookies are not here."""
    shown = [] if portal().subdomains else cookies.sent_names(request.headers.get("Cookie", ""))[:_EXPIRED_AT_MOST]
    for name in shown:
        if name not in cookies.OWN_NAMES and _NAME.fullmatch(name):
            set_cookie(response, name, "", 0)
    response.headers["Clear-Site-Data"] = '"cache", "storage"'


def drop_doubles(response: Response) -> Response:
    """Expire the copies of a cookie of ours that has come more than once, since both then count as none.

    Without HTTPS a page of an app can set a cookie of the same name for a longer path or for a parent domain, and
    so lock its user out of the portal.  With HTTPS the name's prefix forbids both.  The client chooses path, host
    and cookies of a request, so each is bounded; the portal's own paths are shorter.
    """
    doubled = [name for name in portal().cookies if len(_sent_cookies(name)) > 1]
    if not doubled:
        return response
    steps = request.path.split("/", _DEEPEST + 1)[1 : _DEEPEST + 1]
    paths = {"/" + "/".join(steps[:count]) + end for count in range(1, len(steps) + 1) for end in ("", "/")} - {
        "/",
        "//",
    }
    host = request.host.partition(":")[0]
    labels = host.rsplit(".", _MOST_PARENTS)[-_MOST_PARENTS:] if host[-1:].isalpha() else []
    parents = [".".join(labels[at:]) for at in range(len(labels))]
    for name in doubled:
        for path in sorted(paths):
            response.set_cookie(name, "", max_age=0, path=path)
        for domain in parents:
            for path in sorted({"/"} | paths):
                response.set_cookie(name, "", max_age=0, path=path, domain=domain)
    return response


# Forms.


def form_token(purpose: str, *, session: bool = True) -> str:
    """Return a token for a form of this page; the browser gets the cookie it belongs to if it has none."""
    sent_seeds = _sent_cookies(portal().cookies.form)
    seed = next((value for value in sent_seeds if csrf.SEED.fullmatch(value)), "")
    if not seed:
        seed = g.setdefault("new_seed", csrf.new_seed())
    return csrf.token(seed, purpose, session_digest() if session else "")


def keep_seed(response: Response) -> Response:
    """Set the cookie for a form in this response."""
    if "new_seed" in g:
        set_cookie(response, portal().cookies.form, g.new_seed, None)
    return response


def check_form(purpose: str, *, session: bool = True) -> None:
    """Return if the request is a form of this portal, or JSON of a program.

    :raises Forbidden: a page of another origin, a frame or a script sent it.
    :raises StaleForm: the token is missing, another browser's or another session's.
    """
    program, here, public = request.is_json, origins.origin(request.host_url), portal().public_origin
    own = [here] if on_agent_host() or not public else [here, public]
    seeds = _sent_cookies(portal().cookies.form)
    sender = origins.origin(request.headers.get("Origin", "" if seeds or program else here))
    hosts = {urlsplit(origin).hostname for origin in own}
    if portal().config.secure and sender.startswith("http://") and urlsplit(sender).hostname in hosts:
        raise StaleForm(
            "This page was opened without encryption",
            why="browsers keep the cookies of this service over https only",
            fix=f"open {public or 'this page over https'}",
        )
    if refusal := csrf.foreign(dict(request.headers), own, program=program):
        why, fix = refusal
        raise Forbidden("This request is refused", why=why, fix=fix)
    if program:
        if request.content_length and not isinstance(_json(), Mapping):
            raise BadRequest(
                "The request is not understood",
                why="the content type is JSON, but the body is not a JSON object",
                fix="send an object, or a form as application/x-www-form-urlencoded",
            )
        return
    if not seeds:
        raise StaleForm(
            "Your browser sent no cookie",
            why="cookies are switched off for this page, or were deleted since it was opened",
            fix="allow cookies for this site, then try again",
        )
    if not csrf.valid(request.form.get("token", ""), seeds, purpose, session_digest() if session else ""):
        raise StaleForm(
            "This page was out of date",
            why="it was opened before the browser's cookies or the session changed",
            fix="try again from here",
        )


def sent(name: str, limit: int = 4096) -> str:
    """Return one value of a form or of a JSON body, "" when absent; never longer than `limit` characters."""
    source: Any = _json() if request.is_json else request.form
    value = source.get(name, "") if isinstance(source, Mapping) else ""
    return value[: limit + 1] if isinstance(value, str) else ""


def _json() -> Any:
    """Return the JSON body, None if it is not JSON in UTF-8 (RFC 8259), or nested too deeply."""
    if "json" not in g:
        try:
            g.json = json.loads(request.get_data().decode(), parse_constant=_no_json)
        except (ValueError, RecursionError):
            g.json = None
    return g.json


def _no_json(constant: str) -> None:
    raise ValueError(f"{constant} is not JSON")


# Ways on.


def local(path: str, **query: str) -> str:
    """Return a path of the portal with a query."""
    return f"{portal().prefix}{path}" + (f"?{urlencode(query)}" if query else "")


def go(path: str) -> Response:
    """Redirect the browser with GET."""
    return Response(status=303, headers={"Location": path})
