"""Answers that are written while they come into being, and work that stops when its reader leaves."""

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Coroutine, Mapping, Sequence
from contextlib import aclosing
from typing import Any, TypeVar

import orjson
from starlette.responses import Response
from starlette.types import Message, Receive, Scope, Send

from server.answer_text import TextDelta
from server.errors import problem_of
from server.exchange import Exchange
from server.generation import Generation
from server.middleware import ClientLeft, log_failure

SEND_TIMEOUT_S = 30.0  # a client that takes no byte for so long has left
DONE = b"data: [DONE]\n\n"

T = TypeVar("T")


def sse(data: Any) -> bytes:  # Any: JSON
    """One server-sent event."""
    return b"data: " + orjson.dumps(data) + b"\n\n"


class EventStream(Response):
    """Server-sent events from a generator, which is closed as soon as the client leaves."""

    media_type = "text/event-stream"

    def __init__(
        self,
        events: AsyncGenerator[bytes],
        headers: Mapping[str, str],
        ending: bytes = b"",
        release: Callable[[], None] = lambda: None,
    ):
        super().__init__(headers={**headers, "Cache-Control": "no-cache", "X-Accel-Buffering": "no"})
        del self.headers["content-length"]
        self._events = events
        self._ending = ending
        self._release = release

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        start: Message = {
            "type": "http.response.start",
            "status": self.status_code,
            "headers": self.raw_headers,
        }
        try:
            await send(start)
            await stop_when_left(receive, self._write(scope, send))
        finally:
            self._release()

    async def _write(self, scope: Scope, send: Send) -> None:
        async with aclosing(self._events) as events:
            try:
                async for event in events:
                    await _send_in_time(send, event, more=True)
            except ClientLeft:
                raise
            except Exception as error:  # noqa: BLE001 - the stream has begun: told in it, and logged
                exchange = Exchange.of(scope)
                log_failure(error, exchange)
                await _send_in_time(send, sse(problem_of(error).body()), more=True)
        await _send_in_time(send, self._ending, more=False)


async def stop_when_left(receive: Receive, work: Coroutine[Any, Any, T]) -> T:  # Any: what a coroutine yields
    """The result of `work`, which is cancelled when the client disconnects. Raises ClientLeft then."""
    working = asyncio.ensure_future(work)
    leaving = asyncio.ensure_future(_disconnected(receive))
    try:
        await asyncio.wait((working, leaving), return_when=asyncio.FIRST_COMPLETED)
        if not working.done():
            raise ClientLeft
        return working.result()
    finally:
        for task in (working, leaving):
            task.cancel()
        await asyncio.gather(working, leaving, return_exceptions=True)


async def interleaved(generations: Sequence[Generation]) -> AsyncGenerator[tuple[int, TextDelta]]:
    """Deltas of several answers as they come, each with its answer's index. Cancels all when left early."""
    streams = [generation.deltas() for generation in generations]
    pending = {_next_of(stream): index for index, stream in enumerate(streams)}
    try:
        while pending:
            done, _ = await asyncio.wait(pending, return_when=asyncio.FIRST_COMPLETED)
            for task in sorted(done, key=pending.__getitem__):
                index = pending.pop(task)
                delta = task.result()
                if delta is None:
                    continue
                yield index, delta
                pending[_next_of(streams[index])] = index
    finally:
        for generation in generations:
            generation.cancel()
        for task in pending:
            task.cancel()
        await asyncio.gather(*pending, return_exceptions=True)


def _next_of(stream: AsyncIterator[TextDelta]) -> asyncio.Future[TextDelta | None]:
    return asyncio.ensure_future(anext(stream, None))


async def _disconnected(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


async def _send_in_time(send: Send, body: bytes, *, more: bool) -> None:
    try:
        async with asyncio.timeout(SEND_TIMEOUT_S):
            await send({"type": "http.response.body", "body": body, "more_body": more})
    except TimeoutError:
        raise ClientLeft from None
