"""Declares the requests of a role, and validates each against the signature of its handler.

A handler takes the services, the parameters of its path, then the members of its query or JSON body by name:
those of PUT and POST come from the body, except `wait`, all others from the query.  It returns what Flask takes:
a JSON object, or one with a status and header fields; None is 204.
"""

from __future__ import annotations

import inspect
import typing
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from flask import Request, Response
from pydantic import BaseModel, ConfigDict, ValidationError, create_model

from dispatcher.config.messages import nearest
from dispatcher.manager.rest.services import Services
from dispatcher.plugin import names
from dispatcher.plugin.errors import BadRequest

Json = dict[str, Any]
Answer = Json | tuple[Json, int] | tuple[Json, int, dict[str, str]] | Response | None
Handler = Callable[..., Answer]


class UnsupportedMediaType(BadRequest):
    """The body is not JSON."""

    code, status = "unsupported-media-type", 415


class Query(BaseModel):
    """A request's query.  An unknown member is refused, so that a misspelt one is not ignored."""

    model_config = ConfigDict(extra="forbid", hide_input_in_errors=True)


class Body(Query):
    """A request's JSON body: a number in quotes is not a number."""

    model_config = ConfigDict(strict=True)


@dataclass(frozen=True)
class Route:
    """One request of the interface.

    :ivar path: in Flask's form; ``<agent>`` is made canonical, other parameters are taken as they are.
    :ivar answers: status -> type of the answer: a TypedDict, `str` for plain text, None for no body.
    :ivar scope: of the API tokens that may send it.
    """

    method: str
    path: str
    handler: Handler
    answers: dict[int, Any]
    scope: str

    @cached_property
    def query(self) -> type[BaseModel]:
        """The model of the query."""
        return self._model(Query, lambda name: self.method in {"GET", "DELETE"} or name == "wait")

    @cached_property
    def body(self) -> type[BaseModel]:
        """The model of the body; one without fields when there must be none."""
        return self._model(Body, lambda name: self.method in {"PUT", "POST"} and name != "wait")

    def _model(self, base: type[BaseModel], belongs: Callable[[str], bool]) -> type[BaseModel]:
        """Build a model of some of the handler's parameters, when it is first used: the start is short."""
        types = typing.get_type_hints(self.handler, include_extras=True)
        fields: dict[str, Any] = {
            name: (types[name], ... if parameter.default is parameter.empty else parameter.default)
            for name, parameter in list(inspect.signature(self.handler).parameters.items())[1:]
            if f"<{name}>" not in self.path and belongs(name)
        }
        return create_model(self.handler.__name__, __base__=base, **fields)

    def call(self, services: Services, request: Request, parameters: dict[str, str]) -> Answer:
        """Validate a request and return its answer.

        :raises DispatcherError: why it was refused.
        """
        arguments: dict[str, Any] = {
            name: names.agent_name(value) if name == "agent" else value for name, value in parameters.items()
        }
        arguments |= dict(_query(self.query, request))
        if self.body.model_fields:
            arguments |= dict(_body(self.body, request))
        elif request.get_data(cache=False):
            raise BadRequest("The request has a body", why="this request takes none", fix="leave it out")
        return self.handler(services, **arguments)


class Routes(list[Route]):
    """The requests of one role."""

    def add(
        self, method: str, path: str, answers: dict[int, Any], *, scope: str = ""
    ) -> Callable[[Handler], Handler]:
        """Declare the decorated function as the handler of a request; its docstring is the summary.

        :param scope: of the API tokens that may send it; by default *read* for GET, *admin* for other methods.
        """
        scope = scope or ("read" if method == "GET" else "admin")

        def declare(handler: Handler) -> Handler:
            self.append(Route(method, path, handler, answers, scope))
            return handler

        return declare


def _body(model: type[BaseModel], request: Request) -> BaseModel:
    if request.mimetype != "application/json":
        raise UnsupportedMediaType(
            "The body is not JSON",
            why=f"its type is {names.printable(request.mimetype or 'not given')}",
            fix="send Content-Type: application/json",
        )
    try:
        return model.model_validate_json(request.get_data(cache=False))
    except ValidationError as error:
        raise _invalid("body", model, error) from None


def _query(model: type[BaseModel], request: Request) -> BaseModel:
    for name, values in request.args.lists():
        if len(values) > 1:
            raise BadRequest(f"The query contains {names.printable(name)} twice", fix="give it once")
    try:
        return model.model_validate(request.args.to_dict())
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
