"""The manager as a whole: puts the parts together, starts and stops them in order, reloads the configuration."""

from __future__ import annotations

import gc
import socket
import ssl
import threading
from collections.abc import Callable
from pathlib import Path

from dispatcher import __version__
from dispatcher.common import log
from dispatcher.common.contained import bounded, instance
from dispatcher.config.check import tls_faults
from dispatcher.config.host_users import HostAccounts, host_accounts
from dispatcher.config.layout import Paths
from dispatcher.config.load import Config, load
from dispatcher.config.messages import wrong
from dispatcher.config.plugins import Plugins
from dispatcher.config.plugins_used import configured
from dispatcher.manager.agents.agent import AgentView
from dispatcher.manager.agents.composition import Supervisor, restoring
from dispatcher.manager.agents.lifecycle import FeedState
from dispatcher.manager.agents.observers import EventLog
from dispatcher.manager.auth import local
from dispatcher.manager.auth.app_identity import RENEWAL, AppIdentity
from dispatcher.manager.auth.authenticators import Authenticators
from dispatcher.manager.auth.contained_authenticator import ContainedAuthenticator
from dispatcher.manager.auth.directory_sync import DirectorySync
from dispatcher.manager.auth.hashing import Hasher, HashPool
from dispatcher.manager.auth.removals import follow_removals
from dispatcher.manager.auth.sessions import Lifetimes, Sessions
from dispatcher.manager.auth.signin import SignIn
from dispatcher.manager.auth.tokens import FLUSH_INTERVAL, ApiTokens
from dispatcher.manager.auth.web_signin import WebSignIn
from dispatcher.manager.feed.server import Feed
from dispatcher.manager.files.manager_dirs import Lock, make_directories
from dispatcher.manager.files.space import free_space
from dispatcher.manager.metrics import Metrics
from dispatcher.manager.rest import Services, application, certificate, health
from dispatcher.manager.rest.access import Tokens, credentials, may_administer, may_proxy, peers
from dispatcher.manager.rest.listeners import tcp_socket, unix_socket
from dispatcher.manager.rest.server import Server, WsgiApp
from dispatcher.manager.storage.agents import steady_clock
from dispatcher.manager.storage.auth import AuthStore
from dispatcher.manager.storage.database import Database
from dispatcher.manager.storage.tokens import TokenStore
from dispatcher.plugin.deadline import boottime
from dispatcher.plugin.errors import ConfigError, DispatcherError, PluginError

#: Settings that are read at the start only.
FIXED = (
    "manager.listen",
    "manager.state_dir",
    "manager.run_dir",
    "manager.database",
    "manager.admin_group",
    "manager.proxy_group",
    "manager.uid_range",
    "manager.threads",
    "manager.provider_threads",
    "manager.log_format",
    "auth.authenticator",
    "auth.hash_workers",
    "auth.hash_queue",
    "proxy.user",
)

WEB_CALLS, WEB_QUEUE = 32, 96  # calls of other sites at the same time, and places for those that wait
FAULTS = 3.0  # seconds that a reload waits for what the providers say of apps
FREEZE = 2.0  # seconds after the start; most objects stay in memory from then on

_log = log.logger("manager")


class Manager:
    """One manager.

    :param config: the initial one; :param path: its file, read again by `reload`.
    :param plugins: by default those installed.
    """

    def __init__(self, config: Config, path: Path | None = None, plugins: Plugins | None = None) -> None:
        self.config = config
        self.paths = Paths.of(config)
        self.accounts: HostAccounts = host_accounts(config)
        self._config_path = path
        self._plugins = plugins or Plugins()
        self._closers: list[Callable[[], None]] = []
        self._servers: list[Server] = []
        self._reloading = threading.Lock()

    def start(self) -> None:
        """Start the supervisor, then listen.  Returns when the manager answers.

        :raises DispatcherError: it cannot start; everything is stopped again.
        """
        began = boottime()
        try:
            self._start()
        except BaseException:
            self.close()
            raise
        _log.info("the manager is ready", seconds=round(boottime() - began, 3), version=__version__)
        self._report_faults()

    def close(self) -> None:
        """Stop listening, then stop all threads, in reverse order of the start; agents continue to run."""
        closers, self._closers = self._closers, []
        for close in reversed(closers):
            try:
                close()
            except Exception:
                _log.exception("a component could not be closed")

    def _start(self) -> None:
        config = self.config
        make_directories(self.paths, self.accounts)
        for directory in (self.paths.state_dir, self.paths.run_dir):
            self._closers.append(Lock(directory).close)
        database = Database(config.manager.database or f"sqlite:///{self.paths.database}")
        self._closers.append(database.close)
        database.open()
        clock = steady_clock(database)
        metrics = Metrics()
        self._plugins.register("dispatcher-metrics", metrics)
        self._plugins.register("dispatcher-log", EventLog())
        self._plugins.load_all(configured(config))
        for name in config.plugins:
            self._load_observer(name)
        self.supervisor = Supervisor(
            config=config,
            paths=self.paths,
            accounts=self.accounts,
            plugins=self._plugins,
            database=database,
            clock=clock,
        )
        auth_store = AuthStore(database)
        auth_store.pull_back(clock.now())
        self.sessions = Sessions(auth_store, clock, _lifetimes(config), self.supervisor.queries.user_id)
        token_store = TokenStore(database)
        token_store.pull_back(clock.now())
        self.tokens = ApiTokens(token_store, clock, self.supervisor.queries.user_id)
        hasher = Hasher()
        external = config.auth.authenticators != (local.NAME,)
        pool = HashPool(config.auth.hash_workers, config.auth.hash_queue, at_once=external)
        self._closers.append(pool.close)
        self._plugins.register(local.NAME, local.plugin(self.supervisor.store, hasher))
        authenticators = Authenticators([self._authenticator(name) for name in config.auth.authenticators])
        self._closers.extend(entry.close for entry in authenticators)
        signin = SignIn(
            authenticators=authenticators,
            supervisor=self.supervisor,
            sessions=self.sessions,
            store=auth_store,
            pool=pool,
            hasher=hasher,
            clock=clock,
            metrics=metrics,
        )
        # Calls of other sites wait for the network, and must not delay checks of passwords.
        web_pool = HashPool(WEB_CALLS, WEB_QUEUE, at_once=True)
        self._closers.append(web_pool.close)
        web_signin = WebSignIn(
            signin=signin,
            supervisor=self.supervisor,
            sessions=self.sessions,
            store=auth_store,
            pool=web_pool,
            clock=clock,
            metrics=metrics,
            base=self._portal_url,
        )
        self.identity = AppIdentity(self.paths.secrets_dir, self._portal_url)
        sync = DirectorySync(
            authenticators=authenticators,
            supervisor=self.supervisor,
            clock=clock,
            interval=lambda: self.config.auth.sync_interval,
            keep=lambda: self.config.auth.keep_departed,
            sign_out=self._sign_out,
        )
        self._closers.append(self.supervisor.close)
        self.supervisor.start()
        self._closers.append(sync.close)
        sync.start()
        self.supervisor.every(1.0, signin.check_overdue)
        self.supervisor.every(1.0, web_signin.check_overdue)
        self.sessions.load()
        self._closers.append(self.sessions.close)
        self.sessions.start()
        self.tokens.load()
        self.supervisor.access.on_change = self.tokens.republish
        self._closers.append(self.tokens.flush)
        self.supervisor.every(FLUSH_INTERVAL, self.tokens.maintain)
        # All sockets are made before any is served: one that cannot be made fails the start.
        self.feed = Feed(
            self._unix(self.paths.feed_socket, self.accounts.proxy_gid),
            supervisor=self.supervisor,
            sessions=self.sessions,
            tokens=self.tokens,
            allowed=lambda uid, gid: may_proxy(self.accounts, uid, gid),
            statement=self._statement,
        )
        self.supervisor.registry.wait_for_edge = self.feed.synchronize
        self.supervisor.every(RENEWAL / 4, self._renew_statements)
        self.services = Services(
            config=config,
            database=database,
            supervisor=self.supervisor,
            sessions=self.sessions,
            tokens=self.tokens,
            signin=signin,
            web_signin=web_signin,
            sync=sync,
            identity=self.identity,
            plugins=self._plugins,
            clock=clock,
            metrics=metrics,
            reload=self.reload,
            feed_connections=self.feed.connections,
            sync_edge=self.feed.synchronize,
            waiting=threading.BoundedSemaphore(max(1, config.manager.threads // 2)),
        )
        metrics.watch(
            agents=self.supervisor.queries.views,
            gauges={
                "sessions": ("Active sessions", self.sessions.count),
                "api_tokens": ("Valid API tokens", self.tokens.count),
                "feed_connections": ("Connected edge workers", self.feed.connections),
                "state_disk_free_bytes": (
                    "Free space on the disk of manager.state_dir",
                    lambda: free_space(self.paths.state_dir),
                ),
                "hash_queue": ("Running and waiting password checks", lambda: pool.present),
            },
            workers=self.feed.counters,
            observers=lambda: self.supervisor.observers.states,
        )
        self.supervisor.registry.on_removal(lambda agent, _user: self.identity.forget(agent))
        follow_removals(self.supervisor, self.sessions, self.tokens, self.feed.synchronize)
        self._listen()
        pool.background(hasher.warm)
        freezing = threading.Timer(FREEZE, _freeze_heap)
        freezing.daemon = True
        self._closers.append(freezing.cancel)
        freezing.start()

    def _sign_out(self, user: str) -> None:
        """End all that gives a user access."""
        self.sessions.revoke_user(user)
        self.tokens.revoke_user(user)
        self.feed.synchronize()

    def _load_observer(self, name: str) -> None:
        """Load a plugin of `plugins`; without one that is at fault the manager runs all the same."""
        try:
            self._plugins.load(name)
        except PluginError as error:
            if name not in self._plugins.available():
                raise
            _log.error("a plugin is left out", plugin=name, why=str(error))

    def _authenticator(self, name: str) -> ContainedAuthenticator:
        """Return an authenticator; nobody can sign in with one that is at fault, but agents and sessions remain.

        :param name: an entry of ``auth.authenticator``.
        :raises ConfigError: there is none of that name, or its options are invalid.
        """
        plugin = name.partition(".")[0]
        try:
            cls, options = (
                self._plugins.authenticator(plugin),
                self.config.authenticator_options(name, self._plugins),
            )
            ref = self._plugins.ref("authenticator", name)
            with self._plugins.guarded([plugin]):
                made = bounded(ref, "__init__", lambda: instance(cls, options=options))
            return ContainedAuthenticator(ref, made)
        except DispatcherError as error:
            unknown = plugin not in {local.NAME, *self._plugins.available()}
            if unknown or (isinstance(error, ConfigError) and not isinstance(error, PluginError)):
                raise
            _log.error("nobody can sign in", authenticator=name, why=str(error))
            return ContainedAuthenticator(self._plugins.ref("authenticator", name), None, error)

    def _statement(self, view: AgentView) -> str | None:
        """Return what an app's requests say of the user, None for an app that does not want to know."""
        app = self.config.apps.get(view.app)
        if app is None or not app.identity or view.feed_state is not FeedState.RUNNING:
            return None
        try:
            return self.identity.statement(
                user=view.user,
                groups=self.supervisor.access.groups(view.user),
                app=view.app,
                agent=view.name,
            )
        except DispatcherError as error:
            _log.error("an app gets no statement about its user", agent=view.name, why=str(error))
            return None

    def _renew_statements(self) -> None:
        """Let the edge have statements that are valid for some time."""
        wanted = {name for name, app in self.config.apps.items() if app.identity}
        for view in self.supervisor.queries.views() if wanted else ():
            if view.app in wanted and view.feed_state is FeedState.RUNNING:
                self._statement(view)  # it takes its time here, not in the feed's thread
                self.feed.agent_changed(view.name)

    def _portal_url(self) -> str:
        proxy = self.config.proxy
        return proxy.public_url and proxy.public_url + proxy.prefix

    def _listen(self) -> None:
        threads = self.config.manager.threads
        logins = self.config.auth.hash_workers + self.config.auth.hash_queue
        admin = peers(lambda uid, gid: may_administer(self.accounts, uid, gid))
        proxy = peers(lambda uid, gid: may_proxy(self.accounts, uid, gid))
        wanted: list[tuple[socket.socket, WsgiApp, int, ssl.SSLContext | None]] = [
            (
                self._unix(self.paths.manager_socket, self.accounts.admin_gid),
                application("admin", self.services, admin),
                threads,
                None,
            ),
            (
                self._unix(self.paths.proxy_socket, self.accounts.proxy_gid),
                application("proxy", self.services, proxy),
                threads + logins + WEB_CALLS,  # requests that wait for a sign-in must not take the last thread
                None,
            ),
        ]
        self._tokens = Tokens(self.config.manager.token_file)
        if self.config.manager.listen:
            context, fingerprint = certificate.server_context(self.config.manager, self.paths.secrets_dir)
            remote = credentials(self._tokens, self.tokens, lambda: str(health.report(self.services)["status"]))
            guarded = application("admin", self.services, remote)
            for address in self.config.manager.listen:
                sock = tcp_socket(address, self.config.manager.listen)
                self._closers.append(sock.close)
                wanted.append((sock, guarded, threads, context))
                _log.info("listening with TLS", address=_shown(sock), fingerprint=fingerprint)
            usable = any(row.scopes != ("app",) for row in self.tokens.all())
            if not (usable or self.config.manager.client_ca or self.config.manager.token_file):
                _log.warning(
                    "no client can use manager.listen yet",
                    fix="create an API token (dispatcher tokens create), or set manager.token_file or "
                    "manager.client_ca",
                )
        self._closers.append(self.feed.close)
        self.feed.start()
        self._closers.append(self._close_servers)
        for sock, app, most, encryption in wanted:
            server = Server(sock, app, most, encryption)
            server.start()
            self._servers.append(server)
        _log.info("listening", manager=str(self.paths.manager_socket), proxy=str(self.paths.proxy_socket))

    def _close_servers(self) -> None:
        """Close all listeners at the same time."""
        self.services.closing.set()
        closing = [threading.Thread(target=server.close) for server in self._servers]
        for thread in closing:
            thread.start()
        for thread in closing:
            thread.join()
        self._servers.clear()

    def _unix(self, path: Path, gid: int | None) -> socket.socket:
        sock = unix_socket(path, gid)

        def remove() -> None:
            sock.close()
            path.unlink(missing_ok=True)

        self._closers.append(remove)
        return sock

    @property
    def addresses(self) -> list[str]:
        """The addresses served with TLS, as ``HOST:PORT``."""
        return [_shown(server.socket) for server in self._servers if server.context]

    def _report_faults(self, wait: float = 0.0) -> list[str]:
        """Log which apps could never start; return the reasons found within `wait` seconds."""
        found: list[str] = []

        def report() -> None:
            for app, reasons in self.supervisor.queries.app_faults().items():
                _log.warning("no agent of this app can start", app=app, why="; ".join(reasons))
                found.extend(reasons)

        thread = threading.Thread(target=report, name="app-faults", daemon=True)
        thread.start()
        thread.join(wait)
        return list(found)

    # --- reload

    def reload(self) -> tuple[list[str], list[str]]:
        """Read the configuration again and apply what can change; return in sentences what did, and what is wrong.

        Wrong is why no agent of some app can start, as far as the providers tell it soon.

        :raises DispatcherError: it is invalid or cannot be applied; the earlier one is in use.
        """
        with self._reloading:
            try:
                changed = self._reload(load(self._config_path))
            except DispatcherError:
                raise
            except Exception as error:
                _log.exception("a reload failed")
                raise DispatcherError(
                    "The new configuration is not applied",
                    why=f"{type(error).__name__}: {error}",
                    fix="the earlier one is in use; the manager's log has the details",
                ) from error
        return changed, self._report_faults(FAULTS)

    def _reload(self, new: Config) -> list[str]:
        old = self.config
        context: ssl.SSLContext | None = None
        fingerprint = ""
        if old.manager.listen:
            context, fingerprint = certificate.server_context(new.manager, self.paths.secrets_dir)
        if unusable := list(tls_faults(new)):
            raise wrong(unusable, self._config_path)
        tokens = Tokens(new.manager.token_file)
        changed = self.supervisor.apply_config(new)
        try:
            self._adopt(new)
        except Exception:
            with restoring():
                self.supervisor.apply_config(old)
                self._adopt(old)
            raise
        self._tokens.adopt(tokens)
        if _lifetimes(old) != _lifetimes(new):
            changed.append("Sessions have new lifetimes (auth.session_lifetime, auth.session_idle).")
        if old.manager.log_level != new.manager.log_level:
            changed.append(f"The log level is {new.manager.log_level}.")
        for server in self._servers:
            if server.context is not None and context is not None:
                server.context = context
        if context is not None:
            changed.append(f"TLS connections use the certificate {fingerprint}.")
        changed += [
            f"{setting} has changed and takes effect after a restart."
            for setting in FIXED
            if _setting(old, setting) != _setting(new, setting)
        ]
        if old.plugins != new.plugins or old.auth.model_extra != new.auth.model_extra:
            changed.append("plugins and the tables below auth take effect after a restart.")
        _log.info("read the configuration again", changed=changed)
        return changed

    def _adopt(self, config: Config) -> None:
        """Use what is the manager's own of a configuration."""
        self.sessions.set_lifetimes(_lifetimes(config))
        self.tokens.republish()  # groups may be others
        log.set_level(config.manager.log_level)
        self.config = self.services.config = config


def _freeze_heap() -> None:
    """Exclude present objects from garbage collection: most of them stay, and traversing them takes time."""
    gc.collect()
    gc.freeze()
    gc.enable()


def _lifetimes(config: Config) -> Lifetimes:
    return Lifetimes(lifetime=config.auth.session_lifetime, idle=config.auth.session_idle)


def _setting(config: Config, name: str) -> object:
    table, _, key = name.partition(".")
    return getattr(getattr(config, table), key)


def _shown(sock: socket.socket) -> str:
    host, port = sock.getsockname()[:2]
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
