"""Builds the WSGI application of a role.  Knows Flask."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from flask import Flask, Response, request
from werkzeug.exceptions import HTTPException
from werkzeug.routing import Rule

from dispatcher.manager.agents.metrics import CONTENT_TYPE
from dispatcher.manager.rest import admin, agents, openapi, proxy_role
from dispatcher.manager.rest.routing import (
    MAX_BODY,
    Answer,
    Route,
    Routes,
    call,
    crash,
    http_problem,
    problem,
)
from dispatcher.manager.rest.services import Json, Services
from dispatcher.plugin.errors import DispatcherError

common = Routes()


@common.add("GET", "/healthz", answers={200: "Health"})
def healthz(services: Services) -> Json:
    """Say how the manager is; 200 also while a backend is down."""
    return services.health()


@common.add("GET", "/metrics", answers={200: "text/plain"})
def metrics(services: Services) -> Answer:
    """Show metrics in Prometheus' text format."""
    return Answer(body=services.metrics.text(), content_type=CONTENT_TYPE)


ROLES = {
    "admin": [*common.all, *agents.routes.all, *admin.routes.all],
    "proxy": [*common.all, *proxy_role.routes.all],
}


class _Route(Rule):
    """A route of which no URL is built: the functions for that would take longer to make than all else here."""

    def _compile_builder(self, append_unknown: bool = True) -> Callable[..., tuple[str, str]]:
        return _built


def _built(*_: object) -> tuple[str, str]:
    raise RuntimeError("the manager builds no URLs")


def application(role: str, services: Services) -> Flask:
    """Return the application of the role *admin* or *proxy*."""
    app = Flask("dispatcher.manager", static_folder=None)
    app.url_rule_class = _Route
    app.config["MAX_CONTENT_LENGTH"] = MAX_BODY
    app.url_map.strict_slashes = True
    app.url_map.merge_slashes = False
    routes = [*ROLES[role], _openapi_route(role)]
    for number, route in enumerate(routes):
        app.add_url_rule(
            route.path,
            f"{number} {route.handler.__name__}",
            _view(route, services),
            methods=[route.method],
            provide_automatic_options=False,
        )
    app.register_error_handler(DispatcherError, problem)
    app.register_error_handler(HTTPException, http_problem)
    app.register_error_handler(Exception, lambda error: crash(error, request))
    return app


def _view(route: Route, services: Services) -> Callable[..., Response]:
    def view(**parameters: Any) -> Response:
        return call(route, services, request, parameters)

    return view


def _openapi_route(role: str) -> Route:
    described: list[Json] = []  # made when first asked for

    def openapi_json(_services: Services) -> Json:
        if not described:
            described.append(openapi.document(role, ROLES[role]))
        return described[0]

    return Route(
        method="GET",
        path="/openapi.json",
        handler=openapi_json,
        summary="Describe this interface",
        answers={200: "object"},
    )
