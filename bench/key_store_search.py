"""The searching part of bench/key_store.py: FAISS as the key store uses it against torch, and FAISS against itself."""

import statistics
import time
from collections.abc import Callable, Sequence
from functools import partial

import numpy as np
import torch
from key_store_report import heading, row
from numpy.typing import NDArray

# isort: split
import faiss  # after torch

from keystore.index import KeyIndex

K = 4
DEFAULT_THRESHOLD = int(faiss.cvar.distance_compute_blas_threshold)  # before any index has set it


def use_one_thread() -> None:
    """Of FAISS and torch."""
    faiss.omp_set_num_threads(1)
    torch.set_num_threads(1)


def median_ms(act: Callable[[], object], repeats: int) -> str:
    seconds: list[float] = []
    for _ in range(repeats + 3):
        started = time.perf_counter()
        act()
        seconds.append(time.perf_counter() - started)
    return f"{1000 * statistics.median(seconds[3:]):.3f}"


def measure_search(sizes: Sequence[int], dim: int, repeats: int) -> None:
    heading(f"Searching {dim} dimensions exactly, ms", "keys", "queries", "FAISS", "torch")
    rng = np.random.default_rng(0)
    for size in sizes:
        keys = rng.standard_normal((size, dim), dtype=np.float32)
        index, tensor = KeyIndex(keys), torch.from_numpy(keys)
        for count in (1, 16, 64):
            queries = rng.standard_normal((count, dim), dtype=np.float32)
            ours = median_ms(partial(index.search, queries, K), repeats)
            asked = torch.from_numpy(queries)
            theirs = median_ms(lambda asked=asked, tensor=tensor: (asked @ tensor.T).topk(K), repeats)
            row(size, count, ours, theirs)


def measure_threshold(sizes: Sequence[int], dim: int, repeats: int) -> None:
    title = f"FAISS's BLAS threshold, knn over {dim} dimensions, ms"
    heading(title, "keys", "queries", f"default, {DEFAULT_THRESHOLD}", "8 x dim", "effect")
    rng = np.random.default_rng(0)
    for size in sizes:
        keys: NDArray[np.float32] = rng.standard_normal((size, dim), dtype=np.float32)
        for count in (1, 16, 64):
            queries = rng.standard_normal((count, dim), dtype=np.float32)
            found: list[str] = []
            for threshold in (DEFAULT_THRESHOLD, 8 * dim):
                faiss.cvar.distance_compute_blas_threshold = threshold
                search = partial(faiss.knn, queries, keys, K, metric=faiss.METRIC_INNER_PRODUCT)
                found.append(median_ms(search, repeats))
            row(size, count, *found, f"{float(found[0]) / float(found[1]):.1f}x")
