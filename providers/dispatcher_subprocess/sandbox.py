"""An agent's sandbox, as arguments for bubblewrap and setpriv.

As root, bubblewrap runs without a user namespace and setpriv inside becomes the agent's own host user: with a user
namespace the agent would still be root on the host.  As an ordinary user there is a user namespace, and the agent
is that user.  Why so: docs/adr/0004-sandbox-without-user-namespace.md.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from dispatcher.plugin import AgentSpec, Network, slug
from dispatcher_subprocess import procfs
from dispatcher_subprocess.options import AppOptions

SYSTEM = ("/usr", "/bin", "/sbin", "/lib", "/lib32", "/lib64", "/libx32", "/etc")
DATA = "/data"
RUN = "/run/agent"
SECRETS = "/run/secrets"
ENVIRONMENT = "/run/environment"
#: Variables that the dynamic loader or libc obeys.  A program of root's must never see those of an app.
_LOADER = ("LD_", "GLIBC_", "MALLOC_", "GCONV_", "NLSPATH", "LOCPATH", "GETCONF_DIR", "RES_OPTIONS", "HOSTALIASES")
# setpriv needs these to become the agent, bwrap to enter the agent's private working directory.
_CAPABILITIES = ["--cap-drop", "ALL"]
for _name in ("CAP_SETUID", "CAP_SETGID", "CAP_SETPCAP", "CAP_DAC_READ_SEARCH"):
    _CAPABILITIES += ["--cap-add", _name]
_SET_LOADER = '. "$0" && exec "$@"'
_GATE = 'read -r _ && exec "$@"'


def below(path: Path, roots: Iterable[Path]) -> bool:
    """Whether `path` is one of `roots` or lies below one."""
    return any(path == root or root in path.parents for root in roots)


@dataclass(frozen=True, slots=True, kw_only=True)
class Descriptors:
    """Descriptors that bubblewrap inherits: numbers in this process and in that."""

    status: int
    info: int
    block: int
    accounts: Sequence[int] = ()
    seccomp: int | None = None
    loader: int | None = None
    resolver: int | None = None


def split_environment(variables: Mapping[str, str]) -> tuple[dict[str, str], dict[str, str]]:
    """Split variables into those that bwrap and setpriv, which run as root, may have, and the app's alone."""
    harmless = {name: value for name, value in variables.items() if not name.startswith(_LOADER)}
    return harmless, {name: value for name, value in variables.items() if name not in harmless}


def loader_script(variables: Mapping[str, str]) -> bytes:
    """Return a shell script that sets variables with any content."""
    lines = ("export {}='{}'\n".format(name, value.replace("'", "'\\''")) for name, value in variables.items())
    return "".join(lines).encode("utf-8", "surrogateescape")


def accounts(spec: AgentSpec) -> tuple[bytes, bytes]:
    """Return the host's user and group databases with the agent in them, so that programs find its name."""
    name = slug(spec.user)
    user = f"{name}:x:{spec.uid}:{spec.gid}:{spec.user}:{DATA}:/bin/sh\n"  # a user's name holds no colon
    group = f"{name}:x:{spec.gid}:\n"
    return (
        (procfs.read("/etc/passwd") or b"") + user.encode(),
        (procfs.read("/etc/group") or b"") + group.encode(),
    )


def become(uid: int, gid: int, setpriv: str) -> list[str]:
    """Return the command that becomes an agent's user, without privileges and without new ones later."""
    return [
        setpriv,
        f"--reuid={uid}",
        f"--regid={gid}",
        "--clear-groups",
        "--no-new-privs",
        "--bounding-set=-all",
        "--inh-caps=-all",
        "--",
    ]


def gated(command: Sequence[str]) -> list[str]:
    """Return a command that begins after a line on its standard input, and not if that ends before."""
    return ["/bin/sh", "-c", _GATE, "gate", *command]


def with_loader(command: Sequence[str], script: str) -> list[str]:
    """Return a command that runs with the variables of a `loader_script`."""
    return ["/bin/sh", "-c", _SET_LOADER, script, *command]


@dataclass(frozen=True, slots=True, kw_only=True)
class View:
    """The host's files that every agent of an app sees, as arguments for bubblewrap.

    :ivar made: directories that exist inside.
    """

    words: tuple[str, ...]
    made: frozenset[str]


def view(options: AppOptions, shown: Iterable[Path], hidden: Iterable[Path]) -> View:
    """Return the view of an app's agents.

    :param shown: paths beyond SYSTEM, read-only; :param hidden: paths below shown ones to hide.
    """
    tree = _Tree(set())
    for name in SYSTEM:
        tree.system(name)
    tree.words += ["--proc", "/proc", "--dev", "/dev"]
    size = ["--size", str(options.tmp_size), "--perms", "1777", "--tmpfs"]
    tree.words += [*size, "/tmp", *size, "/dev/shm"]  # noqa: S108  the agent's own
    tree.made |= {"/", "/proc", "/dev", "/tmp"}  # noqa: S108
    tree.directory("/var")
    tree.words += ["--symlink", "/tmp", "/var/tmp"]  # noqa: S108
    for path in shown:
        tree.bind("--ro-bind", str(path), str(path))
    for path in options.writable:
        tree.bind("--bind", str(path), str(path))
    for path in options.devices:
        tree.bind("--dev-bind", str(path), str(path))
    for path in hidden:
        cover = ["--perms", "0555", "--size", "4096", "--tmpfs"] if path.is_dir() else ["--ro-bind", "/dev/null"]
        tree.words += [*cover, str(path)]
    tree.directory("/run")
    resolver = os.path.realpath("/etc/resolv.conf")  # often a link to what a service writes below /run
    if not below(Path(resolver), map(Path, SYSTEM)):
        tree.parents(resolver)
        tree.words += ["--ro-bind-try", resolver, resolver]
    return View(words=tuple(tree.words), made=frozenset(tree.made))


def bubblewrap_arguments(
    spec: AgentSpec,
    seen: View,
    *,
    descriptors: Descriptors,
    own_user: bool,
    workdir: str,
    secrets: Path | None,
) -> list[str]:
    """Return the arguments for ``bwrap --args``.

    :param secrets: directory of the agent's secrets, None without any.
    :param own_user: a user namespace (not as root).
    """
    words = ["--unshare-pid", "--unshare-ipc", "--unshare-uts", "--unshare-cgroup-try"]
    words += ["--hostname", spec.app.name, "--new-session"]
    words += ["--unshare-user"] if own_user else _CAPABILITIES
    if spec.app.network is not Network.HOST:
        words += ["--unshare-net"]
    words += seen.words
    tree = _Tree(set(seen.made))
    tree.words += ["--bind", str(spec.data_dir), DATA, "--bind", str(spec.run_dir), RUN]
    if secrets:
        tree.words += ["--ro-bind", str(secrets), SECRETS]
    if descriptors.loader is not None:
        tree.words += ["--perms", "0444", "--file", str(descriptors.loader), ENVIRONMENT]
    if descriptors.resolver is not None:
        resolver = os.path.realpath("/etc/resolv.conf")
        tree.words += ["--perms", "0444", "--ro-bind-data", str(descriptors.resolver), resolver]
    for fd, path in zip(descriptors.accounts, ("/etc/passwd", "/etc/group"), strict=False):
        tree.words += ["--perms", "0444", "--ro-bind-data", str(fd), path]
    if descriptors.seccomp is not None:
        tree.words += ["--seccomp", str(descriptors.seccomp)]
    words += tree.words
    words += ["--remount-ro", "/", "--chdir", workdir]
    words += ["--json-status-fd", str(descriptors.status), "--info-fd", str(descriptors.info)]
    return [*words, "--block-fd", str(descriptors.block)]


class _Tree:
    """Grows the sandbox's root; directories on the way to a mount are made open to the agent."""

    def __init__(self, made: set[str]) -> None:
        self.words: list[str] = []
        self.made = made

    def system(self, name: str) -> None:
        if os.path.islink(name):
            self.words += ["--symlink", os.readlink(name), name]
        elif os.path.isdir(name):
            self.words += ["--ro-bind", name, name]
        self.made.add(name)

    def directory(self, path: str) -> None:
        self.parents(path)
        if path not in self.made:
            self.words += ["--perms", "0755", "--dir", path]
            self.made.add(path)

    def parents(self, path: str) -> None:
        if below(Path(path), [Path(name) for name in SYSTEM]):
            return
        for parent in reversed(Path(path).parents):
            if str(parent) not in self.made:
                self.words += ["--perms", "0755", "--dir", str(parent)]
                self.made.add(str(parent))

    def bind(self, how: str, source: str, target: str) -> None:
        self.parents(target)
        self.words += [how, source, target]
        self.made.add(target)
