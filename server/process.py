"""The serving process: listen, drain on a signal, leave nothing half done."""

import logging
import signal
import sys
import threading
import time
from collections.abc import Callable
from types import FrameType

import uvicorn
from starlette.types import ASGIApp

from server.build import Parts
from server.http_protocol import BoundedHttp

logger = logging.getLogger(__name__)

CLOSE_TIMEOUT_S = 3  # what open connections get after the last answer has ended


class DrainingServer(uvicorn.Server):
    """On the first signal: refuse new work, let running answers finish, then close. On the second: close now.

    The socket stays open while draining, so that readiness can say so.
    """

    def __init__(self, config: uvicorn.Config, parts: Parts, drain_timeout_s: float):
        super().__init__(config)
        self._parts = parts
        self._drain_timeout_s = drain_timeout_s
        self._drain: threading.Thread | None = None

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        if self._drain is not None:
            self.should_exit = self.force_exit = True
            return
        logger.info("draining", extra={"signal": signal.Signals(sig).name})
        for runner in self._parts.registry.runners:
            runner.begin_drain()
        self._drain = threading.Thread(target=self._finish, name="drain", daemon=True)
        self._drain.start()

    def _finish(self) -> None:
        deadline = time.monotonic() + self._drain_timeout_s
        for runner in self._parts.registry.runners:
            runner.stop(max(0.0, deadline - time.monotonic()))
        self.should_exit = True


def run(
    app: ASGIApp, parts: Parts, host: str, port: int, drain_timeout_s: float, announce: Callable[[int], None]
) -> None:
    """Serve until a signal; returns once everything is flushed and closed."""
    config = uvicorn.Config(
        app,
        host=host,
        port=port,
        http=BoundedHttp,
        ws="none",
        log_config=None,
        access_log=False,
        server_header=False,
        timeout_graceful_shutdown=CLOSE_TIMEOUT_S,
        timeout_keep_alive=30,
        backlog=512,
    )
    server = DrainingServer(config, parts, drain_timeout_s)
    parts.start()
    watcher = threading.Thread(target=_announce_when_started, args=(server, announce), daemon=True)
    watcher.start()
    try:
        server.run()
    finally:
        parts.stop(timeout_s=0.0)
    if not server.started:
        sys.exit(1)  # uvicorn has logged why it could not listen


def _announce_when_started(server: uvicorn.Server, announce: Callable[[int], None]) -> None:
    while not server.started and not server.should_exit:
        time.sleep(0.02)
    if server.started:
        announce(server.servers[0].sockets[0].getsockname()[1])
