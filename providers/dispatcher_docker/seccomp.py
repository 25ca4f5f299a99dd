"""The option `seccomp`: which profile of system calls a container gets."""

from __future__ import annotations

import hashlib
import os
import tempfile
from collections.abc import Iterable
from pathlib import Path

from dispatcher.plugin import ProviderError, seccomp_profile


def chosen(name: str, capabilities: Iterable[str], app: str, *, multicast: bool = False) -> str:
    """Return what the engine takes for the option `seccomp`: a profile, "unconfined", or "" for its own.

    :param app: name of the app, for the error; :param multicast: membership in multicast groups is allowed;
    :raises ProviderError: the named file cannot be read.
    """
    if name == "default":
        return seccomp_profile(frozenset(one.removeprefix("CAP_") for one in capabilities), multicast=multicast)
    if name in {"engine", "unconfined"}:
        return name.removeprefix("engine")
    try:
        return Path(name).read_text(encoding="utf-8")
    except (OSError, ValueError) as error:
        raise ProviderError(
            f"apps.{app}.docker.seccomp: {name!r} cannot be read",
            why=getattr(error, "strerror", None) or str(error),
            fix="expected default, engine, unconfined or the path of a profile",
        ) from error


def as_file(profile: str, directory: Path) -> str:
    """Return the path of a file with a profile: Podman takes no profile itself.

    :param directory: where files are kept, one for each profile.
    :raises ProviderError: it cannot be written.
    """
    if profile in {"", "unconfined"}:
        return profile
    path = directory / f"{hashlib.sha256(profile.encode()).hexdigest()[:16]}.json"
    try:
        directory.mkdir(mode=0o700, exist_ok=True)
        if not path.exists():
            with tempfile.NamedTemporaryFile("w", dir=directory, encoding="utf-8", delete=False) as file:
                file.write(profile)
            os.replace(file.name, path)
    except OSError as error:
        raise ProviderError(f"Cannot write {path}", why=error.strerror or "", fix="free some space") from error
    return str(path)
