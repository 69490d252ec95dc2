"""`libration worker` as a process: what it needs, how it ends, what it says of itself."""

import json
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from os import environ
from pathlib import Path
from uuid import uuid4

import httpx
import numpy as np
import pytest
from click.testing import CliRunner

from keystore.backends.redis import RedisBackend
from keystore.backends.redis_model import ModelCard
from keystore.backends.redis_names import RedisNames, shard_of
from keystore.backends.redis_seal import Seal
from keystore.backends.redis_streams import StatsStream
from keystore.backends.stats_blob import SentWindow
from keystore.records import ScopeId
from keystore.snapshot import checksum_of
from keystore.statistics import RoutingStats, TokenCredit, TokenTrace
from server.cli import main

TENANT, SHARDS, SEAL = ScopeId("tenant", "default"), 2, Seal(b"secret")
CARD = ModelCard("some", "tiny", 2, (3,), {3: np.eye(8, dtype=np.float32)})
FORBIDDEN = ("torch", "transformers", "model", "fastapi", "starlette", "uvicorn")
LOOK_INTO_MODULES = f"""
import sys
from server.cli import main
try:
    main(["worker", "--port", "0"], standalone_mode=False)
finally:
    print("loaded", [name for name in sys.modules if name.partition(".")[0] in {FORBIDDEN!r}], file=sys.stderr)
"""


def window(seed: int) -> RoutingStats:
    rng = np.random.default_rng(seed)
    ids = rng.integers(0, 8, (16, 2))
    queries = rng.standard_normal((16, 8), dtype=np.float32)
    weights = rng.standard_normal((16, 2), dtype=np.float32)
    return RoutingStats.from_tokens(TENANT, {3: TokenTrace(ids, queries, 8, TokenCredit(ids, weights))})


class Shared:
    """The store as a server would have made it, and what a server would send."""

    def __init__(self, client) -> None:
        self.client, self.names = client, CARD.names
        self.backend = RedisBackend(client, self.names, seal=SEAL, card=CARD, shards=SHARDS)
        self._stream, self._producer, self._sequence = StatsStream(client, self.names, SEAL), uuid4(), 0

    def adopt(self) -> None:
        self.backend.adopt_model("tiny", checksum_of(CARD.anchors, {}))

    def send(self) -> None:
        self._sequence += 1
        shard = shard_of(TENANT, SHARDS)
        sent = SentWindow(self._producer, self._sequence, window(self._sequence))
        self._stream.send(shard, self._stream.entry(shard, sent))

    def version(self) -> int:
        return max((head.version for head in self.backend.heads()), default=0)

    def holders(self) -> list[bytes | None]:
        return [self.client.call("GET", RedisNames(self.names.tag).lease(shard)) for shard in range(SHARDS)]


class Process:
    """A worker; ended by its own process id."""

    def __init__(self, log: Path, variables: dict[str, str]) -> None:
        self._log = log
        with log.open("wb") as stream:
            self.process = subprocess.Popen(
                [sys.executable, "-c", LOOK_INTO_MODULES],
                env=environ | variables,
                stdout=stream,
                stderr=stream,
            )

    def text(self) -> str:
        return self._log.read_text()

    def get(self, path: str) -> httpx.Response:
        url = next(word for word in self.text().split() if word.endswith("/metrics"))
        return httpx.get(url.removesuffix("/metrics") + path, timeout=30)

    def end(self) -> int:
        self.process.send_signal(signal.SIGTERM)
        return self.process.wait(timeout=60)


@pytest.fixture
def shared(redis_server) -> Iterator[Shared]:
    client = redis_server.client(timeout_s=1.0)
    yield Shared(client)
    client.close()


@pytest.fixture
def begin(redis_server, tmp_path) -> Iterator[Callable[[], Process]]:
    """begin(): a worker that has begun to listen."""
    secret = tmp_path / "secret"
    secret.write_text("secret\n")
    variables = {
        "LIBRATION_KEY_STORE__BACKEND": "redis",
        "LIBRATION_KEY_STORE__URL": redis_server.url,
        "LIBRATION_KEY_STORE__HMAC_SECRET_FILE": str(secret),
        "LIBRATION_WORKER__LEASE_S": "1",
    }
    made: list[Process] = []

    def begun() -> Process:
        made.append(Process(tmp_path / f"{len(made)}.log", variables))
        wait_until(lambda: "/metrics" in made[-1].text())
        return made[-1]

    yield begun
    for each in made:
        if each.process.poll() is None:
            each.process.kill()
            each.process.wait()


def wait_until(condition: Callable[[], object], timeout_s: float = 60.0) -> None:
    deadline_s = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline_s, "it did not happen in time"
        time.sleep(0.01)


def test_a_worker_learns_without_torch_and_gives_its_shards_back(shared, begin) -> None:
    worker = begin()
    assert worker.get("/health/live").status_code == 200
    shared.adopt()  # the first server comes later
    wait_until(lambda: None not in shared.holders())
    for number in range(1, 4):
        shared.send()
        wait_until(lambda number=number: shared.version() == number)
    page = worker.get("/metrics").text
    assert 'libration_worker_entries_total{model="some",outcome="learned"} 3.0' in page
    assert 'libration_worker_learned_tokens_total{model="some"} 48.0' in page
    assert 'libration_worker_shards{model="some"} 2.0' in page
    assert worker.get("/health/ready").json() == {"status": "ready"}
    assert worker.get("/anything").status_code == 404
    assert worker.end() == 0
    assert shared.holders() == [None, None]
    assert shared.client.call("ZCARD", shared.names.workers) == 0
    assert worker.text().splitlines()[-1] == "loaded []"


def test_what_waits_when_a_worker_ends_the_next_one_learns(shared, begin) -> None:
    shared.adopt()
    first = begin()
    wait_until(lambda: None not in shared.holders())
    shared.send()
    wait_until(lambda: shared.version() == 1)
    assert first.end() == 0
    shared.send()
    shared.send()
    assert shared.version() == 1
    begin()
    wait_until(lambda: shared.version() == 2)
    assert shared.backend.versions(TENANT)[0].tokens == 48


def test_a_worker_without_redis_says_so_and_goes_on_when_it_is_back(redis_server, shared, begin) -> None:
    shared.adopt()
    worker = begin()
    wait_until(lambda: None not in shared.holders())
    redis_server.stop()
    wait_until(lambda: worker.get("/health/ready").status_code == 503)
    assert worker.get("/health/ready").json() == {"status": "not ready", "reason": "Redis does not answer"}
    assert worker.get("/health/live").status_code == 200
    assert "libration_worker_degraded 1.0" in worker.get("/metrics").text
    redis_server.start()
    shared.send()
    wait_until(lambda: shared.version() == 1)
    wait_until(lambda: worker.get("/health/ready").status_code == 200)
    assert worker.end() == 0
    for line in worker.text().splitlines()[1:-1]:
        assert "secret" not in json.loads(line)["message"]


def test_an_embedded_store_has_no_workers() -> None:
    result = CliRunner().invoke(main, ["worker"])
    assert result.exit_code == 1
    assert "learns by itself" in result.output
