"""HTTP as it arrives: a request's head in bounded size and time, and an error object for what is no HTTP.

uvicorn's protocol does everything else. Knows no routes; bodies are bounded in `server.middleware`.
"""

import asyncio
import uuid

import orjson
from uvicorn.protocols.http.httptools_impl import STATUS_LINE, HttpToolsProtocol

from server.errors import Problem

MAX_HEAD_BYTES = 16 * 1024
HEAD_TIMEOUT_S = 10.0
LINGER_S = 2.0  # what a refused sender still writes is dropped for so long, so that it gets to see the answer

NOT_HTTP = Problem(400, "invalid_request_error", "invalid_http", "this is not a valid HTTP request")
TOO_LARGE = Problem(
    431,
    "invalid_request_error",
    "request_headers_too_large",
    f"the address and the headers are too large; allowed: {MAX_HEAD_BYTES} bytes",
)
TOO_SLOW = Problem(
    408,
    "invalid_request_error",
    "request_timeout",
    f"the headers did not arrive within {HEAD_TIMEOUT_S:g} s",
)


class HeadTooLarge(Exception):
    """Ends parsing."""


class BoundedHttp(HttpToolsProtocol):
    """One connection."""

    _head_timer: asyncio.TimerHandle | None = None
    _in_head = False
    _field_bytes = 0  # of the head's address and headers that are complete
    _chunk_bytes = 0  # of the chunks since the head began that belong to it as a whole
    _problem = NOT_HTTP  # what there is to say if parsing ends here
    _refused = False
    _has_begun = False  # there was a request

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._start_timer()

    def connection_lost(self, exc: Exception | None) -> None:
        self._stop_timer()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        if self._refused:
            return
        began_before = self._in_head
        super().data_received(data)
        if began_before and self._in_head and not self._refused:
            self._chunk_bytes += len(data)
            if self._chunk_bytes > MAX_HEAD_BYTES:
                self._refuse(TOO_LARGE)

    def on_message_begin(self) -> None:
        super().on_message_begin()
        self._in_head, self._field_bytes, self._chunk_bytes = True, 0, 0
        self._start_timer()

    def on_url(self, url: bytes) -> None:
        self._count(len(url))
        super().on_url(url)

    def on_header(self, name: bytes, value: bytes) -> None:
        self._count(len(name) + len(value))
        super().on_header(name, value)

    def on_headers_complete(self) -> None:
        self._in_head = False
        self._stop_timer()
        super().on_headers_complete()
        self._has_begun = True

    def send_400_response(self, msg: str) -> None:
        """What uvicorn calls when parsing has failed."""
        self._refuse(self._problem)

    def _count(self, size_bytes: int) -> None:
        self._field_bytes += size_bytes
        if self._field_bytes > MAX_HEAD_BYTES:
            self._problem = TOO_LARGE
            raise HeadTooLarge

    def _start_timer(self) -> None:
        self._stop_timer()
        self._head_timer = self.loop.call_later(HEAD_TIMEOUT_S, self._give_up)

    def _stop_timer(self) -> None:
        if self._head_timer is not None:
            self._head_timer.cancel()
            self._head_timer = None

    def _give_up(self) -> None:
        if self._in_head:
            self._refuse(TOO_SLOW)
        else:
            self.transport.close()

    def _refuse(self, problem: Problem) -> None:
        """Answer, unless another answer is being written, and close."""
        self._refused = True
        self._stop_timer()
        if self._has_begun and not self.cycle.response_complete:
            if self.pipeline or self.cycle.response_started:
                self.transport.close()
                return
            self.cycle.disconnected = True  # a request whose body is none: nobody waits for its own answer
            self.cycle.message_event.set()
        content = orjson.dumps(problem.body())
        headers = [
            *self.server_state.default_headers,
            (b"content-type", b"application/json"),
            (b"content-length", str(len(content)).encode()),
            (b"connection", b"close"),
            (b"x-request-id", f"req-{uuid.uuid4().hex}".encode()),
        ]
        lines = [name + b": " + value + b"\r\n" for name, value in headers]
        self.transport.write(b"".join([STATUS_LINE[problem.status], *lines, b"\r\n", content]))
        self.transport.write_eof()
        self.loop.call_later(LINGER_S, self.transport.close)
