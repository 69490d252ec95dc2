"""How bodies are read and answers written, the same for every route."""

from collections.abc import Callable, Coroutine, Mapping
from typing import Any

import orjson
from fastapi import Request, Response
from fastapi.routing import APIRoute
from starlette.concurrency import run_in_threadpool
from starlette.requests import ClientDisconnect

from server.middleware import ClientLeft
from server.refusals import UnsupportedMediaType
from server.schemas.json_body import parse_json

PARSED_INLINE_BYTES = 64 * 1024  # larger bodies are parsed off the event loop

Handler = Callable[[Request], Coroutine[Any, Any, Response]]  # Any: as FastAPI declares it


class StrictJsonRoute(APIRoute):
    """A route whose body is read by our own strict JSON parser before FastAPI sees it."""

    def get_route_handler(self) -> Handler:
        answer = super().get_route_handler()
        reads_body = self.body_field is not None

        async def handle(request: Request) -> Response:
            if reads_body:
                request = await _with_parsed_body(request)
            return await answer(request)

        return handle


def json_response(
    data: Any, headers: Mapping[str, str] | None = None
) -> Response:  # Any: JSON and numpy arrays
    """A 200 whose numbers are finite: what is not becomes null."""
    content = orjson.dumps(data, option=orjson.OPT_SERIALIZE_NUMPY)
    return Response(content, headers=dict(headers or {}), media_type="application/json")


async def _with_parsed_body(request: Request) -> Request:
    try:
        body = await request.body()
    except ClientDisconnect:
        raise ClientLeft from None
    if not body:
        return request
    media_type = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if media_type != "application/json":
        raise UnsupportedMediaType("the body must be sent with Content-Type: application/json")
    inline = len(body) <= PARSED_INLINE_BYTES
    value = parse_json(body) if inline else await run_in_threadpool(parse_json, body)
    return ParsedRequest(request, body, value)


class ParsedRequest(Request):
    """A request whose JSON is already known."""

    def __init__(self, request: Request, body: bytes, value: Any):  # Any: JSON
        super().__init__(request.scope, request.receive)
        self._body = body
        self._json = value
