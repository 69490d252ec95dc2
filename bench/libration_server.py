"""A server process of our own on a free loopback port, for what is measured over HTTP."""

import asyncio
import os
import random
import subprocess
import sys
import sysconfig
import time
from collections.abc import AsyncGenerator, Mapping
from functools import cache
from pathlib import Path

import httpx
import psutil

from model.checkpoints.gguf import GGUFFile
from model.checkpoints.load import find_base_file
from model.tokenizer import TextTokenizer, spec_from_gguf

START_TIMEOUT_S = 300
REST_S = 0.2  # between two measurements: threads that still wait for work fall asleep
LEARNING_REST_S = 1.0  # what a prompt taught is worked off after its answer
Mode = Mapping[str, str]  # what a request says besides its prompt
MODES: dict[str, Mode] = {
    "some, learning": {"model": "some", "plasticity": "learn"},
    "some, learning off": {"model": "some", "plasticity": "off"},
    "moe": {"model": "moe"},
    "mom": {"model": "mom"},
    "fm-moe": {"model": "fm-moe"},
    "dense": {"model": "dense"},
}


def rest_s(mode: Mode) -> float:
    """How long to leave the server alone behind an answer in a mode."""
    return LEARNING_REST_S if mode.get("plasticity") == "learn" else REST_S


def token_ids(count: int, seed: int) -> list[int]:
    """Consecutive tokens of real text, Python's own library. Prompts that must not share a beginning need seeds of their own."""
    text = _text()
    first = random.Random(seed).randrange(len(text) - count)
    return text[first : first + count]


@cache
def _text() -> list[int]:
    file = GGUFFile(find_base_file())
    tokenizer = TextTokenizer(spec_from_gguf(file), file.config().vocab_size)
    sources = sorted(Path(sysconfig.get_path("stdlib")).glob("[a-d]*.py"))
    return [token for source in sources for token in tokenizer.encode(source.read_text(errors="replace"))]


class LibrationServer:
    """Started and listening once it is made; `ready_s` is how long that took."""

    def __init__(self, folder: Path, threads: int, **settings: str):
        """`folder` is its data folder; settings as `ENGINE__MAX_RUNNING="64"`."""
        environment = {name: value for name, value in os.environ.items() if name != "OMP_NUM_THREADS"}
        environment |= {"LIBRATION_DATA_DIR": str(folder), "LIBRATION_ENGINE__THREADS": str(threads)}
        environment |= {f"LIBRATION_{name}": value for name, value in settings.items()}
        command = [sys.executable, "-m", "server.cli", "serve", "--port", "0"]
        started = time.monotonic()
        with (folder / "server.log").open("wb") as log:
            self.process = subprocess.Popen(command, env=environment, stderr=log)
        try:
            self.client = httpx.AsyncClient(base_url=self._started(folder / "server.log"), timeout=300)
        except BaseException:
            self.process.kill()
            self.process.wait()
            raise
        self.ready_s = time.monotonic() - started

    def _started(self, log: Path) -> str:
        """The server's address, once it listens; it is ready then. The first start in a folder converts the model."""
        deadline = time.monotonic() + START_TIMEOUT_S
        while (url := self._url(log)) is None:
            assert self.process.poll() is None, log.read_text()
            assert time.monotonic() < deadline, "the server did not start"
            time.sleep(0.02)
        return url

    @staticmethod
    def _url(log: Path) -> str | None:
        found = [word for word in log.read_text().split() if word.startswith("http://")]
        return found[0].removesuffix("/v1") if found else None

    async def arrivals(self, prompt: list[int], tokens: int, mode: Mode) -> AsyncGenerator[float, None]:
        """When each piece of an answer comes, by time.monotonic. Whoever closes it leaves the answer."""
        body = {"prompt": prompt, "max_tokens": tokens, "temperature": 0, "ignore_eos": True, "stream": True}
        async with self.client.stream("POST", "/v1/completions", json=body | dict(mode)) as response:
            assert response.status_code == 200, await response.aread()
            async for line in response.aiter_lines():
                assert not line.startswith('data: {"error"'), line
                if line.startswith("data: {"):
                    yield time.monotonic()

    async def complete(self, prompt: list[int], tokens: int, mode: Mode) -> float:
        """Seconds until the first token; returns when the whole answer is there."""
        started = time.monotonic()
        arrivals = [at async for at in self.arrivals(prompt, tokens, mode)]
        return arrivals[0] - started

    async def generate(self, prompts: list[list[int]], tokens: int, mode: Mode) -> float:
        """Seconds until every prompt, all sent at once, has all its tokens."""
        started = time.monotonic()
        await asyncio.gather(*(self.complete(prompt, tokens, mode) for prompt in prompts))
        return time.monotonic() - started

    def peak_mb(self) -> float:
        return peak_mb(self.process.pid)

    def stop(self) -> None:
        self.process.terminate()
        self.process.wait(timeout=40)


def peak_mb(pid: int) -> float:
    """The most memory that a process and those below it had resident so far, in 10^6 bytes."""
    family = [psutil.Process(pid), *psutil.Process(pid).children(recursive=True)]
    return sum(_peak_bytes(each.pid) for each in family) / 1e6


def _peak_bytes(pid: int) -> int:
    line = next(
        line for line in Path(f"/proc/{pid}/status").read_text().splitlines() if line.startswith("VmHWM")
    )
    return int(line.split()[1]) * 1024
