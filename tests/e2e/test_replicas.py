"""Two servers and two workers as processes on one Redis: nothing is learned twice, nothing is lost, nobody waits."""

import itertools
import json
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from os import environ
from pathlib import Path
from typing import Self

import httpx
import pytest
from prometheus_client.parser import text_string_to_metric_families
from redis_server import running

from keystore.backends.redis_model import read_models

TENANTS = ("a", "b", "c", "d")
SHARDS = 4
LEASE_S = 1.0
PATIENCE_S = 120.0
WORDS = "for i in range(10): print(i, i * i) # squares of numbers and nothing else\n"


def wait_until(condition: Callable[[], object], timeout_s: float = PATIENCE_S) -> None:
    deadline_s = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline_s, "it did not happen in time"
        time.sleep(0.02)


class WorkerProcess:
    """`libration worker`; ended by its own process id."""

    def __init__(self, log: Path, variables: dict[str, str]):
        self._log = log
        command = [sys.executable, "-m", "server.cli", "worker", "--port", "0"]
        with log.open("wb") as stream:
            self.process = subprocess.Popen(command, env=environ | variables, stdout=stream, stderr=stream)
        wait_until(lambda: "/metrics" in self._text())
        url = next(word for word in self._text().split() if word.endswith("/metrics"))
        self.client = httpx.Client(base_url=url.removesuffix("/metrics"), timeout=30)

    def metric(self, name: str, **labels: str) -> float:
        return metric(self.client, name, **labels)

    def send(self, how: signal.Signals) -> None:
        self.process.send_signal(how)

    def end(self, how: signal.Signals = signal.SIGTERM) -> int:
        self.client.close()
        self.process.send_signal(signal.SIGCONT)
        self.process.send_signal(how)
        return self.process.wait(timeout=60)

    def _text(self) -> str:
        text = self._log.read_text()
        assert self.process.poll() is None, text
        return text


def metric(client: httpx.Client, name: str, **labels: str) -> float:
    """The sum of the samples of that name with these labels."""
    page = client.get("/metrics")
    assert page.status_code == 200, page.text
    return sum(
        sample.value
        for family in text_string_to_metric_families(page.text)
        for sample in family.samples
        if sample.name == f"libration_{name}" and labels.items() <= sample.labels.items()
    )


class Deployment:
    """The processes, and a count of what they were let learn."""

    def __init__(self, redis_server, checkpoint, start, folder: Path):
        self.redis = redis_server
        tiny = {"variant": "checkpoint", "model": str(checkpoint), "plastic": True}
        keys = [{"key": f"key-{tenant}", "tenant": tenant, "level": "admin"} for tenant in TENANTS]
        self.variables = {
            "LIBRATION_KEY_STORE__BACKEND": "redis",
            "LIBRATION_KEY_STORE__URL": redis_server.url,
            "LIBRATION_KEY_STORE__SHARDS": str(SHARDS),
            "LIBRATION_KEY_STORE__HMAC_SECRET": "of this test",
            "LIBRATION_KEY_STORE__VERSIONS_IN_MEMORY": "2",
            "LIBRATION_FEEDBACK__KEEP_ANSWERS": "1",  # each keeps the keys that wrote it
            "LIBRATION_WORKER__LEASE_S": str(LEASE_S),
            "LIBRATION_SERVER__API_KEYS": json.dumps(keys),
            "LIBRATION_ENDPOINTS": json.dumps({"tiny": tiny | {"gravity": {"window_tokens": 32}}}),
            "LIBRATION_GUARD__ENABLED": "false",
        }
        with ThreadPoolExecutor() as pool:
            self.servers = list(pool.map(lambda name: start(name, **self.variables), ("first", "second")))
        self._folder, self._numbers = folder, itertools.count()
        self.workers: list[WorkerProcess] = []
        self.produced = dict.fromkeys(TENANTS, 0)
        self._counting = threading.Lock()

    def worker(self) -> WorkerProcess:
        log = self._folder / f"worker-{next(self._numbers)}.log"
        self.workers.append(WorkerProcess(log, self.variables))
        return self.workers[-1]

    def ask(self, server: int, tenant: str, text: str, **body: object) -> dict:
        """One completion, whatever it learns counted."""
        request = {"model": "tiny", "prompt": text, "max_tokens": 4, "temperature": 0, "ignore_eos": True}
        response = self.servers[server].client.post(
            "/v1/completions", json=request | body, headers={"Authorization": f"Bearer key-{tenant}"}
        )
        assert response.status_code == 200, response.text
        answer = response.json()
        with self._counting:
            self.produced[tenant] += answer["libration"]["learned_tokens"]
        return answer

    def call(self, server: int, method: str, path: str, tenant: str = "a", **options: object) -> dict:
        headers = {"Authorization": f"Bearer key-{tenant}"}
        response = self.servers[server].client.request(method, path, headers=headers, **options)
        assert response.status_code == 200, response.text
        return response.json()

    def metric(self, server: int, name: str, **labels: str) -> float:
        client = self.servers[server].client
        client.headers["Authorization"] = "Bearer key-a"
        return metric(client, name, model="tiny", **labels)

    def tokens(self, server: int) -> dict[str, int]:
        return {tenant: self.call(server, "GET", "/v1/keys/tiny", tenant)["tokens"] for tenant in TENANTS}

    def settle(self) -> None:
        """Everything that was read has been learned, and both servers have it."""
        for server in (0, 1):
            wait_until(lambda server=server: self._has_learned(server))
        wait_until(lambda: self.tokens(0) == self.tokens(1))

    def _has_learned(self, server: int) -> bool:
        """Whether everything was learned within the time that the server gives the workers."""
        headers = {"Authorization": "Bearer key-a"}
        response = self.servers[server].client.post("/admin/keys/tiny/consolidate", headers=headers)
        assert response.status_code in (200, 503), response.text
        return response.status_code == 200

    def assert_exact(self) -> None:
        self.settle()
        assert self.tokens(0) == self.tokens(1) == self.produced
        keys = [[self.call(s, "GET", "/v1/keys/tiny", tenant) for tenant in TENANTS] for s in (0, 1)]
        assert [each["checksum"] for each in keys[0]] == [each["checksum"] for each in keys[1]]
        assert self.call(0, "GET", "/admin/keys/tiny/audit")["verified"] > 0

    def traffic(self) -> "Traffic":
        return Traffic(self)


class Traffic:
    """Two threads that ask both servers for all tenants until the block ends; what fails, fails the test."""

    def __init__(self, deployment: Deployment):
        self._deployment, self._ending = deployment, threading.Event()
        self._failures: list[BaseException] = []
        self.answers = 0
        self._threads = [threading.Thread(target=self._ask, args=(server,)) for server in (0, 1)]

    def __enter__(self) -> Self:
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._ending.set()
        for thread in self._threads:
            thread.join()
        if error[0] is None and self._failures:
            raise self._failures[0]

    def _ask(self, server: int) -> None:
        try:
            for number in itertools.count():
                if self._ending.is_set():
                    return
                tenant = TENANTS[number % len(TENANTS)]
                self._deployment.ask(server, tenant, f"{server} {number} {WORDS}")
                self.answers += 1
        except BaseException as error:  # noqa: BLE001 - raised by whoever joins
            self._failures.append(error)


@pytest.fixture(scope="module")
def servers(checkpoint, start_for_module, tmp_path_factory) -> Iterator[Deployment]:
    """Two servers that all tests share, and the Redis between them."""
    folder = tmp_path_factory.mktemp("deployment")
    model, _ = checkpoint("qwen3_moe")
    with running(folder / "redis") as redis_server:
        yield Deployment(redis_server, model, start_for_module, folder)


@pytest.fixture
def deployment(servers) -> Iterator[Deployment]:
    """The same, with workers of the test's own."""
    yield servers
    for worker in servers.workers:
        if worker.process.poll() is None:
            assert worker.end() == 0
    servers.workers.clear()


def test_traffic_to_either_server_moves_the_same_keys_and_pinned_answers_agree(deployment) -> None:
    deployment.worker()
    deployment.worker()
    wait_until(lambda: [worker.metric("worker_shards") for worker in deployment.workers] == [2, 2])
    for number in range(6):
        deployment.ask(number % 2, "a", f"{number} {WORDS * 2}")
    deployment.assert_exact()
    newest = deployment.call(0, "GET", "/v1/keys/tiny")["version"]
    assert newest > 2
    for version in range(newest + 1):
        pinned = {"key_version": version, "logprobs": 3, "max_tokens": 8}
        answers = [deployment.ask(server, "a", WORDS, **pinned) for server in (0, 1)]
        assert answers[0]["choices"] == answers[1]["choices"]
        assert answers[0]["libration"] == answers[1]["libration"]
    assert deployment.metric(0, "replica_propagation_seconds_count") >= newest > 0
    assert deployment.metric(1, "replica_refused_versions_total") == 0
    for worker in deployment.workers:
        assert worker.client.get("/health/ready").json() == {"status": "ready"}


def test_tokens_are_exact_after_duplicates_crashes_pauses_and_a_restart(deployment) -> None:
    redis = deployment.redis.client()
    first, second = deployment.worker(), deployment.worker()
    with deployment.traffic():
        wait_until(lambda: first.metric("worker_learned_tokens_total") > 0)
        first.end(signal.SIGKILL)
        third = deployment.worker()
        time.sleep(3.0)

    def shared_evenly() -> bool:
        return [worker.metric("worker_shards") for worker in (second, third)] == [SHARDS // 2] * 2

    wait_until(shared_evenly)

    for worker in (second, third):
        worker.send(signal.SIGSTOP)
    names = read_models(redis)["tiny"]
    with deployment.traffic():
        wait_until(lambda: sum(redis.call("XLEN", names.stats(shard)) for shard in range(SHARDS)) >= 4)
    for server in (0, 1):
        wait_until(lambda server=server: deployment.metric(server, "replica_outbox_scopes") == 0)
    sent_again = 0
    for shard in range(SHARDS):
        for _, fields in redis.call("XRANGE", names.stats(shard), "-", "+"):
            redis.call("XADD", names.stats(shard), "*", "window", fields[b"window"])
            sent_again += 1
    time.sleep(2 * LEASE_S)  # both leases are over when they wake
    assert [redis.call("GET", names.lease(shard)) for shard in range(SHARDS)] == [None] * SHARDS
    second.send(signal.SIGCONT)
    wait_until(lambda: second.metric("worker_shards") == SHARDS)  # third has been silent for a lease
    third.send(signal.SIGCONT)
    wait_until(shared_evenly)
    deployment.settle()

    def duplicates() -> float:
        return sum(w.metric("worker_entries_total", outcome="duplicate") for w in (second, third))

    wait_until(lambda: duplicates() == sent_again > 0)
    assert third.metric("worker_fenced_total") > 0

    with deployment.traffic():
        time.sleep(2.0)
        deployment.redis.restart(signal.SIGKILL)
        time.sleep(2.0)
    deployment.assert_exact()
    assert deployment.metric(0, "replica_regressions_total") == 0
    redis.close()


def outage(deployment: Deployment, seconds: float) -> None:
    deployment.worker()
    deployment.worker()
    # Three more versions than there are: version 1, which an earlier test may have asked for, leaves the memory.
    wanted = max(4, deployment.call(0, "GET", "/v1/keys/tiny")["version"] + 3)
    while deployment.call(0, "GET", "/v1/keys/tiny")["version"] < wanted:
        for tenant in TENANTS:
            deployment.ask(0, tenant, WORDS * 2)
        deployment.settle()
    with deployment.traffic() as traffic:
        time.sleep(1.0)
        deployment.redis.stop()
        before = traffic.answers
        wait_until(lambda: all(deployment.metric(server, "store_degraded") == 1 for server in (0, 1)))
        for server in (0, 1):
            health = deployment.call(server, "GET", "/health/ready")
            assert health["status"] == "degraded"
            assert "StoreUnavailable" in health["reasons"][0]
        old = {"model": "tiny", "prompt": WORDS, "key_version": 1}  # no longer in memory
        refused = deployment.servers[0].client.post(
            "/v1/completions", json=old, headers={"Authorization": "Bearer key-a"}
        )
        assert (refused.status_code, refused.json()["error"]["code"]) == (503, "store_unavailable")
        assert refused.headers["Retry-After"] == "5"
        time.sleep(seconds)
        wait_until(lambda: traffic.answers > before)
        wait_until(lambda: deployment.metric(0, "replica_outbox_scopes") > 0)
        deployment.redis.start()
        time.sleep(2.0)
    deployment.assert_exact()
    wait_until(lambda: all(deployment.metric(server, "store_degraded") == 0 for server in (0, 1)))


def test_while_redis_is_stopped_no_request_fails_and_learning_catches_up(deployment) -> None:
    outage(deployment, 4.0)


@pytest.mark.slow
def test_a_minute_without_redis(deployment) -> None:
    outage(deployment, 60.0)
