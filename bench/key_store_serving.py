"""Commit to visible under load: two servers answer prompts that teach eight tenants, two workers learn from them."""

import asyncio
import json
import os
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Generator, Mapping
from contextlib import ExitStack, closing, contextmanager
from pathlib import Path

import httpx
import numpy as np
from key_store_report import heading, row
from libration_server import LibrationServer, token_ids
from prometheus_client.parser import text_string_to_metric_families
from redis_server import RedisServer

from keystore.backends.redis_lease import Leases
from keystore.backends.redis_model import read_models

SHARDS, TENANTS, CLIENTS = 8, 8, 2  # clients of each server
PROMPT_TOKENS, NEW_TOKENS, WANTED_S = 512, 8, 0.25
COLUMNS = ("server", "answers", "prompt tokens/s", "commits", "p50 ms", "p99 ms", "within 250 ms")

Delays = Mapping[float, float]  # upper bound in seconds to how many commits took at most so long


def measure_serving(server: RedisServer, folder: Path, commits: int) -> None:
    """Until both servers have seen so many commits, the first eighth of them uncounted."""
    heading("Commit to visible, two servers answering and two workers learning", *COLUMNS)
    settings = {
        "KEY_STORE__BACKEND": "redis",
        "KEY_STORE__URL": server.url,
        "KEY_STORE__SHARDS": str(SHARDS),
        "ENDPOINTS": json.dumps({"some": {"variant": "some"}}),
        "SERVER__API_KEYS": json.dumps(
            [{"key": f"key-{name}", "tenant": f"t{name}", "level": "admin"} for name in range(TENANTS)]
        ),
    }
    with ExitStack() as ending:
        servers: list[LibrationServer] = []
        for name in ("first", "second"):
            place = folder / name
            place.mkdir()
            (folder / "cache").mkdir(exist_ok=True)
            (place / "cache").symlink_to(folder / "cache")
            servers.append(LibrationServer(place, 1, **settings))
            ending.callback(servers[-1].stop)
        for number in (1, 2):
            ending.enter_context(worker(folder / f"worker-{number}.log", settings))
        wait_for_workers(server)
        asyncio.run(measure(servers, commits))


@contextmanager
def worker(log: Path, settings: Mapping[str, str]) -> Generator[None]:
    """`libration worker` while in the block."""
    variables = {f"LIBRATION_{name}": value for name, value in settings.items()}
    command = [sys.executable, "-m", "server.cli", "worker", "--port", "0"]
    with log.open("wb") as stream:
        process = subprocess.Popen(command, env=os.environ | variables, stderr=stream)
    try:
        yield
    finally:
        process.terminate()
        process.wait()


def wait_for_workers(server: RedisServer) -> None:
    """Both have their share of the shards."""
    with closing(server.client()) as client:
        leases = Leases(client, read_models(client)["some"], "bench")
        while sorted(Counter(leases.holders(SHARDS)).values()) != [SHARDS // 2] * 2:
            time.sleep(0.1)


async def measure(servers: list[LibrationServer], commits: int) -> None:
    answers: Counter[int] = Counter()
    async with asyncio.TaskGroup() as group:
        clients = [
            group.create_task(keep_asking(servers[number % 2].client, number, answers))
            for number in range(2 * CLIENTS)
        ]
        before = await delays_after(servers, commits // 8)
        started, answered = time.monotonic(), answers.copy()
        after = await delays_after(servers, commits)
        seconds, answered = time.monotonic() - started, answers - answered
        for client in clients:
            client.cancel()
    for number, name in enumerate(("first", "second")):
        counts = {bound: after[number][bound] - before[number][bound] for bound in after[number]}
        mine = sum(count for client, count in answered.items() if client % 2 == number)
        rate, seen = mine * PROMPT_TOKENS / seconds, max(counts.values())
        quantiles = f"{1000 * quantile(counts, 0.5):.0f} | {1000 * quantile(counts, 0.99):.0f}"
        row(name, mine, f"{rate:.0f}", f"{seen:.0f}", quantiles, f"{counts[WANTED_S] / seen:.2%}")


async def keep_asking(client: httpx.AsyncClient, number: int, answers: Counter[int]) -> None:
    """One request after the other, for every tenant in turn."""
    for turn in range(10**9):
        prompt = token_ids(PROMPT_TOKENS, 1_000_000 * number + turn)
        body = {"model": "some", "prompt": prompt, "max_tokens": NEW_TOKENS, "ignore_eos": True}
        headers = {"Authorization": f"Bearer key-{turn % TENANTS}"}
        response = await client.post("/v1/completions", json=body, headers=headers)
        assert response.status_code == 200, response.text
        answers[number] += 1


async def delays_after(servers: list[LibrationServer], commits: int) -> list[Delays]:
    """Of every server, once all have seen so many commits."""
    while True:
        seen = [await delays(each.client) for each in servers]
        if min(max(each.values()) for each in seen) >= commits:
            return seen
        await asyncio.sleep(0.5)


async def delays(client: httpx.AsyncClient) -> Delays:
    """From a commit until the server had its versions, of all commits so far."""
    page = await client.get("/metrics", headers={"Authorization": "Bearer key-0"})
    return {
        float(sample.labels["le"]): sample.value
        for family in text_string_to_metric_families(page.text)
        for sample in family.samples
        if sample.name == "libration_replica_propagation_seconds_bucket"
    }


def quantile(counts: Delays, share: float) -> float:
    """Seconds, interpolated within a bucket as Prometheus does."""
    bounds = [0.0, *sorted(counts)[:-1]]
    reached = [0.0, *(counts[bound] for bound in sorted(counts)[:-1])]
    return float(np.interp(share * max(counts.values()), reached, bounds))
