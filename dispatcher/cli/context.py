"""The context of every command: global options, the manager's client, the output."""

from __future__ import annotations

import functools
import os
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import click

from dispatcher.cli.ui.output import Output
from dispatcher.common.nearest import nearest
from dispatcher.config import default_paths
from dispatcher.config.default_paths import unreadable
from dispatcher.plugin.errors import BadRequest, ConfigError, DispatcherError, NotFound

if TYPE_CHECKING:
    from dispatcher.client.manager_client import ManagerClient
    from dispatcher.config.load import Config

SYSTEM_RUN_DIR = Path("/run/dispatcher")
WHOLE = 30.0  # seconds beyond the timeout of a request for its whole answer
PATIENCE = 10.0  # seconds to wait for a manager that is starting


@dataclass
class Cli:
    """The state of one run of the program.

    :ivar config_path: ``--config``; :ivar manager: ``--manager``; :ivar check_certificate: not ``-k``.
    """

    config_path: Path | None = None
    manager: str | None = None
    check_certificate: bool = True
    tls: bool = True
    sslcert: Path | None = None
    client_cert: Path | None = None
    fingerprint: str | None = None
    token_file: Path | None = None
    out: Output = field(default_factory=Output)
    _client: ManagerClient | None = None

    @property
    def url(self) -> str:
        """The URL of the manager: ``unix:///PATH``, ``https://HOST:PORT`` or ``http://HOST:PORT``.

        In order: ``--manager``, $DISPATCHER_MANAGER, ``manager.run_dir`` of the configuration, this user's own run
        directory, the system's.  A bare ``HOST[:PORT]`` or a path is completed; the client checks the rest.

        :raises ConfigError: the file that ``--config`` names cannot be read.
        """
        given = self.manager or os.environ.get("DISPATCHER_MANAGER")
        if not given:
            return f"unix://{self._run_dir / default_paths.MANAGER_SOCKET}"
        if given.startswith("/"):
            return f"unix://{given}"
        given = given.rstrip("/")
        return given if ":/" in given else f"{'https' if self.tls else 'http'}://{given}"

    @functools.cached_property
    def _run_dir(self) -> Path:
        if chosen := _configured(self.config_path, self.out.note):
            return chosen
        own = default_paths.run_dir()
        # os.path.exists is False, where Path.exists raises, if the directory is another user's.
        places = (place for place in (own, SYSTEM_RUN_DIR) if os.path.exists(place / default_paths.MANAGER_SOCKET))
        return next(places, own)

    def client(self) -> ManagerClient:
        """Return the client of the manager.  Sends nothing yet.

        :raises BadRequest: an option cannot be used or a file cannot be read.
        """
        if self._client is not None:
            return self._client
        from dispatcher.client.manager_client import ManagerClient
        from dispatcher.client.transport import Transport

        url = self.url
        remote = not url.startswith("unix:")
        if url.startswith("https:") and not self.check_certificate and not self.fingerprint:
            self.out.note(
                "-k: the manager's certificate is not checked; an attacker in between can read token and passwords"
            )
        transport = Transport(
            url,
            token=self._token() if remote else None,
            verify=self.check_certificate,
            fingerprint=self.fingerprint,
            ca_file=self.sslcert,
            cert_file=self.client_cert,
            ssl=self.tls,
            patience=PATIENCE,
            whole=WHOLE,
        )
        self._client = ManagerClient(transport)
        return self._client

    def close(self) -> None:
        """Close the client's connections."""
        if self._client is not None:
            self._client.close()
            self._client = None

    def with_nearest_name(self, error: NotFound) -> NotFound:
        """Return the error about an unknown agent or user with the name that was probably meant."""
        missing = re.fullmatch(r"There is no (?:agent|user) '?([^']+)'?", error.what)
        if missing is None:
            return error
        try:
            agents = self.client().agents()["agents"]
        except DispatcherError:
            return error
        known = sorted({agent[key] for agent in agents for key in ("name", "user")})
        of_user = [name for name in known if name.startswith(f"{missing[1]}:")]
        near = f": did you mean {of_user[0]!r}?" if of_user else did_you_mean(missing[1], known)
        return NotFound(f"{error.what}{near}", why=error.why, fix=error.fix)

    def _token(self) -> str | None:
        if self.token_file is None:
            return os.environ.get("DISPATCHER_TOKEN") or None
        try:
            lines = self.token_file.read_text(encoding="utf-8").split()
        except (OSError, UnicodeDecodeError) as error:
            why = getattr(error, "strerror", None) or str(error)
            raise BadRequest(f"Cannot read {self.token_file}", why=why) from error
        if not lines:
            raise BadRequest(f"{self.token_file} contains no token", fix="write the token into it")
        return lines[0]

    def config(self) -> Config:
        """Read and validate the configuration.

        :raises ConfigError: it is invalid.
        """
        from dispatcher.config.load import load

        return load(self.config_path)


def _configured(config: Path | None, note: Callable[[str], None]) -> Path | None:
    """Return ``manager.run_dir`` of the configuration, read without its models, which are slow to import.

    :param note: gets a syntax error, with which a running manager can still be reached.
    """
    path = config or default_paths.config_file()
    import sys

    if sys.version_info >= (3, 11):
        import tomllib
    else:
        import tomli as tomllib
    try:
        text = path.read_bytes().decode("utf-8", "replace")
    except (FileNotFoundError, NotADirectoryError) as error:
        if config is None and not os.environ.get("DISPATCHER_CONFIG"):
            return None
        raise ConfigError(
            f"Cannot read {path}", why="the file does not exist", fix="check --config, or run `dispatcher init`"
        ) from error
    except PermissionError as error:
        if config is None:
            return None  # the system's file, which this user may not read
        raise unreadable(path, error) from error
    except OSError as error:
        raise unreadable(path, error) from error
    try:
        table = tomllib.loads(text).get("manager")
        found = table.get("run_dir") if isinstance(table, dict) else None
    except ValueError as error:
        note(f"{path} is not TOML: {error}; this command goes on without it (see `dispatcher config check`)")
        line = re.search(r"^\s*run_dir\s*=\s*[\"']([^\"'\n]+)[\"']", text, re.MULTILINE)
        found = line and line[1]
    return Path(found).absolute() if isinstance(found, str) else None


pass_cli = click.make_pass_decorator(Cli, ensure=True)


def did_you_mean(word: str, known: Sequence[str]) -> str:
    """Return ``: did you mean 'X'?`` for the nearest of `known`, or nothing."""
    near = nearest(word, known)
    return f": did you mean {near!r}?" if near else ""
