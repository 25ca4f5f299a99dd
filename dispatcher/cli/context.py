"""The context of every command: global options, the manager's client, the output."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click

from dispatcher.cli.target import manager_url
from dispatcher.cli.ui.output import Output
from dispatcher.plugin.errors import BadRequest

if TYPE_CHECKING:
    from dispatcher.client.manager_client import ManagerClient
    from dispatcher.config.load import Config

PATIENCE = 3.0  # seconds to wait for a manager that is starting
_F = TypeVar("_F", bound=Callable[..., Any])


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
        """The manager's URL."""
        given = self.manager or os.environ.get("DISPATCHER_MANAGER")
        return manager_url(given=given, config=self.config_path, tls=self.tls)

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
        )
        self._client = ManagerClient(transport)
        return self._client

    def close(self) -> None:
        """Close the client's connections."""
        if self._client is not None:
            self._client.close()
            self._client = None

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


pass_cli = click.make_pass_decorator(Cli, ensure=True)


def json_option(function: _F) -> _F:
    """Add ``--json`` to a command that prints data; the global option means the same."""

    def switch(ctx: click.Context, _parameter: click.Parameter, value: bool) -> None:
        if value:
            ctx.ensure_object(Cli).out.json = True

    option = click.option("--json", is_flag=True, expose_value=False, callback=switch, help="Print JSON.")
    return option(function)
