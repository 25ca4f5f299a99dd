"""The WSGI application of a role: Flask, with JSON answers and errors as problem documents (RFC 9457).

flask-openapi3 would do the same from the same models.  It takes 65 ms to import and 110 ms to register the routes,
a third of the manager's start, and lets a query give a name twice.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from flask import Flask, Response, request
from flask.json.provider import DefaultJSONProvider
from werkzeug.exceptions import HTTPException
from werkzeug.routing import Rule

from dispatcher.common import problem
from dispatcher.common.api_tokens import allows
from dispatcher.common.log import logger
from dispatcher.manager.agents.explain import OUTPUT
from dispatcher.manager.auth.tokens import InsufficientScope, authorize
from dispatcher.manager.rest import (
    admin_requests,
    agents,
    directory_requests,
    health,
    openapi,
    proxy_requests,
    tokens,
)
from dispatcher.manager.rest.routing import Json, Route, Routes
from dispatcher.manager.rest.server import MAX_BODY, Environ
from dispatcher.manager.rest.services import Services
from dispatcher.plugin.errors import DispatcherError

ROLES = {
    "admin": Routes(
        [*health.routes, *agents.routes, *admin_requests.routes, *directory_requests.routes, *tokens.routes]
    ),
    "proxy": Routes([*health.routes, *proxy_requests.routes]),
}
for _role, _routes in ROLES.items():
    openapi.describe(_role, _routes)

#: In the environment: the row of the API token that a request came with.  Without one, it may do all of its role.
BEARER = "dispatcher.bearer"

#: Takes WSGI's environment; raises the refusal of a request, or returns the answer in place of the handler's.
Admit = Callable[[Environ], Json | None]

_log = logger("manager.api")


class _Rule(Rule):
    """A route without URL building: compiling the functions for that takes most of the time of registering it."""

    def _compile_builder(self, append_unknown: bool = True) -> Callable[..., tuple[str, str]]:
        return lambda *_: ("", "")


class _Json(DefaultJSONProvider):
    """JSON in UTF-8, in the order of the handlers; what cannot be encoded becomes a question mark."""

    def response(self, *args: Any, **kwargs: Any) -> Response:
        text = self.dumps(*args, **kwargs, ensure_ascii=False, sort_keys=False, separators=(",", ":"))
        return Response(text.encode("utf-8", "replace"), mimetype="application/json")


def application(role: str, services: Services, admit: Admit = lambda _environ: None) -> Flask:
    """Return the application of the role *admin* or *proxy*.

    :param admit: called with every request before anything else.
    """
    app = Flask("dispatcher.manager", static_folder=None)
    app.json = _Json(app)
    app.url_rule_class = _Rule
    app.config["MAX_CONTENT_LENGTH"] = MAX_BODY
    app.url_map.merge_slashes = False
    for number, route in enumerate(ROLES[role]):
        app.add_url_rule(
            route.path,
            f"{number} {route.handler.__name__}",
            _view(app, route, services),
            methods=[route.method],
            provide_automatic_options=False,
        )
    app.register_error_handler(DispatcherError, _refused)
    app.register_error_handler(HTTPException, _http_error)
    app.register_error_handler(Exception, _crashed)
    app.before_request(lambda: admit(request.environ))
    app.after_request(_finish)
    return app


def _view(app: Flask, route: Route, services: Services) -> Callable[..., Response]:
    def view(**parameters: str) -> Response:
        row = request.environ.get(BEARER)
        if row is not None:
            authorize(row, route.scope, request.method, request.path)
        answer = route.call(services, request, parameters)
        if row is not None and not allows(row.scopes, "admin"):
            answer = _without_output(answer)
        return app.make_response(("", 204) if answer is None else answer)

    return view


def _without_output(answer: Any) -> Any:
    """Return an answer without the last lines of failed agents: apps print secrets."""
    if isinstance(answer, dict):
        shown = {
            key: {**value, "log": []} if key == "failure" and value else _without_output(value)
            for key, value in answer.items()
        }
        if "sentences" in shown:
            shown["sentences"] = [each for each in shown["sentences"] if not each.startswith(OUTPUT)]
        return shown
    return [_without_output(item) for item in answer] if isinstance(answer, list) else answer


def _finish(response: Response) -> Response:
    response.headers["Cache-Control"] = "no-store"
    if response.status_code == 204:
        del response.headers["Content-Type"]
    return response


def _refused(error: DispatcherError) -> tuple[Json, int, dict[str, str]]:
    headers = {"Content-Type": problem.MEDIA_TYPE, **problem.retry_after(error)}
    if error.status == 401:
        headers["WWW-Authenticate"] = "Bearer"
    elif isinstance(error, InsufficientScope):  # RFC 6750, 3.1
        headers["WWW-Authenticate"] = f'Bearer error="insufficient_scope", scope="{error.details["scope"]}"'
    return problem.of_error(error), error.status, headers


def _http_error(error: HTTPException) -> tuple[Json, int, dict[str, str]]:
    """Return the problem document of what Flask refuses: 404, 405, 413, ..."""
    status = error.code or 500
    headers = {"Content-Type": problem.MEDIA_TYPE}
    detail, fix = "the request is not valid", "see /openapi.json"
    if status == 404:
        detail = "there is no such path on this listener"
    elif status == 405:
        headers["Allow"] = ", ".join(sorted(getattr(error, "valid_methods", None) or []))
        detail = f"this path accepts {headers['Allow']}"
    elif status == 413:
        detail, fix = f"a body has at most {MAX_BODY} bytes", "send less"
    return problem.document(status, error.name, detail, fix), status, headers


def _crashed(error: Exception) -> tuple[Json, int, dict[str, str]]:
    """Log an unexpected error; the answer shows nothing of it."""
    _log.error("a request failed", method=request.method, path=request.path, exc_info=error)
    return _refused(
        DispatcherError("The request failed", why="an unexpected error occurred", fix="see the manager's log")
    )
