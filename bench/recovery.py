"""How long a store takes to serve again after its process was killed by -9, and Redis with it where it has one.

    python bench/recovery.py [--versions 10000] [--scopes 1 --scopes 1000] [--backend embedded --backend redis]

A process consolidates windows of a model of the shipped sizes until there are so many versions, all kept, and goes on
until it is killed. Another one then opens the store. Prints a markdown table: "Redis" is until it answers again, its
log read; "open" until every scope's head is known; "first keys" until the latest version of one scope is loaded,
checked and searchable; "next commit" until it has learned one more window. Times do not include starting Python.
"""

import argparse
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
from redis_server import RedisServer

from keystore.backends.base import Backend
from keystore.backends.embedded import EmbeddedBackend
from keystore.backends.redis import RedisBackend
from keystore.backends.redis_client import RedisClient, RedisSettings
from keystore.backends.redis_names import RedisNames
from keystore.records import GravityConfig, ScopeId
from keystore.statistics import RoutingStats, TokenCredit, TokenTrace
from keystore.store import KeyStore

LAYERS, PLASTIC, EXPERTS, DIM, CHOSEN, TOKENS = (17, 21, 25, 29), (25, 29), 64, 96, 4, 256
WINDOWS_A_COMMIT = 64


def open_backend(where: str) -> Backend:
    if where.startswith("redis://"):
        return RedisBackend(RedisClient(RedisSettings(where, timeout_s=60.0)), RedisNames("bench"))
    return EmbeddedBackend(Path(where))


def open_store(where: str) -> KeyStore:
    rng = np.random.default_rng(0)
    return KeyStore(
        "bench",
        {layer: rng.standard_normal((EXPERTS, DIM), dtype=np.float32) for layer in LAYERS},
        GravityConfig(),
        open_backend(where),
        num_experts_per_tok=CHOSEN,
        plastic_layers=PLASTIC,
        queue_size=WINDOWS_A_COMMIT,
        versions_on_disk=1_000_000_000,
        max_sessions=1_000_000,
    )


def window(scope: ScopeId, rng: np.random.Generator) -> RoutingStats:
    traces: dict[int, TokenTrace] = {}
    for layer in PLASTIC:
        ids = rng.random((TOKENS, EXPERTS)).argsort(axis=1)[:, :CHOSEN]
        queries = rng.standard_normal((TOKENS, DIM), dtype=np.float32)
        weights = rng.standard_normal((TOKENS, CHOSEN), dtype=np.float32)
        traces[layer] = TokenTrace(ids, queries, EXPERTS, TokenCredit(ids, weights))
    return RoutingStats.from_tokens(scope, traces)


def tenant(number: int) -> ScopeId:
    return ScopeId("tenant", f"tenant-{number}")


def learn_until_killed(where: str, versions: int, scopes: int) -> None:
    """Says so when there are enough versions."""
    store, rng, made = open_store(where), np.random.default_rng(1), 0
    some = [window(tenant(0), rng) for _ in range(WINDOWS_A_COMMIT)]
    while True:
        for stats in some:
            store.submit(RoutingStats(tenant(made % scopes), stats.tokens, stats.layers))
            made += 1
        store.consolidate_once()
        if made >= versions:
            print(made, flush=True)


def recover(where: str) -> None:
    """Prints the figures of a row."""
    started = time.perf_counter()
    store = open_store(where)
    opened = time.perf_counter()
    store.view(tenant(0)).search(PLASTIC[0], np.ones((1, DIM), np.float32), CHOSEN)
    viewed = time.perf_counter()
    store.submit(window(tenant(0), np.random.default_rng(2)))
    assert len(store.consolidate_once()) == 1
    learned = time.perf_counter()
    rows = store.verify_audit()
    verified = time.perf_counter()
    times = (opened - started, viewed - opened, learned - viewed, verified - learned)
    print(rows - 1, *(f"{seconds:.3f} s" for seconds in times), sep=" | ")


def measure(where: str, versions: int, scopes: int, kill_redis: Callable[[], float]) -> str:
    """The end of a row."""
    command = [
        sys.executable,
        __file__,
        "--where",
        where,
        "--versions",
        str(versions),
        "--scopes",
        str(scopes),
    ]
    with subprocess.Popen(command, stdout=subprocess.PIPE) as process:
        assert process.stdout
        process.stdout.readline()
        process.kill()
    redis_s = kill_redis()
    found = subprocess.run([*command, "--recover"], check=True, capture_output=True, text=True).stdout.strip()
    return f"{'' if redis_s == 0 else f'{redis_s:.3f} s'} | {found} |"


def row(backend: str, versions: int, scopes: int) -> str:
    with tempfile.TemporaryDirectory() as folder:
        if backend == "embedded":
            end = measure(f"{folder}/keys.sqlite3", versions, scopes, lambda: 0.0)
        else:
            end = measure_beside(RedisServer(Path(folder)), versions, scopes)
    return f"| {backend} | {scopes} | {end}"


def measure_beside(redis: RedisServer, versions: int, scopes: int) -> str:
    def restart() -> float:
        redis.stop(signal.SIGKILL)
        started = time.perf_counter()
        redis.start()
        return time.perf_counter() - started

    redis.start()
    try:
        return measure(redis.url, versions, scopes, restart)
    finally:
        redis.stop(signal.SIGKILL)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--versions", type=int, default=10_000)
    parser.add_argument("--scopes", type=int, action="append")
    parser.add_argument("--backend", action="append", choices=["embedded", "redis"])
    parser.add_argument("--where", help=argparse.SUPPRESS)
    parser.add_argument("--recover", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.recover:
        recover(options.where)
    elif options.where is not None:
        learn_until_killed(options.where, options.versions, options.scopes[0])
    else:
        print("| backend | scopes | Redis | versions | open | first keys | next commit | whole audit chain |")
        print("|" + "---|" * 8)
        for backend in options.backend or ["embedded", "redis"]:
            for scopes in options.scopes or [1, 1000]:
                print(row(backend, options.versions, scopes), flush=True)


if __name__ == "__main__":
    main()
