"""Searching one layer with very many routing keys: exactly, and through inverted lists with an exact overlay.

    python bench/keyindex.py [--keys 262144 --keys 1048576] [--dim 96] [--windows 1000] [--batch 1]

Keys lie in clusters, as trained routers' do; queries are noisy copies of keys, half of them of popular ones. Each
window searches 16 batches of 16 queries and moves up to 256 rows, the popular ones more often, within a trust radius of
0.2; `--batch` windows make a version. Lists are rebuilt and recall is sampled as in a server, on a thread beside it. After the last window they are
built once more, with nothing beside it.
Prints a markdown table. Times are processor time of one thread, so that what else runs here does not count; latencies
are medians over calls of one query and of 16. "next version" is what a window costs the index: finding the changed rows
and putting them on top of the lists.
"""

import argparse
import os
import statistics
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass

os.environ["OMP_NUM_THREADS"] = "1"

import numpy as np
import psutil
from numpy.typing import NDArray

from keystore.index import InvertedLists, KeyIndex
from keystore.index_builder import IndexBuilder
from keystore.large_index import LargeKeyIndex, Overlay

K, ROWS_A_WINDOW, TRUST_RADIUS, QUERIES = 8, 256, 0.2, 256
Keys = NDArray[np.float32]


@dataclass
class Figures:
    """One row of the table; seconds and MiB."""

    keys: int
    build_s: float = 0.0
    rebuild_s: float = 0.0
    exact_ms: str = ""
    lists_ms: str = ""
    drifted_ms: str = ""
    recall: float = 0.0
    drifted_recall: float = 0.0
    stale_recall: float = 0.0
    changed: float = 0.0
    builds: int = 0
    memory_mib: float = 0.0
    derive_ms: float = 0.0


def make_keys(count: int, dim: int, rng: np.random.Generator) -> Keys:
    clusters = max(64, count // 256)
    centers = rng.standard_normal((clusters, dim), dtype=np.float32)
    keys = centers[rng.integers(0, clusters, count)]
    for first in range(0, count, 65_536):
        block = keys[first : first + 65_536]
        block += 0.7 * rng.standard_normal(block.shape, dtype=np.float32)
    return keys


def popular_rows(popular: NDArray[np.int64], count: int, rng: np.random.Generator) -> NDArray[np.int64]:
    return popular[np.minimum(rng.zipf(1.2, count) - 1, len(popular) - 1)]


def make_queries(keys: Keys, popular: NDArray[np.int64], rng: np.random.Generator) -> Keys:
    anywhere = rng.integers(0, len(keys), QUERIES // 2)
    rows = keys[rng.permutation(np.concatenate([anywhere, popular_rows(popular, QUERIES // 2, rng)]))]
    return rows + 0.5 * rng.standard_normal(rows.shape, dtype=np.float32)


def drift(
    keys: Keys, anchors: Keys, popular: NDArray[np.int64], windows: int, rng: np.random.Generator
) -> Keys:
    """The keys after so many windows."""
    after = keys.copy()
    for _ in range(windows):
        rows = np.unique(popular_rows(popular, ROWS_A_WINDOW, rng))
        lengths = np.linalg.norm(anchors[rows], axis=1, keepdims=True)
        step = rng.standard_normal((len(rows), keys.shape[1]), dtype=np.float32)
        away = (
            after[rows] - anchors[rows] + 0.1 * lengths * step / np.linalg.norm(step, axis=1, keepdims=True)
        )
        distance = np.maximum(np.linalg.norm(away, axis=1, keepdims=True), 1e-9)
        after[rows] = anchors[rows] + np.minimum(1, TRUST_RADIUS * lengths / distance) * away
    return after


def latency(search: Callable[[Keys, int], object], queries: Keys) -> str:
    """Milliseconds a call of one query and of 16."""
    found: list[str] = []
    for batch in (1, 16):
        times: list[float] = []
        for first in range(0, 128, batch):
            started = time.thread_time()
            search(queries[first : first + batch], K)
            times.append(time.thread_time() - started)
        found.append(f"{1000 * statistics.median(times):.2f}")
    return " / ".join(found)


def recall(found: NDArray[np.int64], wanted: NDArray[np.int64]) -> float:
    return float(np.mean([np.isin(row, seen).mean() for row, seen in zip(wanted, found, strict=True)]))


def wait_for(builder: IndexBuilder, builds: int) -> None:
    while sum(builder.builds().values()) < builds:
        time.sleep(0.02)


def measure(count: int, dim: int, windows: int, batch: int) -> Figures:
    rng, figures = np.random.default_rng(0), Figures(count)
    anchors, before = make_keys(count, dim, rng), psutil.Process().memory_info().rss
    popular = rng.permutation(count)
    queries = make_queries(anchors, popular, rng)
    builder, started = IndexBuilder(exact_limit=1), time.process_time()
    first = builder.create({0: anchors})[0]
    assert isinstance(first, LargeKeyIndex)
    wait_for(builder, 1)
    assert first.overlay is not None, "the build failed"
    figures.build_s = time.process_time() - started
    figures.memory_mib = (psutil.Process().memory_info().rss - before) / 2**20
    figures.exact_ms = latency(first.exact.search, queries)
    figures.lists_ms = latency(first.search, queries)
    figures.recall = recall(first.search(queries, K)[1], first.exact.search(queries, K)[1])
    index, derive_s = first, list[float]()
    for _ in range(windows // batch):
        keys = drift(index.keys, anchors, popular, batch, rng)
        keys.flags.writeable = False
        started = time.thread_time()
        index = index.derive(keys)
        derive_s.append(time.thread_time() - started)
        for _ in range(batch):
            for some in np.split(make_queries(keys, popular, rng), QUERIES // 16):
                index.search(some, K)
    queries = make_queries(index.keys, popular, rng)
    figures.drifted_ms = latency(index.search, queries)
    assert index.overlay is not None
    wanted = KeyIndex(index.keys).search(queries, K)[1]
    figures.drifted_recall = recall(index.search(queries, K)[1], wanted)
    stale = Overlay(first.overlay.base, first.keys, np.empty(0, np.int64))
    figures.stale_recall = recall(stale.search(first.exact, queries, K)[1], wanted)
    figures.changed = len(index.overlay.changed_ids) / count
    figures.builds = builder.builds()[0, "built"]
    figures.derive_ms = 1000 * statistics.median(derive_s)
    builder.close()
    for thread in threading.enumerate():
        if thread is not threading.main_thread():
            thread.join()  # a build that was going on
    started = time.thread_time()
    InvertedLists(index.keys)
    figures.rebuild_s = time.thread_time() - started
    return figures


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--keys", type=int, action="append")
    parser.add_argument("--dim", type=int, default=96)
    parser.add_argument("--windows", type=int, default=1000)
    parser.add_argument("--batch", type=int, default=1, help="windows a version")
    options = parser.parse_args()
    print("| keys | first build, tuned | its memory | rebuild | exact, 1 / 16 queries | lists | lists, drifted |"
          " recall@8 | drifted | without the overlay | rows changed | builds | next version |")  # fmt: skip
    print("|" + "---|" * 13)
    for count in options.keys or [262_144, 1_048_576]:
        f = measure(count, options.dim, options.windows, options.batch)
        print(
            f"| {f.keys:,} | {f.build_s:.1f} s | {f.memory_mib:.0f} MiB | {f.rebuild_s:.1f} s | {f.exact_ms} ms |"
            f" {f.lists_ms} ms | {f.drifted_ms} ms | {f.recall:.3f} | {f.drifted_recall:.3f} |"
            f" {f.stale_recall:.3f} | {100 * f.changed:.1f} % | {f.builds} | {f.derive_ms:.0f} ms |",
            flush=True,
        )


if __name__ == "__main__":
    main()
