"""What happens around every request: an id, limits on the body, a log line, errors as JSON. Plain ASGI."""

import asyncio
import logging
import re
import time
import uuid
from collections.abc import Callable
from dataclasses import replace

from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from server.errors import Problem, problem_of
from server.exchange import EXCHANGE, Exchange
from server.refusals import BodyTooLarge, BodyTooSlow

SANE_REQUEST_ID = re.compile(r"[A-Za-z0-9._-]{1,128}")
LINGER_S = 2.0  # a refused body is still read for so long, so that its sender gets to see the answer
LINGER_BYTES = 64 * 1024 * 1024
CLIENT_CLOSED = 499  # the client left before there was a status to send; only the log knows it

access = logging.getLogger("server.access")
logger = logging.getLogger(__name__)


class ClientLeft(ConnectionError):
    """Nobody is left to answer."""


class RequestContext:
    """Outermost: gives the request its id, answers every error that comes up, writes the access log."""

    def __init__(self, app: ASGIApp, count_rejected: Callable[[str], None]):
        self._app = app
        self._count_rejected = count_rejected

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        started = time.monotonic()
        exchange = Exchange(_request_id(Headers(scope=scope).get("x-request-id")))
        scope.setdefault("state", {})[EXCHANGE] = exchange
        status = 0

        async def send_with_id(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                MutableHeaders(scope=message)["X-Request-Id"] = exchange.request_id
            await send(message)

        try:
            await self._app(scope, receive, send_with_id)
        except ClientLeft:
            status = status or CLIENT_CLOSED
        except Exception as error:  # noqa: BLE001 - the last resort: answered, logged, counted
            problem = problem_of(error)
            if problem.status == 500 or status:
                log_failure(error, exchange)
            if not status:
                await self._answer(problem, scope, receive, send_with_id)
        finally:
            _log_access(scope, exchange, status, time.monotonic() - started)

    async def _answer(self, problem: Problem, scope: Scope, receive: Receive, send: Send) -> None:
        self._count_rejected(problem.code)
        if problem.status == 500:
            problem = replace(problem, message=f"{problem.message} {Exchange.of(scope).request_id}")
        await problem.response()(scope, receive, send)


class BodyLimit:
    """Bounds how large a body may be and how long it may take, before anything looks into it."""

    def __init__(self, app: ASGIApp, max_body_bytes: int, receive_timeout_s: float):
        self._app = app
        self._max_body_bytes = max_body_bytes
        self._timeout_s = receive_timeout_s

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        headers = Headers(scope=scope)
        declared = headers.get("content-length", "0")
        if not declared.isdecimal() or int(declared) > self._max_body_bytes:
            if "expect" not in headers:
                await _linger(receive)
            raise self._too_large()
        await self._app(scope, self._limited(receive), send)

    def _limited(self, receive: Receive) -> Receive:
        received = 0
        complete = False
        deadline = time.monotonic() + self._timeout_s

        async def receive_within_limits() -> Message:
            nonlocal received, complete
            if complete:
                return await receive()  # only a disconnect can come now
            try:
                async with asyncio.timeout(deadline - time.monotonic()):
                    message = await receive()
            except TimeoutError:
                raise BodyTooSlow(f"the body did not arrive within {self._timeout_s:g} s") from None
            received += len(message.get("body", b""))
            complete = not message.get("more_body", False)
            if received > self._max_body_bytes:
                if not complete:
                    await _linger(receive)
                raise self._too_large()
            return message

        return receive_within_limits

    def _too_large(self) -> BodyTooLarge:
        return BodyTooLarge(f"the body is too large; allowed: {self._max_body_bytes} bytes")


async def _linger(receive: Receive) -> None:
    """Read and drop the rest of a refused body: to close on a client that still sends loses the answer."""
    dropped = 0
    try:
        async with asyncio.timeout(LINGER_S):
            while dropped < LINGER_BYTES:
                message = await receive()
                dropped += len(message.get("body", b""))
                if not message.get("more_body", False):
                    return
    except TimeoutError:
        return


def log_failure(error: Exception, exchange: Exchange) -> None:
    """Where an error came from, under the id that the client was told."""
    logger.error("a request failed", exc_info=error, extra={"request_id": exchange.request_id})


def _request_id(given: str | None) -> str:
    if given is not None and SANE_REQUEST_ID.fullmatch(given):
        return given
    return f"req-{uuid.uuid4().hex}"


def _log_access(scope: Scope, exchange: Exchange, status: int, duration_s: float) -> None:
    route = scope.get("route")
    access.info(
        "request",
        extra={
            "request_id": exchange.request_id,
            "method": scope["method"],
            "route": getattr(route, "path", "unmatched"),  # the template: a path may hold anything
            "status": status,
            "duration_ms": round(duration_s * 1000, 1),
            "tenant": exchange.caller.tenant if exchange.caller else None,
            **exchange.facts,
        },
    )
