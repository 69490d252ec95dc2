"""What the key store costs: commits, the way of a version to another process, learning by workers, searching.

    python bench/key_store.py [--quick] [--only commits propagation serving workers search threshold]

Sizes are those of the shipped `some`: 4 layers of 64 keys of 96 dimensions, windows of 256 tokens with 16 candidates a
token. Redis is a server of its own on a loopback port that syncs its log before it answers (appendfsync always); SQLite
syncs every commit too. "commit to visible" is from just before a commit is sent until a replica in another process has
verified its version and readers there have it; in "serving" two servers with the real model say so in their metrics, in
steps of a histogram, while they answer 512-token prompts for eight tenants. Workers learn what was sent while they hold their leases, from the first
entry sent to the last one learned, so sending is part of it. Searches are medians on one thread; torch multiplies and
takes the top k. The pool sizes that need inverted lists are in bench/keyindex.py. Prints markdown tables.

Not named keystore.py: as a script it would stand in the way of the package.
"""

import argparse
import multiprocessing
import os
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, closing, contextmanager, suppress
from multiprocessing.connection import Connection
from pathlib import Path
from uuid import uuid4

from key_store_model import (
    GRAVITY,
    NEVER,
    SEAL,
    SHARDS,
    TENANTS,
    WINDOW,
    make_card,
    make_window,
    open_store,
)
from key_store_report import heading, percentiles_ms, row
from key_store_search import measure_search, measure_threshold, use_one_thread
from key_store_serving import measure_serving
from redis_server import RedisServer, running

from keystore.backends.base import VersionRecord
from keystore.backends.embedded import EmbeddedBackend
from keystore.backends.redis import RedisBackend
from keystore.backends.redis_client import RedisClient, RedisSettings
from keystore.backends.redis_journal import Position
from keystore.backends.redis_lease import Leases
from keystore.backends.redis_names import shard_of
from keystore.backends.redis_streams import DeltaStream, StatsStream
from keystore.backends.stats_blob import SentWindow
from keystore.learning_side import StoreParts
from keystore.model_worker import ModelWorker, WorkerLimits
from keystore.records import ScopeId
from keystore.replica import Replica
from keystore.replica_backend import ReplicaBackend
from keystore.snapshot import KeySnapshot

SPAWN = multiprocessing.get_context("spawn")


class TimedBackend(EmbeddedBackend):
    """Keeps what it commits, and how long each took."""

    def __init__(self, path: Path) -> None:
        super().__init__(path)
        self.records: list[Sequence[VersionRecord]] = []
        self.seconds: list[float] = []

    def commit(self, records: Sequence[VersionRecord], canary=None, pool_event=None) -> None:
        self.records.append(records)
        started = time.perf_counter()
        super().commit(records, canary, pool_event)
        self.seconds.append(time.perf_counter() - started)


def measure_commits(server: RedisServer, folder: Path, count: int) -> None:
    heading("Commits of one version, one writer", "backend", "commits/s", "p50 ms", "p99 ms")
    card, tenant = make_card("commits"), ScopeId("tenant", "default")
    embedded = TimedBackend(folder / "keys.sqlite3")
    with closing(open_store(embedded, card)) as store:
        for seed in range(count):
            store.submit(make_window(tenant, seed))
            store.consolidate_once()
    seconds: list[float] = []
    with closing(server.client()) as client:
        backend = RedisBackend(client, card.names)
        for records in embedded.records:
            started = time.perf_counter()
            backend.commit(records)
            seconds.append(time.perf_counter() - started)
    for name, each in (("embedded", embedded.seconds), ("redis", seconds)):
        row(name, f"{len(each) / sum(each):.0f}", percentiles_ms(each))


def follow(url: str, endpoint: str, pipe: Connection) -> None:
    """A replica in a process of its own; says when it is ready, and at the end when it had which version."""
    card, made = make_card(endpoint), list[Replica]()
    backend = ReplicaBackend(RedisClient(RedisSettings(url)), card, SEAL, SHARDS)
    seen: dict[int, float] = {}

    def replica(parts: StoreParts) -> Replica:
        made.append(Replica(parts, backend, outbox_scopes=64, session_ttl_s=NEVER))
        return made[0]

    def note(snapshot: KeySnapshot) -> None:
        seen[snapshot.version] = time.time()

    store = open_store(backend, card, learning_side=replica)
    store.news.published.add(note)
    made[0].start()
    pipe.send("ready")
    pipe.recv()
    made[0].stop()
    store.close()
    pipe.send(seen)


def learn(url: str, endpoint: str, pipe: Connection) -> None:
    """A worker in a process of its own, until the other end of the pipe is closed."""
    card = make_card(endpoint)
    limits = WorkerLimits(64, "save", versions_on_disk=64, session_ttl_s=NEVER, lease_s=5.0)
    with closing(RedisClient(RedisSettings(url))) as client:
        worker = ModelWorker(client, card.names, card, SHARDS, GRAVITY, SEAL, uuid4().hex, limits)
        worker.start()
        with suppress(EOFError):
            pipe.recv()
        worker.stop()


@contextmanager
def child(target: Callable[[str, str, Connection], None], url: str, endpoint: str) -> Iterator[Connection]:
    ours, theirs = SPAWN.Pipe()
    process = SPAWN.Process(target=target, args=(url, endpoint, theirs))
    process.start()
    theirs.close()  # so that a child that fails is noticed
    try:
        yield ours
    finally:
        ours.close()
        process.join()


def measure_propagation(server: RedisServer, count: int) -> None:
    heading("Commit to visible in another process", "commits", "p50 ms", "p99 ms")
    card, tenant = make_card("propagation"), ScopeId("tenant", "default")
    with closing(server.client()) as client:
        store = open_store(RedisBackend(client, card.names, card=card, shards=SHARDS), card)
        with child(follow, server.url, "propagation") as pipe:
            pipe.recv()
            for seed in range(count):
                store.submit(make_window(tenant, seed))
                store.consolidate_once()
                time.sleep(0.02)
            time.sleep(1.0)
            pipe.send("stop")
            seen = pipe.recv()
        deltas = DeltaStream(client, card.names, SEAL).read(Position(), count=count)
        sent = {version: delta.at for delta in deltas for _, version in delta.versions}
    assert seen.keys() == sent.keys(), "every version arrives"
    row(count, percentiles_ms([seen[version] - sent[version] for version in sent]))


def measure_workers(server: RedisServer, windows: int) -> None:
    columns = ("workers", "windows", "KiB each", "tokens/s", "tokens/s and worker")
    heading("Consolidated tokens", *columns)
    for workers in (1, 2):
        measure_with(server, workers, windows)


def measure_with(server: RedisServer, workers: int, windows: int) -> None:
    endpoint = f"workers-{workers}"
    card, producer = make_card(endpoint), uuid4()
    with closing(server.client()) as client, ExitStack() as stack:
        backend = RedisBackend(client, card.names, card=card, shards=SHARDS)
        open_store(backend, card)
        stream, sequences = StatsStream(client, card.names, SEAL), [0] * SHARDS
        entries: list[tuple[int, bytes]] = []
        for seed in range(windows):
            scope = ScopeId("tenant", f"tenant-{seed % TENANTS}")
            shard = shard_of(scope, SHARDS)
            sequences[shard] += 1
            window = SentWindow(producer, sequences[shard], make_window(scope, seed))
            entries.append((shard, stream.entry(shard, window)))
        for _ in range(workers):
            stack.enter_context(child(learn, server.url, endpoint))
        wait_until(lambda: fairly_held(Leases(client, card.names, "bench"), workers))
        started = time.perf_counter()
        for shard, entry in entries:
            stream.send(shard, entry)
        wait_until(lambda: not any(map(stream.pending, range(SHARDS))))
        elapsed = time.perf_counter() - started
        rate = windows * WINDOW / elapsed
        learned = sum(backend.versions(head.scope)[0].tokens for head in backend.heads())
        assert learned == windows * WINDOW, (learned, windows * WINDOW)
        row(workers, windows, len(entries[0][1]) // 1024, f"{rate:,.0f}", f"{rate / workers:,.0f}")


def fairly_held(leases: Leases, workers: int) -> bool:
    holders = leases.holders(SHARDS)
    return None not in holders and {holders.count(each) for each in holders} == {SHARDS // workers}


def wait_until(happened: Callable[[], bool]) -> None:
    while not happened():
        time.sleep(0.01)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parts = ("commits", "propagation", "serving", "workers", "search", "threshold")
    parser.add_argument("--quick", action="store_true", help="few repeats, small pools: whether it runs")
    parser.add_argument("--only", nargs="+", choices=parts, default=parts)
    parser.add_argument("--dim", type=int, action="append", help="key dimensions to search (96 and 576)")
    options = parser.parse_args()
    use_one_thread()
    few = options.quick
    sizes = (64, 1024) if few else (64, 1024, 16_384)
    print(f"{os.cpu_count()} cores")
    with tempfile.TemporaryDirectory() as folder, running(Path(folder) / "redis") as server:
        if "commits" in options.only:
            measure_commits(server, Path(folder), 30 if few else 1000)
        if "propagation" in options.only:
            measure_propagation(server, 30 if few else 1000)
        if "serving" in options.only:
            measure_serving(server, Path(folder), 8 if few else 500)
        if "workers" in options.only:
            measure_workers(server, 64 if few else 1024)
    for dim in options.dim or (96, 576):
        if "search" in options.only:
            measure_search(sizes, dim, 20 if few else 200)
        if "threshold" in options.only:
            measure_threshold(sizes, dim, 20 if few else 200)


if __name__ == "__main__":
    main()
