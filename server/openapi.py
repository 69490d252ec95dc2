"""The description at /openapi.json: for every route every status that it can answer with, and what its errors look like.

FastAPI describes parameters, bodies and good answers. What is refused is decided in layers around the routes, which it
does not know, so it is added here.
"""

import re
from collections.abc import Iterator
from fnmatch import fnmatchcase
from http import HTTPStatus
from typing import Any

from fastapi import FastAPI
from fastapi.openapi.utils import get_openapi

from server.auth import ADMIN_PREFIX, METRICS_PATH, PUBLIC_PATHS

Json = dict[str, Any]  # Any: JSON

# What is too slow or too large is refused before anybody asks what it is for.
ANY_ROUTE = (408, 413, 431, 500)
WITH_API_KEY = (401, 429)
WITH_BODY = (400, 415)
WITH_PARAMETERS = (400,)
WITH_NAME_IN_PATH = (404,)
FOR_ADMINS = (403,)
BY_PATH: tuple[tuple[str, tuple[int, ...]], ...] = (
    ("/health*", (503,)),
    ("*/completions", (404, 409, 503)),
    ("*/v1/feedback", (404, 409, 503)),
    ("*/tokenize", (404,)),
    ("*/detokenize", (404,)),
    ("*/tokenizer_info", (404,)),
    ("/v1/keys*", (403, 409, 503)),
    ("/admin/*", (409, 503)),
)
ERROR: Json = {
    "type": "object",
    "description": "What every answer that is not 2xx holds, and the last event of a stream that failed.",
    "properties": {
        "error": {
            "type": "object",
            "properties": {
                "message": {"type": "string"},
                "type": {"type": "string"},
                "param": {"type": ["string", "null"], "description": "the field at fault, as a path"},
                "code": {"type": "string"},
            },
            "required": ["message", "type", "param", "code"],
            "additionalProperties": False,
        }
    },
    "required": ["error"],
    "additionalProperties": False,
}
PATH_PARAMETER = re.compile(r"\{(\w+)\}")
STRING: Json = {"schema": {"type": "string"}}
REQUEST_ID: Json = {"X-Request-Id": {"description": "the request's own, if sane, or a new one", **STRING}}
RETRY_AFTER: Json = {
    "Retry-After": {"description": "seconds", "schema": {"type": "string", "pattern": "^[0-9]+$"}}
}
HEADERS: dict[int, Json] = {
    401: {"WWW-Authenticate": STRING},
    409: {"x-should-retry": {"schema": {"const": "false"}}},
    429: RETRY_AFTER,
    503: RETRY_AFTER,
}


def describe(app: FastAPI) -> Json:
    """The OpenAPI description of an application, made once."""
    if app.openapi_schema is None:
        found = get_openapi(title=app.title, version=app.version, routes=app.routes)
        for path, operation in _operations(found):
            _complete(path, operation)
        components = found["components"]
        for generated in ("HTTPValidationError", "ValidationError"):
            components["schemas"].pop(generated, None)
        components["schemas"]["Error"] = ERROR
        components["securitySchemes"] = {"api_key": {"type": "http", "scheme": "bearer"}}
        app.openapi_schema = found
    return app.openapi_schema


def methods_at(app: FastAPI, path: str) -> list[str]:
    """What a path answers to. The router itself knows only one of its routes there."""
    found: set[str] = set()
    for template, operations in describe(app)["paths"].items():
        if re.fullmatch(re.sub(r"\\{\w+\\}", "[^/]+", re.escape(template)), path):
            found |= {method.upper() for method in operations}
    return sorted(found)


def statuses_refused(path: str, operation: Json) -> set[int]:
    """What a route may answer besides 200."""
    statuses = {*ANY_ROUTE}
    if path not in PUBLIC_PATHS:
        statuses |= {*WITH_API_KEY}
    if "requestBody" in operation:
        statuses |= {*WITH_BODY}
    if operation.get("parameters"):
        statuses |= {*WITH_PARAMETERS}
    if "{" in path:
        statuses |= {*WITH_NAME_IN_PATH}
    if path.startswith(ADMIN_PREFIX):
        statuses |= {*FOR_ADMINS}
    for pattern, more in BY_PATH:
        if fnmatchcase(path, pattern):
            statuses |= {*more}
    return statuses


def _operations(description: Json) -> Iterator[tuple[str, Json]]:
    for path, operations in description["paths"].items():
        for operation in operations.values():
            yield path, operation


def _complete(path: str, operation: Json) -> None:
    responses = operation["responses"]
    responses.pop("422", None)  # answered as 400
    for response in responses.values():
        response["headers"] = REQUEST_ID | response.get("headers", {})
    given = operation.setdefault("parameters", [])
    for name in PATH_PARAMETER.findall(path):
        if name not in [each["name"] for each in given]:
            given.insert(0, {"name": name, "in": "path", "required": True, "schema": {"type": "string"}})
    for status in sorted(statuses_refused(path, operation)):
        responses[str(status)] = {
            "description": HTTPStatus(status).phrase,
            "headers": REQUEST_ID | HEADERS.get(status, {}),
            "content": {"application/json": {"schema": {"$ref": "#/components/schemas/Error"}}},
        }
    if path == METRICS_PATH:
        operation["security"] = [{}, {"api_key": []}]  # as configured
    elif path not in PUBLIC_PATHS:
        operation["security"] = [{"api_key": []}]
