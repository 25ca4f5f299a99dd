"""`/openapi.json`: derived from the routes and models that do the work, so that it cannot say something else."""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Any

from pydantic import BaseModel

from dispatcher import __version__
from dispatcher.manager.agents.lifecycle import Desired, State
from dispatcher.manager.rest.routing import Route, built
from dispatcher.manager.rest.schemas import Nothing
from dispatcher.plugin.model import Capability, Isolation, Level

Schema = dict[str, Any]

_PARAMETER = re.compile(r"<(?:[a-z]+:)?([a-z_]+)>")
_STRING: Schema = {"type": "string"}
_NUMBER: Schema = {"type": "number"}
_INTEGER: Schema = {"type": "integer"}
_BOOLEAN: Schema = {"type": "boolean"}
_TIME: Schema = {"type": "string", "format": "date-time"}
_STRINGS: Schema = {"type": "array", "items": _STRING}
_PATH_TEXTS = {
    "agent": "name of an agent: USER or USER:APP",
    "id": "public id of a session: the first 16 hexadecimal digits of its token's SHA-256",
    "provider": "name of a provider",
}


def _object(optional: Iterable[str] = (), **members: Schema) -> Schema:
    left_out = set(optional)
    return {
        "type": "object",
        "properties": members,
        "required": [name for name in members if name not in left_out],
    }


def _list(name: str, items: Schema) -> Schema:
    return _object(**{name: {"type": "array", "items": items}})


def _or_null(schema: Schema) -> Schema:
    return {"anyOf": [schema, {"type": "null"}]}


def _ref(name: str) -> Schema:
    return {"$ref": f"#/components/schemas/{name}"}


def _enum(values: Iterable[str]) -> Schema:
    return {"type": "string", "enum": list(values)}


_STATE_MEMBERS: dict[str, Schema] = {
    "state": _enum(state.value for state in State),
    "desired": _enum(state.value for state in Desired),
    "stage": _STRING,
    "detail": _STRING,
    "fraction": _or_null(_NUMBER),
    "since": _TIME,
    "failure": _or_null(_object(what=_STRING, why=_STRING, fix=_STRING, log=_STRINGS)),
    "outdated": _BOOLEAN,
}

#: The forms of answers, by name.
SCHEMAS: dict[str, Schema] = {
    "Agent": _object(
        name=_STRING,
        user=_STRING,
        app=_STRING,
        provider=_STRING,
        **_STATE_MEMBERS,
        last_used=_or_null(_TIME),
        created=_TIME,
        reachable=_BOOLEAN,
        observed_at=_or_null(_TIME),
        move=_or_null(_object(**{"from": _STRING, "to": _STRING, "step": _STRING, "since": _TIME})),
    ),
    "AgentList": _list("agents", _ref("Agent")),
    "State": _object(**_STATE_MEMBERS),
    "Runtime": {"type": "object"},
    "Logs": _object(lines=_STRINGS, cursor=_STRING),
    "Events": _list("events", _object(time=_TIME, kind=_STRING, detail=_STRING)),
    "User": _object(user=_STRING),
    "Why": _object(agent=_STRING, sentences=_STRINGS),
    "Copies": _list(
        "copies",
        _object(
            id=_or_null(_INTEGER),
            provider=_STRING,
            kind=_enum(["directory", "provider"]),
            time=_TIME,
            why=_STRING,
            size=_or_null(_INTEGER),
        ),
    ),
    "Purged": _object(purged=_INTEGER),
    "ListedSession": _object(
        id=_STRING,
        user=_STRING,
        agent=_STRING,
        created=_TIME,
        last_used=_TIME,
        expires=_TIME,
        address=_STRING,
        user_agent=_STRING,
    ),
    "SessionList": _list("sessions", _ref("ListedSession")),
    "Revoked": _object(revoked=_INTEGER),
    "ProviderList": _list(
        "providers",
        _object(
            name=_STRING,
            isolation=_enum(level.name.lower() for level in Isolation),
            capabilities={"type": "array", "items": _enum(item.value for item in Capability)},
            distribution=_STRING,
            usable=_BOOLEAN,
            error=_or_null(_STRING),
        ),
    ),
    "Findings": _list("findings", _object(level=_enum(level.value for level in Level), what=_STRING, fix=_STRING)),
    "MemoryUsage": _object(
        total=_INTEGER,
        average=_NUMBER,
        agents={"type": "array", "items": _object(name=_STRING, memory=_or_null(_INTEGER))},
    ),
    "Top": _list("agents", {"type": "object"}),
    "Reloaded": _object(changed=_STRINGS),
    "Session": _object(
        ("parent", "host"),
        sha256=_STRING,
        user=_STRING,
        agent=_STRING,
        agents=_STRINGS,
        ttl=_NUMBER,
        lifetime=_NUMBER,
        created=_TIME,
        parent=_STRING,
        host=_STRING,
    ),
    "SignedIn": _object(token=_STRING, device=_STRING, session=_ref("Session")),
    "Renewed": _object(token=_STRING, session=_ref("Session")),
    "Code": _object(code=_STRING),
    "Health": _object(
        ("version", "problems", "feed_connections"),
        status=_enum(["ok", "degraded"]),
        version=_STRING,
        problems=_STRINGS,
        feed_connections=_INTEGER,
    ),
    "object": {"type": "object"},
    "Problem": {
        **_object(type=_STRING, title=_STRING, status=_INTEGER, detail=_STRING, fix=_STRING, code=_STRING),
        "description": "RFC 9457",
    },
}


def document(role: str, routes: Iterable[Route]) -> Schema:
    """Return the OpenAPI description of one role's requests."""
    paths: dict[str, Schema] = {}
    for route in routes:
        path = _PARAMETER.sub(r"{\1}", route.path)
        paths.setdefault(path, {})[route.method.lower()] = _operation(route)
    paths["/openapi.json"] = {
        "get": {"summary": "Describe this interface", "responses": {"200": _response(200, "object")}}
    }
    return {
        "openapi": "3.1.0",
        "info": {"title": f"dispatcher manager, role {role}", "version": __version__},
        "paths": paths,
        "components": {
            "schemas": SCHEMAS,
            "securitySchemes": {
                "token": {"type": "http", "scheme": "bearer", "description": "over TCP"},
                "certificate": {"type": "mutualTLS", "description": "over TCP"},
            },
        },
    }


def _operation(route: Route) -> Schema:
    operation: Schema = {"summary": route.summary, "operationId": route.handler.__name__}
    parameters: list[Schema] = [
        {
            "name": name,
            "in": "path",
            "required": True,
            "schema": _STRING,
            "description": _PATH_TEXTS[name],
        }
        for name in _PARAMETER.findall(route.path)
    ]
    parameters += _query(route.query)
    if parameters:
        operation["parameters"] = parameters
    if route.body is not None:
        schema = _plain(built(route.body).model_json_schema())
        operation["requestBody"] = {"required": True, "content": {"application/json": {"schema": schema}}}
    operation["responses"] = {
        **{str(status): _response(status, schema) for status, schema in route.answers.items()},
        "default": {
            "description": "what went wrong",
            "content": {"application/problem+json": {"schema": _ref("Problem")}},
        },
    }
    return operation


def _query(model: type[BaseModel]) -> list[Schema]:
    if model is Nothing:
        return []
    schema = _plain(built(model).model_json_schema())
    required = schema.get("required", [])
    return [
        {"name": name, "in": "query", "required": name in required, "schema": member}
        for name, member in schema["properties"].items()
    ]


def _plain(schema: Any) -> Any:
    """Return a schema without the titles that pydantic makes up."""
    if isinstance(schema, dict):
        return {
            key: _plain(value) for key, value in schema.items() if key != "title" or not isinstance(value, str)
        }
    return [_plain(item) for item in schema] if isinstance(schema, list) else schema


def _response(status: int, schema: str) -> Schema:
    texts = {200: "done", 201: "made", 202: "begun", 204: "done"}
    if not schema:
        return {"description": texts[status]}
    if schema == "text/plain":
        return {"description": texts[status], "content": {"text/plain": {"schema": _STRING}}}
    return {"description": texts[status], "content": {"application/json": {"schema": _ref(schema)}}}
