"""Reads the secrets of ``[apps.NAME.secrets]``: from files, or from variables of the manager's environment.

A secret is read each time an agent starts, so a rotated file takes effect at the next start.  No error, finding
or log line holds the content of a secret.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

from dispatcher.config.schema import ENVIRONMENT, AppConfig
from dispatcher.plugin.errors import ConfigError
from dispatcher.plugin.model import Finding, Level

MAX_SECRET = 64 * 1024  # bytes


def read_secrets(
    app: str, sources: Mapping[str, str], environment: Mapping[str, str] = os.environ
) -> dict[str, str]:
    """Return the secrets of an app by name.

    :param sources: an absolute path or ``env:VARIABLE`` for each name.
    :param environment: the manager's environment.
    :raises ConfigError: a source is missing, or its content cannot be a secret.
    """
    return {name: _read(f"apps.{app}.secrets.{name}", source, environment) for name, source in sources.items()}


def secret_variables(apps: Iterable[AppConfig]) -> set[str]:
    """Return the environment variables that hold secrets of apps."""
    sources = (source for app in apps for source in app.secrets.values())
    return {source.removeprefix(ENVIRONMENT) for source in sources if source.startswith(ENVIRONMENT)}


def check_secrets(
    app: str, sources: Mapping[str, str], environment: Mapping[str, str] = os.environ
) -> Iterator[Finding]:
    """Yield the faults of an app's secrets.

    A source that only this process may lack (a variable, the permission to read a file) is a warning: the manager
    can run with another environment and as another user.
    """
    for name, source in sources.items():
        key = f"apps.{app}.secrets.{name}"
        try:
            _read(key, source, environment)
        except ConfigError as error:
            uncertain = isinstance(error.__cause__, (KeyError, PermissionError))
            yield Finding(
                level=Level.WARNING if uncertain else Level.ERROR, what=f"{error.what}: {error.why}", fix=error.fix
            )
            continue
        if not source.startswith(ENVIRONMENT) and Path(source).stat().st_mode & stat.S_IROTH:
            yield Finding(
                level=Level.WARNING,
                what=f"{key}: every user of this host can read {source}",
                fix=f"run `chmod o-r {source}`",
            )


def _read(key: str, source: str, environment: Mapping[str, str]) -> str:
    if source.startswith(ENVIRONMENT):
        variable = source.removeprefix(ENVIRONMENT)
        try:
            data = os.fsencode(environment[variable])
        except KeyError as error:
            raise ConfigError(
                f"{key}: the variable {variable} is missing",
                why="it is not set in the environment of the manager",
                fix="set it where the manager is started, or give the path of a file",
            ) from error
    else:
        data = _content(key, Path(source))
    if len(data) > MAX_SECRET:
        raise ConfigError(
            f"{key}: {source} is too large",
            why=f"a secret has at most {MAX_SECRET // 1024} KiB",
            fix="put large files into the app's image or read_only directories",
        )
    if not data.strip():
        raise ConfigError(
            f"{key}: {source} is empty",
            why="an app may take an empty password for none",
            fix="write the secret there, or remove the key",
        )
    if b"\0" in data:
        raise ConfigError(
            f"{key}: {source} holds a NUL byte", why="a secret is text", fix="encode it, for example with base64"
        )
    try:
        return data.decode()
    except UnicodeDecodeError as error:
        raise ConfigError(
            f"{key}: {source} is not UTF-8", why="a secret is text", fix="encode it, for example with base64"
        ) from error


def _content(key: str, path: Path) -> bytes:
    """Return the file's content, one byte more than allowed at most; a FIFO does not block."""
    try:
        with open(os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_NOCTTY | os.O_CLOEXEC), "rb") as file:
            if stat.S_ISREG(os.fstat(file.fileno()).st_mode):
                return file.read(MAX_SECRET + 1)
    except FileNotFoundError as error:
        raise ConfigError(
            f"{key}: cannot read {path}", why="there is no such file", fix="create it, or correct the path"
        ) from error
    except OSError as error:
        raise ConfigError(
            f"{key}: cannot read {path}",
            why=error.strerror or str(error),
            fix="let the user of the manager read it",
        ) from error
    raise ConfigError(f"{key}: cannot read {path}", why="it is not a regular file", fix="correct the path")
