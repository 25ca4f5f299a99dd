"""For tests of the portal: the manager's proxy role in memory, and a browser that behaves like one."""

from __future__ import annotations

import hashlib
import html
import itertools
import re
import secrets
from html.parser import HTMLParser

from dispatcher.config.load import DEMO, parse
from dispatcher.plugin.errors import (
    BadRequest,
    Forbidden,
    ManagerUnreachable,
    NotFound,
    TooManyRequests,
    Unavailable,
)
from dispatcher.proxy.portal.app import create_app

HTML = "text/html,application/xhtml+xml,application/xml;q=0.9,*/*;q=0.8"


def digest(token):
    return hashlib.sha256(token.encode()).hexdigest()


def agent(name, state="running", **more):
    user, _, app = name.partition(":")
    return {
        "name": name, "user": user, "app": app or "demo", "provider": "subprocess", "state": state,
        "desired": "running", "stage": "", "detail": "", "fraction": None, "since": "2026-01-01T10:00:00+00:00",
        "failure": None, "outdated": False, "last_used": None, "created": "2026-01-01T09:00:00+00:00",
        "reachable": True, "observed_at": "2026-01-01T10:00:00+00:00", "disk": None, "move": None,
    } | more  # fmt: skip


class Manager:
    """Stands for `dispatcher.client.manager_client.ManagerClient`; `users` maps names to passwords, `agents` names to AGENT."""

    def __init__(self, **users):
        self.users = users or {"alice": "correct horse", "bob": "battery staple"}
        self.agents = {name: agent(name) for name in self.users}
        self.rows = {}
        self.codes = {}
        self.tokens = []
        self.devices = {}
        self.calls = []
        self.down = False
        self.changes_passwords = True
        self.passwords, self.sites = True, []
        self.begun, self.site_down, self.sign_out_url = {}, False, None
        self.slowed = None
        self.counter = itertools.count()

    def _called(self, name, *values):
        self.calls.append((name, *values))
        if self.down:
            raise ManagerUnreachable("The manager does not answer", fix="wait a moment")

    def _begin(self, user, **more):
        token = secrets.token_urlsafe(32)
        row = {
            "sha256": digest(token), "user": user, "agent": user, "agents": [user], "ttl": 86400.0, "lifetime": 604800.0,
            "created": "2026-01-01T10:00:00+00:00",
        } | more  # fmt: skip
        row["agents"] = [name for name, each in self.agents.items() if each["user"] == user]
        self.rows[row["sha256"]] = row
        return token, row

    def _row(self, sha256):
        if sha256 not in self.rows:
            raise NotFound("There is no such session")
        return self.rows[sha256]

    def login(self, user, password, address, user_agent=None, device=None):
        self._called("login", user, address, user_agent, device)
        if self.slowed is not None:
            raise TooManyRequests("Too many attempts", fix="wait", retry_after=self.slowed)
        if not user or "\0" in user:
            raise BadRequest("Bad name")
        if self.users.get(user) != password:
            raise Forbidden("Wrong name or password")
        token, row = self._begin(user, user_agent=user_agent, address=address)
        if self.devices.get(device) != user:
            device = secrets.token_urlsafe(32)
            self.devices[device] = user
        return {"token": token, "device": device, "session": row}

    def sign_in_methods(self):
        self._called("sign_in_methods")
        return {"passwords": self.passwords, "sites": self.sites}

    def begin_sign_in(self, authenticator, nonce_sha256, address, next):
        self._called("begin_sign_in", authenticator, nonce_sha256, address, next)
        if authenticator not in [site["name"] for site in self.sites]:
            raise NotFound("There is no such authenticator")
        if self.site_down:
            raise Unavailable("Signing in with Corp is not possible at the moment", retry_after=5)
        state = secrets.token_urlsafe(32)
        self.begun[state] = (authenticator, nonce_sha256, next)
        return {"url": f"https://login.example.org/authorize?state={state}"}

    def finish_sign_in(self, authenticator, parameters, nonce, address, user_agent=None, device=None):
        self._called("finish_sign_in", authenticator, parameters, address)
        name, nonce_sha256, target = self.begun.get(parameters.get("state"), ("", "", "/"))
        if (name, nonce_sha256) != (authenticator, digest(nonce)):
            raise Forbidden("This sign-in is not valid any more", fix="start again")
        del self.begun[parameters["state"]]
        if self.site_down:
            raise Unavailable("Signing in with Corp is not possible at the moment", details={"next": target})
        user = parameters.get("code")
        if user not in self.users:
            raise Forbidden(
                "Corp did not sign you in", why="the user may not sign in here", details={"next": target}
            )
        token, row = self._begin(user, user_agent=user_agent, address=address)
        if self.devices.get(device) != user:
            device = secrets.token_urlsafe(32)
            self.devices[device] = user
        return {"token": token, "device": device, "session": row, "next": target}

    def ended_elsewhere(self, authenticator, token, address):
        self._called("ended_elsewhere", authenticator, token, address)
        if token != "right":
            raise BadRequest("The logout token is not valid")
        return {"revoked": 1}

    def sign_out(self, sha256):
        self._called("sign_out", sha256)
        self.rows.pop(sha256, None)
        return {"url": self.sign_out_url}

    def lookup(self, sha256):
        self._called("lookup", sha256)
        return self._row(sha256)

    def logout(self, sha256, id=None):
        self._called("logout", sha256, id)
        user = self._row(sha256)["user"]
        victim = sha256 if id is None else next((key for key in self.rows if key.startswith(id)), None)
        if victim is None or self.rows[victim]["user"] != user:
            raise NotFound("There is no such session")
        del self.rows[victim]
        return {}

    def my_agents(self, sha256):
        self._called("my_agents", sha256)
        user = self._row(sha256)["user"]
        return {"agents": [each for each in self.agents.values() if each["user"] == user]}

    def _mine(self, sha256, agent):
        row = self._row(sha256)
        if agent not in self.agents or self.agents[agent]["user"] != row["user"]:
            raise NotFound("There is no such agent")
        return row

    def select(self, sha256, agent):
        self._called("select", sha256, agent)
        self._mine(sha256, agent)["agent"] = agent
        return self.rows[sha256]

    def my_state(self, sha256, agent, state):
        self._called("my_state", sha256, agent, state)
        self._mine(sha256, agent)
        self.agents[agent] |= {"state": "stopping" if state == "stopped" else "starting", "failure": None}
        return self.agents[agent]

    def my_sessions(self, sha256):
        self._called("my_sessions", sha256)
        user = self._row(sha256)["user"]
        return {
            "sessions": [
                {
                    "id": row["sha256"][:16], "user": user, "agent": row["agent"], "created": row["created"],
                    "last_used": row["created"], "expires": row["created"], "address": row.get("address", ""),
                    "user_agent": row.get("user_agent", ""),
                }
                for row in self.rows.values() if row["user"] == user
            ],
            "changes_passwords": self.changes_passwords,
            "tokens": [token for token in self.tokens if token["user"] == user],
            "tokens_need_password": self.changes_passwords,
        }  # fmt: skip

    def create_my_token(self, sha256, address, *, password, expires, note):
        self._called("create_my_token", sha256, address, expires, note)
        user = self._row(sha256)["user"]
        if self.changes_passwords and self.users[user] != password:
            raise Forbidden("Wrong name or password", fix="check both and try again")
        token = "dsp_" + secrets.token_urlsafe(32)
        row = {
            "id": digest(token)[:16], "user": user, "service": None, "scopes": ["app"], "note": note or "",
            "created": "2026-01-01T10:00:00+00:00", "last_used": None,
            "expires": None if expires == "never" else "2036-01-01T10:00:00+00:00",
        }  # fmt: skip
        self.tokens.insert(0, row)
        return {"token": token, **row}

    def revoke_my_token(self, sha256, id):
        self._called("revoke_my_token", sha256, id)
        user = self._row(sha256)["user"]
        mine = [token for token in self.tokens if (token["user"], token["id"]) == (user, id)]
        if not mine:
            raise NotFound("There is no such token")
        self.tokens.remove(mine[0])
        return {}

    def change_password(self, sha256, password, new_password, address, *, revoke_tokens=False):
        self._called("change_password", sha256, address, revoke_tokens)
        user = self._row(sha256)["user"]
        if self.users[user] != password:
            raise Forbidden("Wrong password")
        if len(new_password) < 8:
            raise BadRequest("The password is too short", why="it has fewer than 8 characters")
        self.users[user] = new_password
        self.tokens = [token for token in self.tokens if token["user"] != user or not revoke_tokens]
        self.rows = {key: row for key, row in self.rows.items() if row["user"] != user}
        token, row = self._begin(user)
        return {"token": token, "session": row}

    def handover(self, sha256, host, nonce_sha256):
        self._called("handover", sha256, host, nonce_sha256)
        code = secrets.token_urlsafe(16)
        self.codes[code] = (self._row(sha256)["user"], host, nonce_sha256)
        return {"code": code}

    def redeem(self, code, nonce, host):
        self._called("redeem", host)
        user, wanted, nonce_sha256 = self.codes.pop(code, ("", "", ""))
        if not user or wanted != host or nonce_sha256 != digest(nonce):
            raise Forbidden("The sign-in cannot be handed over")
        token, row = self._begin(user, host=host)
        return {"token": token, "session": row}


class _Forms(HTMLParser):
    def __init__(self):
        super().__init__()
        self.forms = []

    def handle_starttag(self, tag, attrs):
        attributes = dict(attrs)
        if tag == "form":
            self.forms.append({"action": attributes["action"], "fields": {}, "buttons": []})
        elif self.forms and tag == "input" and attributes.get("name"):
            self.forms[-1]["fields"][attributes["name"]] = attributes.get("value", "")
        elif self.forms and tag == "button" and attributes.get("name"):
            self.forms[-1]["buttons"].append((attributes["name"], attributes.get("value", "")))


class Page:
    """A response as a person sees it."""

    def __init__(self, response):
        self.response = response
        self.status = response.status_code
        self.headers = response.headers
        self.source = response.get_data(as_text=True)
        self.location = response.headers.get("Location", "")

    @property
    def text(self):
        without_tags = re.sub(r"<(script|style|svg).*?</\1>|<[^>]*>", " ", self.source, flags=re.DOTALL)
        return " ".join(html.unescape(without_tags).split())

    @property
    def json(self):
        return self.response.get_json()

    def form(self, action):
        parser = _Forms()
        parser.feed(self.source)
        return next(form for form in parser.forms if form["action"].endswith(action))


class Browser:
    """Sends what a browser sends, keeps cookies, fills in forms."""

    def __init__(self, app, origin="http://portal.test:8080"):
        self.client = app.test_client()
        self.origin = origin

    def headers(self, method, **more):
        scheme, _, host = self.origin.partition("://")
        fields = {
            "Host": host, "X-Forwarded-Host": host, "X-Forwarded-Proto": scheme, "X-Forwarded-For": "192.0.2.7",
            "Accept": HTML, "User-Agent": "Mozilla/5.0 (X11; Linux x86_64; rv:140.0) Gecko/20100101 Firefox/140.0",
            "Sec-Fetch-Site": "none" if method == "GET" else "same-origin", "Sec-Fetch-Mode": "navigate",
            "Sec-Fetch-Dest": "document", "Sec-Fetch-User": "?1",
        } | ({"Origin": self.origin} if method == "POST" else {})  # fmt: skip
        fields |= {name.replace("_", "-"): value for name, value in more.items()}
        return {name: value for name, value in fields.items() if value is not None}

    def get(self, path, **headers):
        return Page(self.client.get(path, base_url=self.origin, headers=self.headers("GET", **headers)))

    def post(self, path, fields, **headers):
        return Page(
            self.client.post(path, data=fields, base_url=self.origin, headers=self.headers("POST", **headers))
        )

    def submit(self, page, action, fields=(), **headers):
        form = page.form(action)
        return self.post(form["action"], form["fields"] | dict(fields), **headers)

    def sign_in(self, user="alice", password="correct horse", **query):
        page = self.get("/auth/login", **query)
        return self.submit(page, "/login", {"user": user, "password": password})

    def cookie(self, name="dispatcher"):
        found = self.client.get_cookie(name, domain=self.origin.partition("://")[2].partition(":")[0])
        return found.value if found else None

    def set_cookie(self, name, value):
        self.client.set_cookie(name, value, domain=self.origin.partition("://")[2].partition(":")[0])


class Program:
    """Sends what a script sends: JSON, no fetch metadata."""

    def __init__(self, app, origin="http://portal.test:8080"):
        self.client = app.test_client()
        self.origin = origin

    def get(self, path, **headers):
        fields = {"Accept": "application/json"} | {
            name.replace("_", "-"): value for name, value in headers.items()
        }
        return Page(self.client.get(path, base_url=self.origin, headers=fields))

    def post(self, path, body, **headers):
        fields = {"Accept": "application/json"} | {
            name.replace("_", "-"): value for name, value in headers.items()
        }
        return Page(self.client.post(path, json=body, base_url=self.origin, headers=fields))


def make(manager=None, **settings):
    """A portal and its manager."""
    manager = manager or Manager()
    apps = {"demo": {**DEMO, "title": "Notebook"}, "lab": {"subprocess": {"command": ["x"]}}}
    return create_app(parse({"proxy": settings, "apps": apps}), manager), manager
