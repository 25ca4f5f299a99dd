"""From a request to a handler, and from an error to a problem document (RFC 9457).  Knows Flask; no handler does.

A handler takes the services, its path's parameters, and `body` and `query` as validated models; it returns an
`Answer` or a JSON object.
"""

from __future__ import annotations

import json
import math
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from flask import Request, Response
from pydantic import BaseModel, ValidationError
from werkzeug.exceptions import HTTPException

from dispatcher.common.log import logger
from dispatcher.manager.rest.schemas import Nothing
from dispatcher.manager.rest.services import Json, Services
from dispatcher.plugin import names
from dispatcher.plugin.errors import BadRequest, DispatcherError

MAX_BODY = 65536  # bytes

_building = threading.Lock()
_log = logger("manager.api")


@dataclass(frozen=True, slots=True)
class Answer:
    """Status, body (None: none) and further header fields."""

    status: int = 200
    body: Json | bytes | None = None
    headers: dict[str, str] = field(default_factory=dict)
    content_type: str = "application/json"


Handler = Callable[..., Answer | Json]


class UnsupportedMediaType(BadRequest):
    """The body is not JSON."""

    code, status = "unsupported-media-type", 415


@dataclass(frozen=True, slots=True, kw_only=True)
class Route:
    """One request of the interface.

    :ivar path: in Flask's form; ``<agent>`` is made canonical, other parameters are taken as they are.
    :ivar answers: status -> schema of the answer, or "" for no body.
    """

    method: str
    path: str
    handler: Handler
    summary: str
    body: type[BaseModel] | None = None
    query: type[BaseModel] = Nothing
    answers: dict[int, str]


class Routes:
    """The requests of one role."""

    def __init__(self) -> None:
        self.all: list[Route] = []

    def add(
        self,
        method: str,
        path: str,
        *,
        answers: dict[int, str],
        body: type[BaseModel] | None = None,
        query: type[BaseModel] = Nothing,
    ) -> Callable[[Handler], Handler]:
        """Declare the decorated function as the handler of a request; its docstring is the summary."""

        def declare(handler: Handler) -> Handler:
            summary = " ".join((handler.__doc__ or "").split("\n\n")[0].split())
            self.all.append(
                Route(
                    method=method,
                    path=path,
                    handler=handler,
                    summary=summary,
                    body=body,
                    query=query,
                    answers=answers,
                )
            )
            return handler

        return declare


def call(route: Route, services: Services, request: Request, parameters: dict[str, str]) -> Response:
    """Return the answer to a request."""
    arguments: dict[str, Any] = {
        name: names.agent_name(value) if name == "agent" else value for name, value in parameters.items()
    }
    if route.query is not Nothing or request.args:
        arguments["query"] = _query(route.query, request)
    if route.query is Nothing:
        arguments.pop("query", None)
    if route.body is not None:
        arguments["body"] = _body(route.body, request)
    elif request.get_data(cache=False):
        raise BadRequest("The request has a body", why="this one takes none", fix="leave it out")
    answer = route.handler(services, **arguments)
    return respond(answer if isinstance(answer, Answer) else Answer(body=answer))


def respond(answer: Answer) -> Response:
    """Return an answer in Flask's form."""
    body = answer.body if isinstance(answer.body, bytes) else b""
    if isinstance(answer.body, dict):
        body = json.dumps(answer.body, ensure_ascii=False, separators=(",", ":")).encode("utf-8", "replace")
    response = Response(body, answer.status, answer.headers)
    if answer.body is None:
        del response.headers["Content-Type"]
    else:
        response.headers["Content-Type"] = answer.content_type
    response.headers["Cache-Control"] = "no-store"
    return response


def problem(error: DispatcherError) -> Response:
    """Return the problem document of an error."""
    headers = {}
    if error.retry_after is not None or error.status in {429, 503}:
        headers["Retry-After"] = str(max(1, math.ceil(error.retry_after or 1)))
    return respond(Answer(error.status, error.problem(), headers, "application/problem+json"))


def http_problem(error: HTTPException) -> Response:
    """Return the problem document of what Flask refuses by itself: 404, 405, 413, ..."""
    status = error.code or 500
    code = error.name.lower().replace(" ", "-")
    body = {"type": "about:blank", "title": error.name, "status": status, "detail": "", "fix": "", "code": code}
    headers = {}
    if status == 404:
        body |= {"detail": "there is no such path on this listener", "fix": "see /openapi.json"}
    elif status == 405:
        allowed = getattr(error, "valid_methods", None) or []
        headers["Allow"] = ", ".join(sorted(allowed))
        body |= {"detail": f"this path takes {headers['Allow']}", "fix": "see /openapi.json"}
    elif status == 413:
        body |= {"detail": f"a body has at most {MAX_BODY} bytes", "fix": "send less"}
    else:
        body |= {"detail": "the request is not understood", "fix": "see /openapi.json"}
    return respond(Answer(status, body, headers, "application/problem+json"))


def crash(error: Exception, request: Request) -> Response:
    """Log what should not have happened; show nothing of it."""
    _log.error("a request failed", method=request.method, path=request.path, exc_info=error)
    return problem(
        DispatcherError(
            "The manager failed to do that", why="something unexpected happened", fix="see the manager's log"
        )
    )


def built(model: type[BaseModel]) -> type[BaseModel]:
    """Return a model that can validate: each is built when it is first needed, by one thread."""
    if not model.__pydantic_complete__:
        with _building:
            if not model.__pydantic_complete__:
                model.model_rebuild()
    return model


def _body(model: type[BaseModel], request: Request) -> BaseModel:
    if request.mimetype != "application/json":
        raise UnsupportedMediaType(
            "The body is not JSON",
            why=f"its type is {names.printable(request.mimetype or 'not given')}",
            fix="send Content-Type: application/json",
        )
    data = request.get_data(cache=False)
    try:
        return built(model).model_validate_json(data)
    except ValidationError as error:
        raise _invalid("body", model, error) from None


def _query(model: type[BaseModel], request: Request) -> BaseModel:
    given: dict[str, str] = {}
    for name, values in request.args.lists():
        if len(values) > 1:
            raise BadRequest(f"The query gives {names.printable(name)} twice", fix="give it once")
        given[name] = values[0]
    try:
        return built(model).model_validate(given)
    except ValidationError as error:
        raise _invalid("query", model, error) from None


def _invalid(where: str, model: type[BaseModel], error: ValidationError) -> BadRequest:
    """Say what is wrong, and never what was given: it may be a password."""
    problems = []
    for item in error.errors(include_url=False, include_input=False, include_context=False):
        path = ".".join(names.printable(str(part))[1:-1] for part in item["loc"])
        if item["type"] == "extra_forbidden":
            problems.append(f"{path}: unknown, valid are: {', '.join(sorted(model.model_fields)) or 'none'}")
        elif item["type"] == "missing":
            problems.append(f"{path}: is missing")
        else:
            problems.append(f"{path}: {item['msg']}" if path else item["msg"])
    return BadRequest(f"The {where} is wrong", why="; ".join(problems[:10]), fix="see /openapi.json")
