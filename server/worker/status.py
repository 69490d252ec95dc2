"""What a worker tells about itself over HTTP: /metrics, /health/live, /health/ready. Serves nothing else."""

import json
import threading
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

from prometheus_client import CollectorRegistry, generate_latest

JSON, METRICS = "application/json", "text/plain; version=0.0.4; charset=utf-8"
REQUEST_TIMEOUT_S = 5.0


class StatusServer:
    """Listens from its creation, answers from `start` to `stop`. Raises OSError when the port is taken.

    `live` and `ready` give what is wrong, None when nothing is.
    """

    def __init__(
        self,
        host: str,
        port: int,
        registry: CollectorRegistry,
        live: Callable[[], str | None],
        ready: Callable[[], str | None],
    ) -> None:
        class Handler(BaseHTTPRequestHandler):
            timeout = REQUEST_TIMEOUT_S

            def do_GET(self) -> None:
                match self.path:
                    case "/metrics":
                        self._answer(200, METRICS, generate_latest(registry))
                    case "/health/live":
                        self._tell("live", live())
                    case "/health/ready" | "/health":
                        self._tell("ready", ready())
                    case _:
                        self._answer(404, JSON, b'{"error":{"message":"there is nothing at this path"}}')

            def _tell(self, fine: str, fault: str | None) -> None:
                status = {"status": fine} if fault is None else {"status": f"not {fine}", "reason": fault}
                self._answer(200 if fault is None else 503, JSON, json.dumps(status).encode())

            def _answer(self, code: int, kind: str, body: bytes) -> None:
                self.send_response(code)
                self.send_header("Content-Type", kind)
                self.send_header("Content-Length", str(len(body)))
                self.end_headers()
                self.wfile.write(body)

            def version_string(self) -> str:
                return "libration"

            def log_message(self, format: str, *args: object) -> None:  # noqa: A002 - the library's name
                """Probes are not logged."""

        self._server = ThreadingHTTPServer((host, port), Handler)
        self._server.daemon_threads = True
        self._thread = threading.Thread(target=self._server.serve_forever, name="status", daemon=True)
        self.port: int = self._server.server_address[1]

    def start(self) -> None:
        """Answer in a thread of its own."""
        self._thread.start()

    def stop(self) -> None:
        """End it."""
        self._server.shutdown()
        self._thread.join()
        self._server.server_close()
