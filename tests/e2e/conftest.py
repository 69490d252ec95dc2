"""The real server as a process of its own, on the real model and a free loopback port."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx
import pytest

START_TIMEOUT_S = 600  # with the conversion of the weights, on a busy machine


class ServerProcess:
    """`libration serve` with a data folder; ended by its own process id."""

    def __init__(self, data_dir: Path, log: Path, **environment: str):
        self.data_dir = data_dir
        self._log_path = log
        variables = os.environ | {"LIBRATION_DATA_DIR": str(data_dir)} | environment
        command = [sys.executable, "-m", "server.cli", "serve", "--port", "0"]
        began = len(log.read_text()) if log.exists() else 0
        with log.open("ab") as stream:
            self.process = subprocess.Popen(command, env=variables, stdout=stream, stderr=stream)
        try:
            self.url = self._wait_for_url(began)
        except BaseException:
            self.process.kill()
            self.process.wait()
            raise
        self.client = httpx.Client(base_url=self.url, timeout=120)

    def _wait_for_url(self, began: int) -> str:
        deadline = time.monotonic() + START_TIMEOUT_S
        while time.monotonic() < deadline:
            text = self._log_path.read_text()[began:]
            assert self.process.poll() is None, text
            for word in text.split():
                if word.startswith("http://127.0.0.1:"):
                    return word.removesuffix("/v1")
            time.sleep(0.05)
        raise AssertionError(f"the server did not start: {text}")

    def log(self) -> str:
        return self._log_path.read_text()

    def chat(self, model: str, text: str, **body: object) -> dict:
        return self.post(
            "/v1/chat/completions",
            model=model,
            messages=[{"role": "user", "content": text}],
            **({"temperature": 0, "max_tokens": 24} | body),
        )

    def post(self, path: str, **body: object) -> dict:
        response = self.client.post(path, json=body)
        assert response.status_code == 200, response.text
        return response.json()

    def get(self, path: str) -> dict:
        response = self.client.get(path)
        assert response.status_code == 200, response.text
        return response.json()

    def end(self, how: signal.Signals = signal.SIGTERM) -> int:
        self.client.close()
        self.process.send_signal(how)
        return self.process.wait(timeout=60)


@pytest.fixture(scope="session")
def shared_data(tmp_path_factory) -> Path:
    """Holds the converted base weights, so that only the first server converts them."""
    return tmp_path_factory.mktemp("data")


@pytest.fixture(scope="session")
def launch(shared_data):
    """launch(folder, **environment): a server on a data folder of its own, with the converted weights of all."""

    def launched(folder: Path, **environment: str) -> ServerProcess:
        folder.mkdir(exist_ok=True)
        (shared_data / "cache").mkdir(exist_ok=True)
        if not (folder / "cache").exists():
            (folder / "cache").symlink_to(shared_data / "cache")
        return ServerProcess(folder, folder.with_suffix(".log"), **environment)

    return launched


@contextmanager
def starting(shared_data: Path, root: Path) -> Iterator[Callable[..., ServerProcess]]:
    """Gives start(name, **environment): servers that share converted weights but not keys; ends what still runs."""
    running: list[ServerProcess] = []

    def start_server(name: str = "a", **environment: str) -> ServerProcess:
        folder = root / name
        folder.mkdir(exist_ok=True)
        (shared_data / "cache").mkdir(exist_ok=True)
        if not (folder / "cache").exists():
            (folder / "cache").symlink_to(shared_data / "cache")
        server = ServerProcess(folder, root / f"{name}.log", **environment)
        running.append(server)
        return server

    try:
        yield start_server
    finally:
        for server in running:
            server.client.close()
            if server.process.poll() is None:
                server.end()


@pytest.fixture
def start(shared_data: Path, tmp_path: Path) -> Iterator[Callable[..., ServerProcess]]:
    """start(name, **environment), for one test."""
    with starting(shared_data, tmp_path) as start_server:
        yield start_server


@pytest.fixture(scope="module")
def start_for_module(shared_data: Path, tmp_path_factory) -> Iterator[Callable[..., ServerProcess]]:
    """The same for all tests of a module."""
    with starting(shared_data, tmp_path_factory.mktemp("servers")) as start_server:
        yield start_server
