"""Another engine in a process of its own: JSON lines {prompts, tokens} in, {seconds} out, after one line when it is ready."""

import asyncio
import json
import os
import subprocess
import time
from typing import Any

from libration_server import peak_mb


class Missing(Exception):
    """The peer is not here, and why."""


class PeerProcess:
    """Ready once it is made; `ready_s` is how long that took. Generates greedily when asked to."""

    def __init__(self, name: str, command: list[str]):
        """Raises Missing when it does not come up; its own message is on stderr."""
        self.name = name
        environment = {key: value for key, value in os.environ.items() if key != "OMP_NUM_THREADS"}
        started = time.monotonic()
        self._process = subprocess.Popen(
            command, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, bufsize=1
        )
        try:
            self._answer()
        except (json.JSONDecodeError, OSError) as error:
            self.stop()
            raise Missing(f"{name} did not start: its own message is above") from error
        self.ready_s = time.monotonic() - started

    async def generate(self, prompts: list[list[int]], tokens: int) -> float:
        """Seconds until every prompt has so many new tokens."""
        return (await asyncio.to_thread(self._ask, {"prompts": prompts, "tokens": tokens}))["seconds"]

    def peak_mb(self) -> float:
        return peak_mb(self._process.pid)

    def stop(self) -> None:
        with self._process:  # closes the pipes and waits
            self._process.kill()

    def _ask(self, question: dict[str, Any]) -> Any:
        assert self._process.stdin is not None, "a pipe was asked for"
        self._process.stdin.write(json.dumps(question) + "\n")
        return self._answer()

    def _answer(self) -> Any:
        assert self._process.stdout is not None, "a pipe was asked for"
        return json.loads(self._process.stdout.readline())
