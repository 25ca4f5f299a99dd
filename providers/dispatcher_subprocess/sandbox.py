"""An agent's sandbox, as arguments for bubblewrap and setpriv, which `start` runs.

As root, bubblewrap runs without a user namespace and setpriv inside becomes the agent's own host user: with a user
namespace the agent would still be root on the host.  As an ordinary user there is a user namespace, and the agent
is that user.  Why so: docs/adr/0004-sandbox-without-user-namespace.md.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from pathlib import Path

from dispatcher.plugin import AgentSpec, Network, slug
from dispatcher_subprocess import seccomp
from dispatcher_subprocess.options import SHELL, AppOptions, options_of
from dispatcher_subprocess.processes import procfs

SYSTEM = ("/usr", "/bin", "/sbin", "/lib", "/lib32", "/lib64", "/libx32", "/etc")
HOST_ETC = "/.etc"  # as deep as /etc, so that relative links in it lead where they do on the host
DATA = "/data"
RUN = "/run/agent"
TMP = f"{DATA}/.tmp"
SECRETS = "/run/secrets"
ENVIRONMENT = "/run/environment"
_ACCOUNTS = ("passwd", "group")
#: Variables that the dynamic loader or libc obeys.  A program of root's must never see those of an app.
_LOADER = ("LD_", "GLIBC_", "MALLOC_", "GCONV_", "NLSPATH", "LOCPATH", "GETCONF_DIR", "RES_OPTIONS", "HOSTALIASES")
# setpriv needs these to become the agent, bwrap to enter the agent's private working directory.
_CAPABILITIES = ["--cap-drop", "ALL"]
for _name in ("CAP_SETUID", "CAP_SETGID", "CAP_SETPCAP", "CAP_DAC_READ_SEARCH"):
    _CAPABILITIES += ["--cap-add", _name]
_SET_LOADER = '. "$0" && exec "$@"'
_GATE = 'read -r _ && exec "$@"'


def below(path: Path | str, roots: Iterable[Path | str]) -> bool:
    """Whether `path` is one of `roots` or lies below one; all are absolute and normal."""
    inside = f"{path}/"
    return any(inside.startswith(f"{root}/") or str(root) == "/" for root in roots)


def split_environment(variables: Mapping[str, str]) -> tuple[dict[str, str], dict[str, str]]:
    """Split variables into those that bwrap and setpriv, which run as root, may have, and the app's alone."""
    harmless = {name: value for name, value in variables.items() if not name.startswith(_LOADER)}
    return harmless, {name: value for name, value in variables.items() if name not in harmless}


def loader_script(variables: Mapping[str, str]) -> bytes:
    """Return a shell script that sets variables with any content."""
    lines = ("export {}='{}'\n".format(name, value.replace("'", "'\\''")) for name, value in variables.items())
    return "".join(lines).encode("utf-8", "surrogateescape")


def become(uid: int, gid: int, setpriv: str, groups: Iterable[int] = ()) -> list[str]:
    """Return the command that becomes an agent's user, without privileges and without new ones later."""
    return [
        setpriv,
        f"--reuid={uid}",
        f"--regid={gid}",
        f"--groups={','.join(map(str, groups))}" if groups else "--clear-groups",
        "--no-new-privs",
        "--bounding-set=-all",
        "--inh-caps=-all",
        "--",
    ]


def groups(options: AppOptions) -> list[int]:
    """Return the groups beyond its own that an app's agents are in, never root's.

    They are those of its devices, and those of its writable directories that pass their group on (setgid).
    """
    found = set()
    for path in filter(Path.exists, options.writable):  # of one that is missing bubblewrap tells
        status = path.stat()
        if status.st_mode & stat.S_ISGID and status.st_mode & stat.S_IWGRP:
            found.add(status.st_gid)
    for device in devices(options):
        status = os.stat(device)
        if status.st_mode & stat.S_IRGRP:
            found.add(status.st_gid)
    return sorted(found - {0})


def devices(options: AppOptions) -> Iterator[str]:
    """Yield the devices of an app that exist, those below directories such as /dev/dri included."""
    for path in options.devices:
        below_it = (os.path.join(parent, name) for parent, _, names in os.walk(path) for name in names)
        yield from filter(os.path.exists, (str(path),) if not path.is_dir() else below_it)


def gated(command: Sequence[str]) -> list[str]:
    """Return a command that begins after a line on its standard input, and not if that ends before."""
    return ["/bin/sh", "-c", _GATE, "gate", *command]


def with_loader(command: Sequence[str], script: str) -> list[str]:
    """Return a command that runs with the variables of a `loader_script`."""
    return ["/bin/sh", "-c", _SET_LOADER, script, *command]


class Tree:
    """The files of a sandbox, as arguments for bubblewrap; made directories are open to the agent."""

    def __init__(self, words: Iterable[str] = (), made: Iterable[str] = ()) -> None:
        self.words = list(words)
        self.made = set(made)

    def system(self, path: str) -> None:
        """Show a directory of the host's root, or the link that it is."""
        if os.path.islink(path):
            self.words += ["--symlink", os.readlink(path), path]
        elif os.path.isdir(path):
            self.words += ["--ro-bind", path, path]
        self.made.add(path)

    def etc(self, own: Collection[str]) -> None:
        """Show the host's /etc by links to a mount of it; the files `own` are the agent's and follow.

        A file that is mounted over one of the host's vanishes when the host replaces its own by rename.
        """
        self.words += ["--ro-bind", "/etc", HOST_ETC]
        self.directory("/etc")
        for name in sorted({*os.listdir("/etc")} - {*own}):
            path = f"/etc/{name}"
            self.words += ["--symlink", os.readlink(path) if os.path.islink(path) else f"{HOST_ETC}/{name}", path]

    def directory(self, path: str) -> None:
        """Make a directory, unless it exists."""
        if path not in self.made:
            self.words += ["--perms", "0755", "--dir", path]
            self.made.add(path)

    def bind(self, how: str, source: str, target: str) -> None:
        """Show a path of the host."""
        target = _place(target)
        if not below(target, (*SYSTEM, HOST_ETC)):
            for end in range(1, len(target)):
                if target[end] == "/":
                    self.directory(target[:end])
        self.words += [how, source, target]
        self.made.add(target)

    def file(self, fd: int, path: str) -> None:
        """Make a file with the content of a descriptor, which everybody may read."""
        self.words += ["--perms", "0444", "--file", str(fd), path]


def _place(path: str) -> str:
    """Return where a path of the host is in a sandbox."""
    return HOST_ETC + path.removeprefix("/etc") if path.startswith("/etc/") else path


def view(
    options: AppOptions,
    shown: Iterable[Path],
    hidden: Iterable[Path],
    *,
    own_uid: bool,
    own_resolver: bool,
    sizes: bool = True,
) -> Tree:
    """Return the host's files that every agent of an app sees.

    :param shown: paths beyond SYSTEM, read-only; :param hidden: paths below shown ones to hide.
    :param own_uid: agents have files of users and groups of their own; :param own_resolver: and a resolv.conf.
    :param sizes: bubblewrap limits the size of temporary files.
    """
    tree = Tree(made=["/"])
    for name in SYSTEM:
        if name == "/etc":
            tree.etc([*_ACCOUNTS * own_uid, *["resolv.conf"] * own_resolver])
        else:
            tree.system(name)
    tree.words += ["--proc", "/proc", "--dev", "/dev"]
    files = ["--size", str(options.tmp_size)] if sizes else []
    files += ["--perms", "1777", "--tmpfs"]
    tree.words += [*files, "/tmp", *files, "/dev/shm"]  # noqa: S108  the agent's own
    tree.made |= {"/proc", "/dev", "/tmp"}  # noqa: S108
    tree.directory("/var")
    tree.words += ["--symlink", "/tmp", "/var/tmp"]  # noqa: S108
    for how, paths in (("--ro-bind", shown), ("--bind", options.writable), ("--dev-bind", options.devices)):
        for path in paths:
            tree.bind(how, str(path), str(path))
    for name in devices(options):  # libraries find what a device is in its directory of /sys
        device = os.stat(name)
        kind = "block" if stat.S_ISBLK(device.st_mode) else "char"
        link = f"/sys/dev/{kind}/{os.major(device.st_rdev)}:{os.minor(device.st_rdev)}"
        if device.st_rdev and os.path.exists(link) and link not in tree.made:
            bus = os.path.realpath(f"{link}/device" if os.path.exists(f"{link}/device") else link)
            tree.bind("--ro-bind", bus, bus)
            tree.bind("--symlink", os.path.realpath(link), link)
    for path in hidden:
        cover = ["--perms", "0555", "--tmpfs"] if path.is_dir() else ["--ro-bind", "/dev/null"]
        tree.words += [*(["--size", "4096"] if sizes and path.is_dir() else []), *cover, _place(str(path))]
    tree.directory("/run")
    resolver = os.path.realpath("/etc/resolv.conf")  # often a link to what a service writes below /run
    if not own_resolver and not below(resolver, SYSTEM):
        tree.bind("--ro-bind-try", resolver, resolver)
    return tree


def arguments(
    spec: AgentSpec,
    seen: Tree,
    *,
    memory: Callable[[bytes], int],
    privileged: bool,
    own_uid: bool,
    workdir: str,
    secrets: Path | None,
    loader: Mapping[str, str],
    resolver: bytes,
) -> list[str]:
    """Return the arguments for ``bwrap --args``, but for the descriptors that it reports to.

    :param memory: returns an inherited descriptor of a file in memory with some content.
    :param privileged: no user namespace; :param own_uid: whether the agent has a host user id of its own.
    :param secrets: directory of the agent's secrets, None without any.
    :param loader: variables for a `loader_script`; :param resolver: a resolv.conf; b"": the host's.
    """
    words = ["--unshare-pid", "--unshare-ipc", "--unshare-uts", "--unshare-cgroup-try"]
    words += ["--hostname", spec.app.name, "--new-session"]
    words += _CAPABILITIES if privileged else ["--unshare-user"]
    if spec.app.network is not Network.HOST:
        words += ["--unshare-net"]
    tree = Tree(seen.words, seen.made)
    tree.bind("--bind", str(spec.data_dir), DATA)
    tree.bind("--bind", str(spec.run_dir), RUN)
    if secrets:
        tree.bind("--ro-bind", str(secrets), SECRETS)
    if loader:
        tree.file(memory(loader_script(loader)), ENVIRONMENT)
    if resolver:
        tree.file(memory(resolver), "/etc/resolv.conf")
    if own_uid:  # the agent is in the user and group databases, so that programs find its name
        name = slug(spec.user)
        user = f"{name}:x:{spec.uid}:{spec.gid}:{spec.user}:{DATA}:{SHELL}\n"  # a user's name holds no colon
        group = f"{name}:x:{spec.gid}:\n"
        for file, line in zip(_ACCOUNTS, (user, group), strict=True):
            tree.file(memory(procfs.read(f"/etc/{file}") + line.encode()), f"/etc/{file}")
    words += [*tree.words, "--remount-ro", "/", "--chdir", workdir]
    multicast = spec.app.network is Network.HOST
    if options_of(spec.app).seccomp and (program := seccomp.program(multicast=multicast)):
        words += ["--seccomp", str(memory(program))]
    return words
