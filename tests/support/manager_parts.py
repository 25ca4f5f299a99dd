"""The manager's outside on a fake supervisor and a real database, without sockets.  For unit tests."""

from __future__ import annotations

import threading
from pathlib import Path

import flask
from pydantic import TypeAdapter

from dispatcher.common.contained import PluginRef
from dispatcher.config.load import parse
from dispatcher.config.plugins import Plugins
from dispatcher.manager.storage import agents  # noqa: F401 - declares its tables
from dispatcher.manager.rest import Services
from dispatcher.manager.rest import application
from dispatcher.manager.rest.application import ROLES
from dispatcher.manager.storage.auth import AuthStore
from dispatcher.manager.storage.database import Database
from dispatcher.manager.storage.tokens import TokenStore
from dispatcher.manager.auth.authenticators import Authenticators
from dispatcher.manager.auth.contained_authenticator import ContainedAuthenticator
from dispatcher.manager.auth.app_identity import AppIdentity
from dispatcher.manager.auth.directory_sync import DirectorySync
from dispatcher.manager.auth.local import plugin
from dispatcher.manager.metrics import Metrics
from dispatcher.manager.auth.removals import follow_removals
from dispatcher.manager.auth.hashing import Hasher, HashPool
from dispatcher.manager.auth.sessions import Lifetimes, Sessions
from dispatcher.manager.auth.signin import SignIn
from dispatcher.manager.auth.web_signin import WebSignIn
from dispatcher.manager.auth.tokens import ApiTokens
from tests.support.fake_supervisor import FakeSupervisor


def described(role, services, *admit):
    """Return a role's application; an answer that is not as `/openapi.json` says is an error."""
    app = application(role, services, *admit)
    routes = {(route.method, route.path): route for route in ROLES[role]}

    @app.after_request
    def check(response):
        if response.status_code < 400 and flask.request.method != "HEAD":
            answer = routes[flask.request.method, flask.request.url_rule.rule].answers[response.status_code]
            if answer not in {None, str}:
                form = TypeAdapter(answer)
                assert form.dump_python(form.validate_json(response.data), mode="json") == response.json
            else:
                assert (response.data == b"") == (answer is None)
        return response

    return app


class Clock:
    """A steady clock that a test moves."""

    def __init__(self, now=1_800_000_000.0):
        self.time = now

    def now(self):
        return self.time


class Parts:
    """Everything below HTTP's sockets, with clients of both roles."""

    def __init__(
        self, directory, *, config=None, lifetimes=None, settle=True, queue=64, authenticator=None, others=()
    ):
        self.directory = directory
        self.clock = Clock()
        self.database = Database(f"sqlite:///{directory}/dispatcher.db")
        self.database.open()
        self.supervisor = FakeSupervisor(self.clock, settle=settle)
        self.metrics = Metrics()
        self.store = AuthStore(self.database)
        self.hasher = Hasher(memory=64, passes=1)
        self.pool = HashPool(2, queue)
        self.lifetimes = lifetimes or Lifetimes(lifetime=7 * 86400.0, idle=86400.0)
        self.sessions = Sessions(self.store, self.clock, self.lifetimes, self.supervisor.user_id)
        if authenticator is None:
            cls = plugin(self.supervisor.store, self.hasher).dispatcher_register_authenticators()[0]
            authenticator = cls(options=cls.Options())
        if not isinstance(authenticator, ContainedAuthenticator):
            ref = PluginRef("authenticator", authenticator.name, "acme 1")
            authenticator = ContainedAuthenticator(ref, authenticator)
        self.authenticator = authenticator
        self.others = [
            ContainedAuthenticator(PluginRef("authenticator", each.name, "acme 1"), each) for each in others
        ]
        self.edge_waits = []
        self.tokens = ApiTokens(TokenStore(self.database), self.clock, self.supervisor.user_id)
        follow_removals(self.supervisor, self.sessions, self.tokens, lambda: self.edge_waits.append(1))
        self.reloads = []
        signin = self.new_signin()
        self.web_pool = HashPool(8, 8, at_once=True)
        self.web_signin = WebSignIn(
            signin=signin,
            supervisor=self.supervisor,
            sessions=self.sessions,
            store=self.store,
            pool=self.web_pool,
            clock=self.clock,
            metrics=self.metrics,
            base=lambda: "https://apps.example.org/auth",
        )
        self.keep_departed = False
        self.services = Services(
            config=parse(config or {}),
            database=self.database,
            supervisor=self.supervisor,
            sessions=self.sessions,
            tokens=self.tokens,
            signin=signin,
            web_signin=self.web_signin,
            identity=AppIdentity(Path(directory), lambda: "https://apps.example.org/auth"),
            sync=DirectorySync(
                authenticators=Authenticators([self.authenticator, *self.others]),
                supervisor=self.supervisor,
                clock=self.clock,
                interval=lambda: False,
                keep=lambda: self.keep_departed,
                sign_out=self.sessions.revoke_user,
            ),
            plugins=Plugins([]),
            clock=self.clock,
            metrics=self.metrics,
            reload=lambda: self.reloads.append(1) or (["The log level is debug."], []),
            feed_connections=lambda: 0,
            waiting=threading.BoundedSemaphore(2),
            sync_edge=lambda: self.edge_waits.append(1),
        )
        self.metrics.watch(
            agents=self.supervisor.views,
            gauges={"sessions": ("Sessions", self.sessions.count)},
            workers=lambda: {"7": {"requests": 3.0}},
        )
        self.admin = described("admin", self.services).test_client()
        self.proxy = described("proxy", self.services).test_client()

    def new_signin(self):
        """A sign-in service as after a restart: it knows what was stored."""
        return SignIn(
            authenticators=Authenticators([self.authenticator, *self.others]),
            supervisor=self.supervisor,
            sessions=self.sessions,
            store=self.store,
            pool=self.pool,
            hasher=self.hasher,
            clock=self.clock,
            metrics=self.metrics,
        )

    def add(self, name, password="correct horse", app=None):
        body = {"name": name, "app": app} if app else {"name": name}
        return self.admin.post("/agents", json=body | ({"password": password} if password else {}))

    def login(self, name="alice", password="correct horse", address="192.0.2.1", **more):
        return self.proxy.post("/sessions", json={"user": name, "password": password, "address": address, **more})

    def post(self, path, **body):
        return self.proxy.post(path, json=body)

    def close(self):
        self.pool.close()
        self.web_pool.close()
        self.database.close()
