"""The manager's health and metrics, on every listener.  Never waits for a backend."""

from __future__ import annotations

import sqlalchemy as sa
from flask import Response

from dispatcher import __version__
from dispatcher.manager.files.space import low_space
from dispatcher.manager.metrics import CONTENT_TYPE
from dispatcher.manager.rest import schemas
from dispatcher.manager.rest.plugin_states import plugin_states
from dispatcher.manager.rest.routing import Json, Routes
from dispatcher.manager.rest.services import Services
from dispatcher.plugin.errors import Unavailable

routes = Routes()


@routes.add("GET", "/healthz", {200: schemas.Health})
def healthz(services: Services) -> Json:
    """Report the manager's health; 200 also while a backend is down."""
    return report(services)


@routes.add("GET", "/metrics", {200: str}, scope="metrics")
def metrics(services: Services) -> Response:
    """Show metrics in Prometheus' text format."""
    return Response(services.metrics.text(), content_type=CONTENT_TYPE)


def report(services: Services) -> Json:
    """Return ``ok`` or ``degraded``, and in sentences what is wrong."""
    problems = [
        f"The {' and '.join(state.kinds) or 'plugin'} {state.name} cannot be used: {state.error}"
        for state in plugin_states(services)
        if state.error and state.configured
    ]
    try:
        with services.database.read() as connection:
            connection.execute(sa.text("SELECT 1"))
    except Unavailable as error:
        problems.append(str(error))
    if low := low_space(services.config.manager.state_dir):
        problems.append(low)
    return {
        "status": "degraded" if problems else "ok",
        "version": __version__,
        "problems": problems,
        "configuration_changed": services.config.outdated,
        "feed_connections": services.feed_connections(),
    }
