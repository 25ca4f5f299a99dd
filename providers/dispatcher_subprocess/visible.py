"""Which of the host's files an agent must see for its program to run.  Reads the file system.

The base is what every program needs (``/usr`` and its kin, ``/etc``).  Added is what the command itself shows:
a Python virtual environment with the installation that it was made from, or a single program elsewhere.
"""

from __future__ import annotations

import os
import shutil
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path

import dispatcher
from dispatcher.plugin import ProviderError

SYSTEM = ("/usr", "/bin", "/sbin", "/lib", "/lib32", "/lib64", "/libx32", "/etc")
_SHEBANG = 256  # bytes, as much as the kernel reads


def below(path: Path, roots: Iterable[Path]) -> bool:
    """Whether `path` is one of `roots` or lies below one."""
    return any(path == root or root in path.parents for root in roots)


def find_program(name: str, search: str, app: str) -> Path:
    """Return the absolute path of an app's program, symbolic links kept.

    :raises ProviderError: there is no such program.
    """
    found = shutil.which(name, path=search)
    if not found or not os.path.isabs(found):
        raise ProviderError(
            f"apps.{app}.subprocess.command: the program {name!r} is not there",
            why=f"neither a program at that path nor in {search}"
            if os.path.isabs(name) or "/" not in name
            else "a relative path means nothing here",
            fix="install it, or give its absolute path",
        )
    return Path(os.path.normpath(found))


def needed(program: Path) -> tuple[Path, ...]:
    """Return the paths beyond SYSTEM that a program needs, none of them below another."""
    found: list[Path] = []
    for path in dict.fromkeys(_closure(program)):
        roots = [Path(name) for name in SYSTEM]
        inside = below(path, roots) or below(Path(os.path.realpath(path)), roots) or path == Path("/")
        if not inside and path.exists():  # what is absent, an interpreter say, the app's own start complains about
            found.append(path)
    return tuple(path for path in found if not below(path, [other for other in found if other != path]))


def _closure(program: Path, depth: int = 0) -> Iterator[Path]:
    if depth > 8:  # links and interpreters of interpreters: deeper is a loop
        return
    prefix = program.parent.parent
    configuration = prefix / "pyvenv.cfg"
    if configuration.is_file():
        yield prefix
        if prefix == Path(sys.prefix):
            yield Path(dispatcher.__file__).parent  # installed in place during development, it lies elsewhere
        home = _home(configuration)
        if home:
            yield from _installation(home)
    elif program == Path(sys.executable):
        yield from _installation(program.parent)
        yield Path(dispatcher.__file__).parent
    elif program.name.startswith("python") and program.parent.name == "bin":
        yield from _installation(program.parent)
    else:
        yield program
    if program.is_symlink():
        target = Path(os.path.normpath(program.parent / os.readlink(program)))
        yield from _closure(target, depth + 1)
    interpreter = _interpreter(program)
    if interpreter:
        yield from _closure(interpreter, depth + 1)


def _installation(directory: Path) -> Iterator[Path]:
    """Yield the prefix of a Python whose programs are in `directory`, as named and as it really is."""
    yield directory.parent
    yield Path(os.path.realpath(directory)).parent


def _home(configuration: Path) -> Path | None:
    for line in configuration.read_text(encoding="utf-8", errors="replace").splitlines():
        key, _, value = line.partition("=")
        if key.strip().lower() == "home" and os.path.isabs(value.strip()):
            return Path(value.strip())
    return None


def _interpreter(program: Path) -> Path | None:
    try:
        with program.open("rb") as file:
            first = file.read(_SHEBANG).split(b"\n", 1)[0]
    except OSError:
        return None
    words = first[2:].split() if first.startswith(b"#!") else []
    if not words or not words[0].startswith(b"/"):
        return None
    return Path(os.path.normpath(os.fsdecode(words[0])))
