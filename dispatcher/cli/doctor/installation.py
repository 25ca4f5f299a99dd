"""Checks of `doctor` on the installation: manager, directories, disk, ports, certificates, accounts."""

from __future__ import annotations

import errno
import os
import pwd
import re
import shutil
import socket
import ssl
import stat
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import urlsplit

from dispatcher.cli.serve import listen_endpoint
from dispatcher.client.trust import is_loopback
from dispatcher.common import humanize
from dispatcher.common.bind import low_port_fix
from dispatcher.config import default_paths
from dispatcher.config.host_users import host_accounts, subordinate_ids
from dispatcher.plugin.errors import DispatcherError, ManagerUnreachable
from dispatcher.plugin.model import Finding

if TYPE_CHECKING:
    from dispatcher.client.manager_client import ManagerClient
    from dispatcher.config.layout import Paths
    from dispatcher.config.load import Config

LOW_DISK, VERY_LOW_DISK = 2 * 1024**3, 200 * 1024**2  # bytes
_DATABASE_PASSWORD = re.compile(
    rb"(?m)^[^#\n]*\bdatabase\b[\"' \t]*=.*://(?:[^\s/@:\"']*:[^\s/@\"']+@|\S*[?&]password=)"
)
SOON = 30 * 86400  # seconds until a certificate expires


def manager(client: ManagerClient, url: str) -> tuple[bool, list[Finding]]:
    """Return whether the manager answers, and the findings about it."""
    try:
        health = client.healthz()
    except ManagerUnreachable as problem:
        return False, [Finding.info(f"no manager answers at {url}: {problem.why}", problem.fix)]
    except DispatcherError as problem:
        return True, [Finding.error(f"the manager answers with an error: {problem}", "see its log")]
    status = str(health.get("status", "ok"))
    found = [
        Finding.ok(f"the manager answers at {url}")
        if status == "ok"
        else Finding.warning(
            f"the manager answers; its status is {status}", f"read /healthz at {url}, and its log"
        )
    ]
    if health.get("configuration_changed"):
        found.append(
            Finding.warning(
                "the configuration has changed since the manager read it",
                "dispatcher config check && dispatcher reload",
            )
        )
    return True, found


def config_file(path: Path) -> Iterator[Finding]:
    """Check who may write the configuration: it determines what agents run."""
    try:
        status = path.stat()
    except OSError:
        yield Finding.info(f"{path} does not exist: the demo app and the defaults are in force", f"write {path}")
        return
    if status.st_mode & (stat.S_IWGRP | stat.S_IWOTH) or status.st_uid not in {0, os.geteuid()}:
        yield Finding.error(f"{path} is writable for other users", f"chown root {path}; chmod go-w {path}")
    elif fault := _replaceable(path.parent):
        yield Finding.error(
            f"{path} can be replaced by other users: {fault}", f"chmod o-w {path.parent}, and own it"
        )
    elif (readers := _others(status)) and _DATABASE_PASSWORD.search(path.read_bytes()):
        yield Finding.error(
            f"{path} holds the password of the database, and is readable for {readers}",
            "move the password to a file that only the manager's user can read, and name that in the URL: "
            "?passfile=FILE (see libpq); the proxy must read the configuration, and needs no password",
        )
    else:
        yield Finding.ok(f"the configuration is {path}")


def _replaceable(directory: Path) -> str:
    """Return why others can replace the files of a directory, "" if they cannot."""
    status = directory.stat()
    if status.st_uid not in {0, os.geteuid()}:
        return f"{directory} belongs to user id {status.st_uid}"
    everybody = status.st_mode & stat.S_IWOTH and not status.st_mode & stat.S_ISVTX
    return f"{directory} is writable for all users" if everybody else ""


def _others(status: os.stat_result) -> str:
    """Return who besides the owner and root's group can read a file, "" if nobody can."""
    if status.st_mode & stat.S_IROTH:
        return "all users"
    return "a group" if os.geteuid() == 0 and status.st_mode & stat.S_IRGRP and status.st_gid != 0 else ""


def directories(paths: Paths) -> Iterator[Finding]:
    """Check owner and mode of the state and run directories, and the disk below them."""
    for path, name in ((paths.state_dir, "state"), (paths.run_dir, "run")):
        try:
            status = path.stat()
        except FileNotFoundError:
            yield from _can_be_made(path, name)
            continue
        except OSError as problem:
            yield Finding.error(f"the {name} directory {path}: {problem.strerror}", "see its parents' modes")
            continue
        if path.is_symlink():
            yield Finding.error(
                f"the {name} directory {path} is a symbolic link, which the manager does not follow",
                f"name {path.resolve()} in manager.{name}_dir, or mount it there",
            )
        elif not stat.S_ISDIR(status.st_mode):
            yield Finding.error(f"{path} is not a directory", f"move it away, or change manager.{name}_dir")
        elif status.st_uid != os.geteuid():
            yield Finding.warning(
                f"the {name} directory {path} belongs to user id {status.st_uid}, you are {os.geteuid()}",
                "run `dispatcher doctor` as the manager's user",
            )
        elif status.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
            yield Finding.error(f"the {name} directory {path} is writable for other users", f"chmod go-w {path}")
        else:
            yield Finding.ok(f"the {name} directory is {path}")
    yield from _until_logout(paths.run_dir)
    yield from disk(paths.state_dir)


def _until_logout(run_dir: Path, linger: Path = Path("/var/lib/systemd/linger")) -> Iterator[Finding]:
    """Check that the run directory stays when the user signs out (logind removes /run/user/UID)."""
    if os.geteuid() == 0:
        return
    try:
        user = pwd.getpwuid(os.geteuid()).pw_name
    except KeyError:  # of a container, or taken for this program: nobody signs in or out
        return
    if run_dir.is_relative_to("/run/user") and not (linger / user).exists():
        yield Finding.warning(
            f"the run directory {run_dir} is removed when you sign out: manager and agents become unreachable",
            f"loginctl enable-linger {user}, or set manager.run_dir",
        )
    elif run_dir == default_paths.run_dir() and run_dir.parent.name == f"dispatcher-{os.geteuid()}":
        yield Finding.info(
            f"$XDG_RUNTIME_DIR is not set: the run directory is {run_dir}, and clients need the same environment",
            "set manager.run_dir to a short path of your own",
        )


def _can_be_made(path: Path, name: str) -> Iterator[Finding]:
    parent = _existing(path)
    if os.access(parent, os.W_OK | os.X_OK):
        yield Finding.ok(f"the {name} directory {path} will be created")
    else:
        yield Finding.error(
            f"the {name} directory {path} cannot be created", f"make {parent} writable for the manager"
        )


def disk(path: Path) -> Iterator[Finding]:
    """Check the space left for agents' data."""
    parent = _existing(path)
    free = shutil.disk_usage(parent).free
    if free < VERY_LOW_DISK:
        yield Finding.error(f"only {humanize.size(free)} free at {parent}", "free some space: agents cannot write")
    elif free < LOW_DISK:
        yield Finding.warning(f"only {humanize.size(free)} free at {parent}", "free some space")
    else:
        yield Finding.ok(f"{humanize.size(free)} free at {parent}")


def _existing(path: Path) -> Path:
    return next(parent for parent in (path, *path.parents) if os.path.exists(parent))


def ports(config: Config, *, serving: bool) -> Iterator[Finding]:
    """Check that the listeners can be opened, or (`serving`) are open."""
    addresses = [*config.proxy.listen, *config.proxy.redirect_listen]
    for address in addresses:
        endpoint = listen_endpoint(address)
        if endpoint is None or endpoint.kind != "tcp":
            continue
        family = socket.AF_INET6 if ":" in endpoint.host else socket.AF_INET
        with socket.socket(family) as sock:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                sock.bind((endpoint.host, endpoint.port))
            except OSError as problem:
                yield from _bind_problem(address, problem, serving)
            else:
                yield Finding.ok(f"{address} is free")


def _bind_problem(address: str, problem: OSError, serving: bool) -> Iterator[Finding]:
    if problem.errno == errno.EADDRINUSE and serving:
        yield Finding.ok(f"{address} is in use, probably by the proxy")
    elif problem.errno == errno.EADDRINUSE:
        yield Finding.error(f"{address} is in use", "stop what listens there (ss -ltnp), or change proxy.listen")
    elif problem.errno == errno.EACCES:
        yield Finding.error(f"you may not listen on {address}", low_port_fix(int(address.rpartition(":")[2])))
    elif problem.errno == errno.EADDRNOTAVAIL:
        yield Finding.warning(
            f"this host does not have the address of {address}: the proxy cannot be reached there",
            "give this host the address, or change proxy.listen",
        )
    else:
        yield Finding.error(f"cannot listen on {address}: {problem.strerror}", "change proxy.listen")


def encryption(config: Config) -> Iterator[Finding]:
    """Check that passwords do not cross a network unencrypted, and who may say where a client is."""
    if any(network.endswith("/0") for network in config.proxy.trusted_proxies):
        yield Finding.warning(
            "proxy.trusted_proxies contains every address: clients can claim any address, and evade limits",
            "name the front proxy's address alone",
        )
    if config.secure:
        return
    host = urlsplit(config.proxy.public_url).hostname if config.proxy.public_url else None
    if host is not None and not is_loopback(host):
        yield Finding.warning(
            f"proxy.public_url is {config.proxy.public_url}: passwords cross the network unencrypted",
            "serve https, by proxy.tls_cert or a front proxy, and write https:// there",
        )
        return
    for address in config.proxy.listen:
        endpoint = listen_endpoint(address)
        wide = (
            endpoint is not None
            and endpoint.kind == "tcp"
            and not address.startswith(("127.", "[::1]", "localhost"))
        )
        if wide and not config.proxy.trusted_proxies:
            yield Finding.warning(
                f"{address} is reachable from other hosts without HTTPS: passwords cross the network unencrypted",
                "set proxy.tls_cert and proxy.tls_key, or use a front proxy and set proxy.public_url",
            )


def certificates(config: Config) -> Iterator[Finding]:
    """Check that each configured certificate can be read and when it expires, and that no key is everybody's."""
    named = {
        "proxy.tls_cert": config.proxy.tls_cert,
        "manager.tls_cert": config.manager.tls_cert,
        "manager.client_ca": config.manager.client_ca,
    }
    for key, path in named.items():
        if path is not None:
            yield from certificate(key, path)
    for key, path in {"proxy.tls_key": config.proxy.tls_key, "manager.tls_key": config.manager.tls_key}.items():
        if path is not None and _readable_by_all(path):
            yield Finding.error(f"{key}: every user of this host can read {path}", f"chmod o-r {path}")


def _readable_by_all(path: Path) -> bool:
    """Whether a file's mode lets all users read it; its directory may still be closed to them."""
    try:
        return bool(path.stat().st_mode & stat.S_IROTH)
    except OSError:
        return False


def certificate(key: str, path: Path) -> Iterator[Finding]:
    """Check one certificate."""
    from cryptography import x509

    try:
        found = x509.load_pem_x509_certificate(path.read_bytes())
    except OSError as problem:
        yield Finding.error(f"{key}: {path}: {problem.strerror}", "check the path and its mode")
        return
    except ValueError:
        yield Finding.error(f"{key}: {path} is not a PEM certificate", "check the file")
        return
    end = found.not_valid_after_utc.timestamp()
    left = end - time.time()
    day = time.strftime("%Y-%m-%d", time.gmtime(end))
    if left < 0:
        yield Finding.error(f"{key}: {path} expired on {day}", "renew it, then: dispatcher reload")
    elif left < SOON:
        yield Finding.warning(f"{key}: {path} expires on {day}", "renew it, then: dispatcher reload")
    else:
        yield Finding.ok(f"{key}: {path} is valid until {day}")


def served_certificate(config: Config) -> Iterator[Finding]:
    """Check that the running proxy serves the certificate that is on the disk: a reload may have failed."""
    from cryptography import x509

    path = config.proxy.tls_cert
    if path is None or config.proxy.proxy_protocol:
        return
    for address in config.proxy.listen:
        endpoint = listen_endpoint(address)
        if endpoint is None or endpoint.kind != "tcp":
            continue
        try:
            served = ssl.get_server_certificate((endpoint.host, endpoint.port), timeout=3).encode()
            own, used = (x509.load_pem_x509_certificate(pem) for pem in (path.read_bytes(), served))
        except (OSError, ValueError):
            continue  # other checks report these
        if used != own:
            yield Finding.error(
                f"{address} serves another certificate than {path}",
                "dispatcher reload; if that does not help, read the proxy's log",
            )
        return


def renewal_faults(config: Config) -> Iterator[str]:
    """Yield which files of the certificate the proxy's user cannot read, so that a reload keeps the old one."""
    if os.geteuid() != 0:
        return
    accounts = host_accounts(config)
    groups = {accounts.proxy_gid}
    if not accounts.made_up:
        groups |= set(os.getgrouplist(config.proxy.user, accounts.proxy_gid))
    for key in ("tls_cert", "tls_key"):
        path: Path | None = getattr(config.proxy, key)
        if path is None or not path.exists():
            continue
        readable = subprocess.run(
            ["/usr/bin/test", "-r", path.absolute()],
            user=accounts.proxy_uid,
            group=accounts.proxy_gid,
            extra_groups=sorted(groups),
            cwd="/",
            check=False,
        )
        if readable.returncode:
            yield (
                f"proxy.{key}: {config.proxy.user} cannot read {path}, so a reload keeps the old certificate "
                "(let that user read the file and enter its directories)"
            )


def accounts(config: Config) -> Iterator[Finding]:
    """Check the host's users and groups that the configuration names, and the range of agents' user ids."""
    if os.geteuid() != 0:
        yield Finding.info(
            "not root: all agents run with your user id; only the sandbox isolates them",
            "run the manager as root to give each agent a user id of its own",
        )
        return
    found = host_accounts(config)
    if found.made_up:
        yield Finding.warning(
            f"the user {config.proxy.user} does not exist: the proxy gets the first id of manager.uid_range",
            f"useradd --system --no-create-home {config.proxy.user}",
        )
    else:
        yield Finding.ok(f"the proxy runs as {config.proxy.user}")
    if found.admin_gid is None:
        yield Finding.info(
            f"the group {config.manager.admin_group} does not exist: only root may administer",
            f"groupadd --system {config.manager.admin_group}",
        )
    first, last = config.manager.uid_range
    taken = [user.pw_name for user in pwd.getpwall() if first <= user.pw_uid <= last]
    if taken:
        yield Finding.error(
            f"manager.uid_range contains the user ids of {', '.join(sorted(taken)[:5])}", "choose a free range"
        )
    for where, ids in subordinate_ids():
        if ids.start <= last and first < ids.stop:
            yield Finding.warning(
                f"manager.uid_range overlaps the subordinate ids of {where}; agents get none of these",
                "choose a free range: agents that have such an id already keep it until their removal",
            )


def edge_modules() -> Finding:
    """Tell whether the edge's modules are compiled (docs/adr/0010)."""
    from dispatcher.proxy.edge.http.fields import COMPILED

    if COMPILED:
        return Finding.info("the edge's modules are compiled")
    return Finding.info(
        "the edge's modules are interpreted, which costs more than twice the CPU per request",
        "install a C compiler and Python's headers, then install dispatcher again",
    )
