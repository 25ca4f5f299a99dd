"""`/openapi.json`, derived from the routes and models that answer requests."""

from __future__ import annotations

import functools
import re
from typing import Any

from pydantic import TypeAdapter
from pydantic.json_schema import GenerateJsonSchema

from dispatcher import __version__
from dispatcher.manager.rest.routing import Json, Route, Routes
from dispatcher.manager.rest.schemas import Problem
from dispatcher.manager.rest.services import Services

_REF = "#/components/schemas/{model}"
_PARAMETER = re.compile(r"<([a-z_]+)>")
_PATH_PARAMETERS = {
    "user": "name of the user",
    "agent": "name of an agent: USER or USER:APP",
    "id": "public id of a session or an API token: the first 16 hexadecimal digits of the token's SHA-256",
    "provider": "name of a provider",
}
_DESCRIPTIONS = {200: "done", 201: "made", 202: "begun", 204: "done"}


class _Untitled(GenerateJsonSchema):
    """Leaves out the titles that pydantic makes of members' names."""

    def field_title_should_be_set(self, schema: Any) -> bool:
        return False


def describe(role: str, routes: Routes) -> None:
    """Add the route that describes a role's requests, itself included."""

    @functools.cache
    def described() -> Json:
        return document(role, routes)

    def openapi_json(_services: Services) -> Json:
        """Describe this interface."""
        return described()

    routes.add("GET", "/openapi.json", {200: dict})(openapi_json)


def document(role: str, routes: Routes) -> Json:
    """Return the OpenAPI description of one role's requests."""
    types = {answer for route in routes for answer in route.answers.values() if answer not in {None, str}}
    schemas, definitions = TypeAdapter.json_schemas(
        [(answer, "serialization", TypeAdapter(answer)) for answer in {*types, Problem}],
        ref_template=_REF,
        schema_generator=_Untitled,
    )
    paths: dict[str, Json] = {}
    for route in routes:
        path = _PARAMETER.sub(r"{\1}", route.path)
        operation = _operation(route, {answer: schema for (answer, _), schema in schemas.items()})
        if role == "admin":
            operation["x-scope"] = route.scope  # of API tokens that may send it
        paths.setdefault(path, {})[route.method.lower()] = operation
    return {
        "openapi": "3.1.0",
        "info": {"title": f"dispatcher manager, role {role}", "version": __version__},
        "paths": paths,
        "components": {
            "schemas": definitions["$defs"],
            "securitySchemes": {
                "token": {"type": "http", "scheme": "bearer", "description": "over TCP"},
                "certificate": {"type": "mutualTLS", "description": "over TCP"},
            },
        },
    }


def _operation(route: Route, schemas: dict[Any, Any]) -> Json:
    operation: Json = {
        "summary": " ".join((route.handler.__doc__ or "").split("\n\n")[0].split()),
        "operationId": route.handler.__name__,
    }
    parameters: list[Json] = [
        {
            "name": name,
            "in": "path",
            "required": True,
            "schema": {"type": "string"},
            "description": _PATH_PARAMETERS[name],
        }
        for name in _PARAMETER.findall(route.path)
    ]
    schema = route.query.model_json_schema(schema_generator=_Untitled)
    parameters += [
        {"name": name, "in": "query", "required": name in schema.get("required", ()), "schema": member}
        for name, member in schema["properties"].items()
    ]
    if parameters:
        operation["parameters"] = parameters
    if route.body.model_fields:
        schema = route.body.model_json_schema(schema_generator=_Untitled)
        operation["requestBody"] = {"required": True, "content": {"application/json": {"schema": schema}}}
    operation["responses"] = {
        **{str(status): _response(status, answer, schemas) for status, answer in route.answers.items()},
        "default": {
            "description": "what went wrong",
            "content": {"application/problem+json": {"schema": schemas[Problem]}},
        },
    }
    return operation


def _response(status: int, answer: Any, schemas: dict[Any, Any]) -> Json:
    response: Json = {"description": _DESCRIPTIONS[status]}
    if answer is str:
        response["content"] = {"text/plain": {"schema": {"type": "string"}}}
    elif answer is not None:
        response["content"] = {"application/json": {"schema": schemas[answer]}}
    return response
