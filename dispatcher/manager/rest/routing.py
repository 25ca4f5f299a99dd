"""Declares the requests of a role, and validates each against the models of its handler.

A handler takes the services, the parameters of its path, and `body` and `query` if its annotations name models
for them.  It returns what Flask takes: a JSON object, or one with a status and header fields; None is 204.
"""

from __future__ import annotations

import functools
import threading
import typing
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from flask import Request, Response
from pydantic import BaseModel, ValidationError

from dispatcher.config.messages import nearest
from dispatcher.manager.rest.schemas import Nothing
from dispatcher.manager.rest.services import Services
from dispatcher.plugin import names
from dispatcher.plugin.errors import BadRequest

Json = dict[str, Any]
Answer = Json | tuple[Json, int] | tuple[Json, int, dict[str, str]] | Response | None
Handler = Callable[..., Answer]

MAX_BODY = 65536  # bytes

_building = threading.Lock()


class UnsupportedMediaType(BadRequest):
    """The body is not JSON."""

    code, status = "unsupported-media-type", 415


@dataclass(frozen=True, slots=True)
class Route:
    """One request of the interface.

    :ivar path: in Flask's form; ``<agent>`` is made canonical, other parameters are taken as they are.
    :ivar answers: status -> type of the answer: a TypedDict, `str` for plain text, None for no body.
    """

    method: str
    path: str
    handler: Handler
    answers: dict[int, Any]

    def model(self, name: str) -> type[BaseModel] | None:
        """Return the model of the handler's argument `body` or `query`, if it takes one."""
        return _annotations(self.handler).get(name)

    def call(self, services: Services, request: Request, parameters: dict[str, str]) -> Answer:
        """Validate a request and return its answer.

        :raises DispatcherError: why it was refused.
        """
        arguments: dict[str, Any] = {
            name: names.agent_name(value) if name == "agent" else value for name, value in parameters.items()
        }
        model = self.model("query")
        query = _query(model or Nothing, request)
        if model:
            arguments["query"] = query
        if model := self.model("body"):
            arguments["body"] = _body(model, request)
        elif request.get_data(cache=False):
            raise BadRequest("The request has a body", why="this request takes none", fix="leave it out")
        return self.handler(services, **arguments)


class Routes(list[Route]):
    """The requests of one role."""

    def add(self, method: str, path: str, answers: dict[int, Any]) -> Callable[[Handler], Handler]:
        """Declare the decorated function as the handler of a request; its docstring is the summary."""

        def declare(handler: Handler) -> Handler:
            self.append(Route(method, path, handler, answers))
            return handler

        return declare


@functools.cache
def _annotations(handler: Handler) -> dict[str, Any]:
    return typing.get_type_hints(handler)


def _built(model: type[BaseModel]) -> type[BaseModel]:
    """Return a model that can validate.  Each is built when it is first used, which keeps the start short."""
    if not model.__pydantic_complete__:
        with _building:
            model.model_rebuild()
    return model


def _body(model: type[BaseModel], request: Request) -> BaseModel:
    if request.mimetype != "application/json":
        raise UnsupportedMediaType(
            "The body is not JSON",
            why=f"its type is {names.printable(request.mimetype or 'not given')}",
            fix="send Content-Type: application/json",
        )
    try:
        return _built(model).model_validate_json(request.get_data(cache=False))
    except ValidationError as error:
        raise _invalid("body", model, error) from None


def _query(model: type[BaseModel], request: Request) -> BaseModel:
    for name, values in request.args.lists():
        if len(values) > 1:
            raise BadRequest(f"The query contains {names.printable(name)} twice", fix="give it once")
    try:
        return _built(model).model_validate(request.args.to_dict())
    except ValidationError as error:
        raise _invalid("query", model, error) from None


def _invalid(where: str, model: type[BaseModel], error: ValidationError) -> BadRequest:
    """Return the error that names each fault, but no value: it may be a password."""
    faults = []
    for item in error.errors(include_url=False, include_input=False, include_context=False)[:10]:
        path = ".".join(names.printable(str(part))[1:-1] for part in item["loc"])
        if item["type"] == "extra_forbidden":
            faults.append(f"{path}: unknown{nearest(str(item['loc'][-1]), model)}")
        elif item["type"] == "missing":
            faults.append(f"{path}: is missing")
        else:
            faults.append(f"{path}: {item['msg']}" if path else item["msg"])
    return BadRequest(f"The {where} is not valid", why="; ".join(faults), fix="see /openapi.json")
