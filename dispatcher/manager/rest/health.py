"""How the manager is, for /healthz.  Asks what is known already; never waits for a backend."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import sqlalchemy as sa

from dispatcher import __version__
from dispatcher.manager.agents.supervisor import Supervisor
from dispatcher.manager.storage.database import Database
from dispatcher.plugin.errors import Unavailable


class Health:
    """Says ``ok`` or ``degraded``, and in sentences what is wrong."""

    def __init__(self, supervisor: Supervisor, database: Database, connections: Callable[[], int]) -> None:
        self._supervisor = supervisor
        self._database = database
        self._connections = connections

    def report(self) -> dict[str, Any]:
        """Return the body of /healthz."""
        problems = [
            f"The provider {provider['name']} cannot be used: {provider['error']}"
            for provider in self._supervisor.providers()
            if not provider["usable"]
        ]
        try:
            with self._database.read() as connection:
                connection.execute(sa.text("SELECT 1"))
        except Unavailable as error:
            problems.append(str(error))
        return {
            "status": "degraded" if problems else "ok",
            "version": __version__,
            "problems": problems,
            "feed_connections": self._connections(),
        }
