"""Searching one layer with very many routing keys: exactly, and through inverted lists with an exact overlay.

    python bench/keyindex.py [--keys 262144 --keys 1048576] [--dim 96] [--windows 1000]

Keys lie in clusters, as trained routers' do; queries are noisy copies of keys, half of them of popular ones. Each
window searches 16 batches of 16 queries and moves up to 256 rows, the popular ones more often, within a trust radius of
0.2; lists are rebuilt and recall is sampled as in a server, on a thread beside it.
Prints a markdown table. Latencies are medians over calls of one query and of 16, on one thread.
"""

import argparse
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import psutil
from numpy.typing import NDArray

from keystore.index import KeyIndex
from keystore.index_builder import IndexBuilder
from keystore.large_index import LargeKeyIndex, Overlay

K, ROWS_A_WINDOW, TRUST_RADIUS, QUERIES = 8, 256, 0.2, 256
Keys = NDArray[np.float32]


@dataclass
class Figures:
    """One row of the table; seconds and MiB."""

    keys: int
    build_s: float = 0.0
    exact_ms: str = ""
    lists_ms: str = ""
    drifted_ms: str = ""
    recall: float = 0.0
    drifted_recall: float = 0.0
    stale_recall: float = 0.0
    changed: float = 0.0
    builds: int = 0
    memory_mib: float = 0.0


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


def drift(keys: Keys, anchors: Keys, popular: NDArray[np.int64], rng: np.random.Generator) -> Keys:
    """The keys after one window."""
    rows = np.unique(popular_rows(popular, ROWS_A_WINDOW, rng))
    after = keys.copy()
    lengths = np.linalg.norm(anchors[rows], axis=1, keepdims=True)
    step = rng.standard_normal((len(rows), keys.shape[1]), dtype=np.float32)
    away = keys[rows] - anchors[rows] + 0.1 * lengths * step / np.linalg.norm(step, axis=1, keepdims=True)
    limit = np.minimum(
        1, TRUST_RADIUS * lengths / np.maximum(np.linalg.norm(away, axis=1, keepdims=True), 1e-9)
    )
    after[rows] = anchors[rows] + limit * away
    return after


def latency(search: Callable[[Keys, int], object], queries: Keys) -> str:
    """Milliseconds a call of one query and of 16."""
    found: list[str] = []
    for batch in (1, 16):
        times: list[float] = []
        for first in range(0, 128, batch):
            started = time.perf_counter()
            search(queries[first : first + batch], K)
            times.append(time.perf_counter() - started)
        found.append(f"{1000 * statistics.median(times):.2f}")
    return " / ".join(found)


def recall(found: NDArray[np.int64], wanted: NDArray[np.int64]) -> float:
    return float(np.mean([np.isin(row, seen).mean() for row, seen in zip(wanted, found, strict=True)]))


def wait_for(builder: IndexBuilder, builds: int) -> None:
    while sum(builder.builds().values()) < builds:
        time.sleep(0.02)


def measure(count: int, dim: int, windows: int) -> Figures:
    rng, figures = np.random.default_rng(0), Figures(count)
    anchors, before = make_keys(count, dim, rng), psutil.Process().memory_info().rss
    popular = rng.permutation(count)
    queries = make_queries(anchors, popular, rng)
    builder, started = IndexBuilder(exact_limit=1), time.perf_counter()
    first = builder.create({0: anchors})[0]
    assert isinstance(first, LargeKeyIndex)
    wait_for(builder, 1)
    assert first.overlay is not None, "the build failed"
    figures.build_s = time.perf_counter() - started
    figures.memory_mib = (psutil.Process().memory_info().rss - before) / 2**20
    figures.exact_ms = latency(first.exact.search, queries)
    figures.lists_ms = latency(first.search, queries)
    figures.recall = recall(first.search(queries, K)[1], first.exact.search(queries, K)[1])
    index = first
    for _ in range(windows):
        keys = drift(index.keys, anchors, popular, rng)
        keys.flags.writeable = False
        index = index.derive(keys)
        for batch in np.split(make_queries(keys, popular, rng), QUERIES // 16):
            index.search(batch, K)
    queries = make_queries(index.keys, popular, rng)
    figures.drifted_ms = latency(index.search, queries)
    assert index.overlay is not None
    wanted = KeyIndex(index.keys).search(queries, K)[1]
    figures.drifted_recall = recall(index.search(queries, K)[1], wanted)
    stale = Overlay(first.overlay.base, first.keys, np.empty(0, np.int64))
    figures.stale_recall = recall(stale.search(first.exact, queries, K)[1], wanted)
    figures.changed = len(index.overlay.changed_ids) / count
    figures.builds = builder.builds()[0, "built"]
    builder.close()
    return figures


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--keys", type=int, action="append")
    parser.add_argument("--dim", type=int, default=96)
    parser.add_argument("--windows", type=int, default=1000)
    options = parser.parse_args()
    print("| keys | first build | its memory | exact, 1 / 16 queries | lists | lists, drifted | recall@8 |"
          " drifted | without the overlay | rows changed | builds |")  # fmt: skip
    print("|" + "---|" * 11)
    for count in options.keys or [262_144, 1_048_576]:
        f = measure(count, options.dim, options.windows)
        print(
            f"| {f.keys} | {f.build_s:.1f} s | {f.memory_mib:.0f} MiB | {f.exact_ms} ms | {f.lists_ms} ms |"
            f" {f.drifted_ms} ms | {f.recall:.3f} | {f.drifted_recall:.3f} | {f.stale_recall:.3f} |"
            f" {100 * f.changed:.1f} % | {f.builds} |",
            flush=True,
        )


if __name__ == "__main__":
    main()
