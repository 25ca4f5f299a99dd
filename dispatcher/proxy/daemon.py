"""The proxy daemon's parent: opens the listeners, drops privileges, keeps workers and portal running.

It serves nothing itself.  SIGTERM and SIGINT drain and stop, a second one stops at once;
SIGHUP reads configuration and certificates again and replaces the workers one by one, without a lost request.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import gc
import importlib
import os
import select
import signal
import socket
import ssl
import stat
from collections.abc import Callable

from dispatcher.common import systemd
from dispatcher.common.log import configure, logger
from dispatcher.common.tls import server_context
from dispatcher.config.host_users import host_accounts
from dispatcher.config.layout import Paths
from dispatcher.config.load import Config, load
from dispatcher.config.schema import ProxyConfig
from dispatcher.plugin.deadline import boottime
from dispatcher.plugin.errors import ConfigError, DispatcherError, Unavailable
from dispatcher.proxy import children, privileges
from dispatcher.proxy.children import PORTAL, WORKER, BackOff, Child
from dispatcher.proxy.edge import worker_process as edge
from dispatcher.proxy.edge.routing.settings import Settings
from dispatcher.proxy.listeners import Listeners, bind_unix
from dispatcher.proxy.portal import app as portal

_READY_PATIENCE = 30.0  # seconds until a new worker must serve
_KILL_GRACE = 10.0  # seconds beyond proxy.drain_timeout until a child that should end is killed
#: Loaded before privileges are dropped, with what is imported above: the proxy's user may have no access to where
#: Python lies (below root's home, say).
_NEEDED = ("uvloop", *(f"encodings.{name}" for name in ("ascii", "idna", "latin_1", "punycode", "unicode_escape")))

_log = logger("proxy")


def run(config: Config) -> int:
    """Run the proxy in the foreground until a signal ends it; return the exit code.

    :raises ConfigError: the configuration is not valid.
    :raises Unavailable: a listener cannot be opened, or privileges cannot be dropped.
    """
    configure(config.proxy.log_level, config.proxy.log_format)
    daemon = Daemon(config)
    daemon.prepare()
    try:
        return daemon.serve()
    finally:
        daemon.clean_up()


def check(config: Config) -> None:
    """Check that a proxy of this process's user could use the configuration; the unit runs this before a reload.

    :raises ConfigError: it could not.
    """
    Settings(config)
    _tls_context(config)


class Daemon:
    """The parent."""

    def __init__(self, config: Config) -> None:
        Settings(config)  # a wrong address or URL shows now, before anything is opened
        self._config = config
        self._paths = Paths.of(config)
        self._listeners = Listeners()
        self._tls: ssl.SSLContext | None = None
        self._portal_sock: socket.socket
        self._access_log: int | None = None
        self._stdout = 1
        self._children: dict[int, Child] = {}
        self._back_off = {WORKER: BackOff(), PORTAL: BackOff()}
        self._generation = 1
        self._stopping = False
        self._reloading = False
        self._wake, self._woken = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)

    def prepare(self) -> None:
        """Do everything that needs privileges, then drop them."""
        proxy = self._config.proxy
        accounts = host_accounts(self._config)
        self._tls = _tls_context(self._config)
        self._listen(proxy)
        try:
            self._stdout = _standard_output()
            self._access_log = _open_access_log(proxy.access_log, self._stdout)
        except Unavailable as error:  # not a reason to serve nobody
            _log.error("the access log cannot be opened, requests are not logged", error=str(error))
        log = self._access_log
        if os.geteuid() == 0 and log not in {None, self._stdout} and _is_file(log):
            os.fchown(log, accounts.proxy_uid, accounts.proxy_gid)
        directory = self._paths.proxy_dir
        try:
            directory.mkdir(mode=0o700, parents=True, exist_ok=True)
            if os.geteuid() == 0:
                os.chown(directory, accounts.proxy_uid, accounts.proxy_gid, follow_symlinks=False)
        except OSError as error:
            raise Unavailable(
                f"Cannot make {directory}", why=error.strerror or str(error), fix="start the manager first"
            ) from error
        wanted = 2 * proxy.connections + privileges.SPARE_DESCRIPTORS
        limit = privileges.raise_descriptor_limit(wanted)
        if limit < wanted:
            most = privileges.most_connections(proxy.connections)
            fix = "raise LimitNOFILE= in the unit, or the shell's `ulimit -n` (dispatcher doctor)"
            _log.info("the limit of open files is low", limit=limit, connections_per_worker=most, fix=fix)
        if accounts.made_up:
            _log.info("there is no proxy user, using a spare id", user=proxy.user, uid=accounts.proxy_uid)
        for module in _NEEDED:
            importlib.import_module(module)
        privileges.drop(accounts)
        self._open_portal()
        if proxy.tls_key is not None and not os.access(proxy.tls_key, os.R_OK):
            _log.warning(
                "a reload will not be able to read the key",
                key=str(proxy.tls_key),
                fix="let the proxy's group read it, or restart after each renewal",
            )
        self._lock = self._paths.proxy_lock.open("w")
        with contextlib.suppress(BlockingIOError):
            fcntl.lockf(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)  # `dispatcher reload` finds this process by it

    def _listen(self, proxy: ProxyConfig) -> None:
        self._listeners.update({"proxy.listen": proxy.listen, "proxy.redirect_listen": proxy.redirect_listen})

    def _open_portal(self) -> None:
        """Bind the portal's private socket, and replace an existing one."""
        path = self._paths.portal_socket
        fresh = path.with_suffix(".new")
        fresh.unlink(missing_ok=True)
        self._portal_sock = bind_unix(str(fresh), 0o600)
        fresh.replace(path)

    def _start_worker(self) -> None:
        config, paths, portal_sock = self._config, self._paths, self._portal_sock
        inherited = edge.Inherited(
            listeners=self._listeners.of("proxy.listen"),
            redirects=self._listeners.of("proxy.redirect_listen"),
            tls=self._tls,
            access_log=self._access_log,
        )

        def body(control: socket.socket) -> None:
            portal_sock.close()
            edge.run(config, paths, inherited, control)

        self._fork(WORKER, body)

    def _start_portal(self) -> None:
        config, portal_sock, unused = self._config, self._portal_sock, self._listeners

        def body(control: socket.socket) -> None:
            unused.close()
            control.close()
            portal.serve(config, portal_sock)

        self._fork(PORTAL, body)

    def _fork(self, kind: str, body: Callable[[socket.socket], None]) -> None:
        child = children.fork(kind, self._generation, body, list(self._children.values()))
        child.control.setblocking(False)
        if kind == WORKER:
            child.deadline = boottime() + _READY_PATIENCE
        self._children[child.pid] = child
        _log.debug("started", kind=kind, pid=child.pid)

    def _of(self, kind: str, *, leaving: bool = False) -> list[Child]:
        return [child for child in self._children.values() if child.kind == kind and child.leaving == leaving]

    def serve(self) -> int:
        """Keep the children running until a signal ends it."""
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGCHLD):
            signal.signal(number, lambda *_: None)
        signal.set_wakeup_fd(self._woken, warn_on_full_buffer=False)
        gc.collect()
        gc.freeze()
        self._fill()
        for address in self._listeners.addresses():
            _log.info("listening", address=address)
        notified = False
        while True:
            self._wait()
            if not notified and any(child.ready for child in self._of(WORKER)):
                systemd.notify("READY=1")
                notified = True
            if self._stopping and not self._of(WORKER) and not self._of(WORKER, leaving=True):
                return 0

    def _fill(self) -> None:
        """Start missing children whose back-off is over."""
        now = boottime()
        if self._stopping:
            return
        if not self._of(PORTAL) and self._back_off[PORTAL].at <= now:
            self._start_portal()
        current = [child for child in self._of(WORKER) if child.generation == self._generation]
        missing = self._config.proxy.workers - len(current)
        if missing > 0 and self._back_off[WORKER].at <= now:
            for _ in range(missing):
                self._start_worker()

    def _wait(self) -> None:
        controls = {
            child.control: child
            for child in self._children.values()
            if child.kind == WORKER and (not child.ready or (child.leaving and child.accepts))
        }
        watched: list[int | socket.socket] = [self._wake, *controls]
        readable, _, _ = select.select(watched, [], [], 0.2 if self._busy() else 5.0)
        for ready in readable:
            if isinstance(ready, socket.socket):
                self._on_message(controls[ready])
        if self._wake in readable:
            with contextlib.suppress(BlockingIOError):
                for number in set(os.read(self._wake, 512)):
                    if number in {signal.SIGTERM, signal.SIGINT}:
                        self._stop()
                    elif number == signal.SIGHUP and not self._stopping:
                        self._reload()
        self._reap()
        self._end_reload()
        self._overdue()
        self._fill()

    def _busy(self) -> bool:
        """Whether work is due without a signal."""
        workers_now = self._of(WORKER)
        return (
            self._stopping
            or len(workers_now) != self._config.proxy.workers
            or not self._of(PORTAL)
            or any(not child.ready for child in workers_now)
            or any(child.leaving for child in self._children.values())
        )

    def _on_message(self, child: Child) -> None:
        try:
            word = child.control.recv(1)
        except OSError:
            word = b""
        child.ready = True
        child.accepts = word == edge.READY
        if not child.accepts:  # or it is ending; waitpid gives the status
            return
        child.deadline = float("inf")
        old = [each for each in self._of(WORKER) if each.generation < child.generation]
        current = [each for each in self._of(WORKER) if each.ready and each.generation == child.generation]
        if len(current) >= self._config.proxy.workers:
            for each in old:
                self._end(each, b"D")
        elif old:
            self._end(old[0], b"D")

    def _end(self, child: Child, order: bytes) -> None:
        child.leaving = True
        child.deadline = boottime() + self._config.proxy.drain_timeout + _KILL_GRACE
        child.order(order)

    def _stop(self) -> None:
        systemd.notify("STOPPING=1")
        if self._stopping:
            _log.info("stopping at once")
            for child in self._children.values():
                child.signal(signal.SIGKILL)
            return
        _log.info("stopping after the requests in progress", at_most=self._config.proxy.drain_timeout)
        self._stopping = True
        self._listeners.close()
        for child in list(self._children.values()):
            if child.kind == WORKER:
                self._end(child, b"S")

    def _reap(self) -> None:
        while True:
            try:
                pid, status = os.waitpid(-1, os.WNOHANG)
            except ChildProcessError:
                return
            if not pid:
                return
            child = self._children.pop(pid, None)
            if child is None:
                continue
            child.control.close()
            if not child.leaving and not self._stopping:
                pause = self._back_off[child.kind].ended(child, status)
                _log.error(
                    f"a {child.kind} {children.ending(status)}, starting another", pid=pid, pause=round(pause, 1)
                )

    def _overdue(self) -> None:
        now = boottime()
        for child in self._children.values():
            if child.deadline <= now:
                _log.error(
                    f"a {child.kind} does not {'end' if child.leaving else 'come up'}, killing it", pid=child.pid
                )
                child.deadline = now + _KILL_GRACE
                child.signal(signal.SIGKILL)
        # The old portal has served the old workers to the end.
        if not self._of(WORKER, leaving=True):
            for child in self._of(PORTAL, leaving=True):
                child.signal(signal.SIGTERM)

    def _reload(self) -> None:
        systemd.notify("RELOADING=1")
        try:
            self._apply(load())
        except DispatcherError as error:
            _log.error("the new configuration is not applied", error=str(error))
            systemd.notify("READY=1")

    def _end_reload(self) -> None:
        """Report the end of a reload: every new connection gets the new configuration and certificate."""
        if self._reloading and not any(
            child.kind == WORKER and child.accepts and child.generation < self._generation
            for child in self._children.values()
        ):
            self._reloading = False
            _log.info("the new configuration is in use", generation=self._generation)
            systemd.notify("READY=1")

    def _apply(self, config: Config) -> None:
        Settings(config)
        if _fixed(config) != _fixed(self._config):
            raise ConfigError(
                "manager.run_dir, manager.state_dir and proxy.user cannot change while the proxy runs",
                fix="restart the proxy",
            )
        context = _tls_context(config)
        self._listen(config.proxy)
        old_log = self._access_log
        try:
            self._access_log = _open_access_log(config.proxy.access_log, self._stdout)
        except DispatcherError as error:
            _log.error("the access log cannot be reopened, the old file stays in use", error=str(error))
        self._tls = context
        self._config = config
        self._generation += 1
        self._reloading = True
        configure(config.proxy.log_level, config.proxy.log_format)
        for child in self._of(PORTAL):
            child.leaving = True
        self._portal_sock.close()
        self._open_portal()
        self._fill()
        if old_log not in {None, self._access_log, self._stdout}:
            os.close(old_log)
        _log.info("read the configuration again, replacing the workers", generation=self._generation)

    def clean_up(self) -> None:
        """Remove all children, sockets and files."""
        for child in self._children.values():
            child.signal(signal.SIGKILL if child.kind == WORKER else signal.SIGTERM)
        for child in self._children.values():
            with contextlib.suppress(ChildProcessError):
                os.waitpid(child.pid, 0)
        for path in (self._paths.portal_socket, self._paths.proxy_lock):
            with contextlib.suppress(OSError):
                path.unlink()
        for address in self._listeners.addresses():
            if address.startswith("unix:"):
                with contextlib.suppress(OSError):
                    os.unlink(address[5:])


def _fixed(config: Config) -> tuple[object, ...]:
    """Return the settings that cannot change while the proxy runs."""
    return config.manager.run_dir.absolute(), config.manager.state_dir.absolute(), config.proxy.user


#: Of an access log: neither opening nor writing waits for the reader of a pipe.
_APPEND = os.O_WRONLY | os.O_APPEND | os.O_NONBLOCK | os.O_NOCTTY | os.O_CLOEXEC
_NOT_OPENED = {
    errno.ELOOP: 'it is a symbolic link, which is not followed; for standard output write "-"',
    errno.ENXIO: "nobody reads this named pipe, or it is a socket",
}


def _open_access_log(target: str, stdout: int) -> int | None:
    """Return the access log's descriptor, None without a log.

    :raises Unavailable: it cannot be opened.
    """
    if target in {"", "-"}:
        return stdout if target else None
    try:
        return os.open(target, _APPEND | os.O_CREAT | os.O_NOFOLLOW, 0o640)
    except OSError as error:
        raise Unavailable(
            f"Cannot open the access log {target}",
            why=_NOT_OPENED.get(error.errno or 0) or error.strerror or str(error),
            fix="see proxy.access_log",
        ) from error


def _is_file(fd: int) -> bool:
    """Whether it is a regular file, rather than a device such as /dev/null, which is everybody's."""
    return stat.S_ISREG(os.fstat(fd).st_mode)


def _standard_output() -> int:
    """Return a descriptor of standard output: of a pipe a second one, as others share its mode."""
    with contextlib.suppress(OSError):
        if stat.S_ISFIFO(os.fstat(1).st_mode):
            return os.open("/proc/self/fd/1", _APPEND)
    return 1


def _tls_context(config: Config) -> ssl.SSLContext | None:
    """Return the context of the proxy's listeners; None without a certificate.

    The key is read before privileges are dropped, and on a reload as the proxy's user: for a reload to work the
    proxy's group must be able to read it.
    """
    proxy = config.proxy
    return server_context(proxy.tls_cert, proxy.tls_key, "proxy") if proxy.tls_cert and proxy.tls_key else None
