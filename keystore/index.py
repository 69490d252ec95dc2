"""Inner-product search over one immutable block of keys: exact, and the candidates of inverted lists for large
ones. The only file that imports faiss.

Results do not depend on what else is in the batch, bit for bit. FAISS computes a small batch row by row and a
large one through BLAS, whose rounding follows the batch shape, so FAISS only proposes candidates here: their
scores are recomputed by FAISS's own single-pair kernel, ties go to the lower id, and a query whose cut-off is
closer than the rounding of the proposal is ranked over all keys. The process-wide BLAS threshold is therefore
a hint for speed.
"""

# T queries, M keys, D dimensions, k results, c candidates, P probed lists

from collections.abc import Callable, Generator
from contextlib import contextmanager, nullcontext
from typing import Any

import faiss
import numpy as np

from keystore.errors import NonFiniteQueries
from keystore.records import Float32Array, Int64Array

SPARE_CANDIDATES = 8
PARALLEL_KEYS = 16_384  # below this one FAISS thread: torch owns the cores
DIRECT_PAIRS = 2_048  # queries times keys up to which scoring every pair beats proposing candidates first
BLAS_QUERIES = 8  # from this many queries on BLAS wins; FAISS compares its threshold with T * D
FLOAT32_ROUNDING = 2.0**-24
TRAINING_ROWS_A_LIST, TRAINING_ROUNDS = 64, 10
ROWS_AT_ONCE = 65_536  # added to inverted lists between two looks at whether to stop


class KeyIndex:
    """Search over `keys` [M, D], C-contiguous float32 that nobody writes any more; nothing is copied."""

    __slots__ = ("_ids", "_longest_key", "keys")

    def __init__(self, keys: Float32Array) -> None:
        assert keys.dtype == np.float32, keys.dtype
        assert keys.ndim == 2, keys.shape
        assert keys.flags.c_contiguous, keys.strides
        self.keys = keys
        self._ids = np.arange(len(keys), dtype=np.int64)
        self._longest_key = float(_norms(keys).max())
        faiss.cvar.distance_compute_blas_threshold = BLAS_QUERIES * keys.shape[1]

    def derive(self, keys: Float32Array) -> "KeyIndex":
        """The index of the version after this one."""
        return KeyIndex(keys)

    def search(self, queries: Float32Array, k: int) -> tuple[Float32Array, Int64Array]:
        """The k best keys of each query: scores (T, k) falling, expert ids (T, k); equal scores by rising id.

        Raises NonFiniteQueries when an inner product is NaN or infinite (also for a finite query that
        overflows).
        """
        num_keys, dim = self.keys.shape
        assert queries.shape == (len(queries), dim), (queries.shape, dim)
        assert 0 < k <= num_keys, (k, num_keys)
        queries = np.ascontiguousarray(queries, dtype=np.float32)
        if len(queries) * num_keys <= DIRECT_PAIRS:
            return self._search_all(queries, k)
        proposed, ids = self._propose(queries, min(k + SPARE_CANDIDATES, num_keys))
        if (ids < 0).any():
            raise NonFiniteQueries("a query or key is not finite; allowed: finite float32 values")
        scores, ids = rank(score_pairs(queries, self.keys, ids), ids)
        scores, ids = scores[:, :k], ids[:, :k]
        if not np.isfinite(scores).all():
            raise NonFiniteQueries("an inner product overflowed or is NaN; allowed: finite float32 values")
        if k + SPARE_CANDIDATES < num_keys:
            self._settle_close_calls(queries, proposed[:, -1], scores, ids)
        return np.ascontiguousarray(scores), np.ascontiguousarray(ids)

    def _search_all(self, queries: Float32Array, k: int) -> tuple[Float32Array, Int64Array]:
        every = score_pairs(queries, self.keys, np.tile(self._ids, (len(queries), 1)))  # (T, M)
        ids = np.argsort(-every, axis=1, kind="stable")[:, :k]
        scores = np.take_along_axis(every, ids, axis=1)
        if not np.isfinite(scores).all():
            raise NonFiniteQueries("an inner product overflowed or is NaN; allowed: finite float32 values")
        return scores, np.ascontiguousarray(ids)

    def _propose(self, queries: Float32Array, count: int) -> tuple[Float32Array, Int64Array]:
        with _one_thread() if len(self.keys) <= PARALLEL_KEYS else nullcontext():
            return faiss.knn(queries, self.keys, count, metric=faiss.METRIC_INNER_PRODUCT)

    def _settle_close_calls(
        self, queries: Float32Array, cut_off: Float32Array, scores: Float32Array, ids: Int64Array
    ) -> None:
        # |fl(q.k) - q.k| <= D u |q| |k| for any order of summation (Higham, Accuracy and Stability, 3.5); the
        # proposal and the recomputed score may each be off by that much, and the norms by a little.
        rounding = 2.2 * queries.shape[1] * FLOAT32_ROUNDING * self._longest_key
        certain = scores[:, -1] > cut_off + rounding * _norms(queries)
        for row in np.flatnonzero(~certain):
            everything = np.arange(len(self.keys), dtype=np.int64)[None]
            every_score = score_pairs(queries[row : row + 1], self.keys, everything)
            best_scores, best_ids = rank(every_score, everything)
            scores[row], ids[row] = best_scores[0, : scores.shape[1]], best_ids[0, : ids.shape[1]]


class InvertedLists:
    """FAISS's inverted lists over a copy of `keys` [M, D], about sqrt(M) of them; never changed once made.

    Which lists a query probes and which rows they propose does not depend on what else is in the batch.
    """

    __slots__ = ("_centroids", "_lists", "count", "keys")

    def __init__(self, keys: Float32Array, should_stop: Callable[[], bool] = lambda: False) -> None:
        """Takes seconds to minutes, on one FAISS thread. Raises BuildStopped."""
        rows, dim = keys.shape
        self.keys = keys
        self.count = 1 << round(np.log2(rows) / 2)
        centroids = faiss.IndexFlatIP(dim)
        # Any, here and below: the stubs lack most of what inverted lists can do
        self._lists: Any = faiss.IndexIVFFlat(centroids, dim, self.count, faiss.METRIC_INNER_PRODUCT)
        training = self._lists.cp
        training.spherical, training.seed, training.niter = True, 1, TRAINING_ROUNDS
        training.min_points_per_centroid, training.max_points_per_centroid = 1, TRAINING_ROWS_A_LIST
        with _one_thread():
            self._lists.train(keys)
            for first in range(0, rows, ROWS_AT_ONCE):
                if should_stop():
                    raise BuildStopped
                self._lists.add(keys[first : first + ROWS_AT_ONCE])
        self._centroids = KeyIndex(np.ascontiguousarray(centroids.reconstruct_n(0, self.count)))

    def propose(self, queries: Float32Array, count: int, search: "ListSearch") -> Int64Array:
        """Ids (T, c) of good rows in the probed lists, -1 where there are fewer. Raises NonFiniteQueries."""
        nearness, lists = self._centroids.search(queries, search.probes)  # (T, P)
        scores = np.empty((len(queries), count), np.float32)
        ids = np.empty((len(queries), count), np.int64)
        with _one_thread():
            self._lists.search_preassigned_c(
                len(queries),
                faiss.swig_ptr(queries),
                count,
                faiss.swig_ptr(lists),
                faiss.swig_ptr(nearness),
                faiss.swig_ptr(scores),
                faiss.swig_ptr(ids),
                False,
                search.parameters,
            )
        return ids


class ListSearch:
    """How many lists to probe, and which of their L rows never to propose: `hidden_ids`, and those from M on."""

    __slots__ = ("_selector", "parameters", "probes")

    def __init__(self, probes: int, hidden_ids: Int64Array, num_keys: int, num_rows: int) -> None:
        self.probes = probes
        shown = np.ones(num_keys, bool)
        shown[hidden_ids] = False
        bits = np.packbits(shown, bitorder="little")
        untyped: Any = faiss
        hides = len(hidden_ids) > 0 or num_rows > num_keys
        self._selector = untyped.IDSelectorBitmap(bits) if hides else None  # no row past the bitmap is shown
        self.parameters: Any = untyped.SearchParametersIVF(nprobe=probes, sel=self._selector)


class BuildStopped(Exception):
    """Nobody wants the lists any more."""


def score_pairs(queries: Float32Array, keys: Float32Array, ids: Int64Array) -> Float32Array:
    """Inner products of each query with its own ids (T, c): the same bits wherever the two vectors lie."""
    scores = np.empty(ids.shape, np.float32)
    faiss.fvec_inner_products_by_idx(  # pyright: ignore[reportAttributeAccessIssue] - missing from the stubs
        faiss.swig_ptr(scores),
        faiss.swig_ptr(queries),
        faiss.swig_ptr(keys),
        faiss.swig_ptr(ids),
        queries.shape[1],
        *ids.shape,
    )
    return scores


def rank(scores: Float32Array, ids: Int64Array) -> tuple[Float32Array, Int64Array]:
    """Both by falling score, equal scores by rising id."""
    order = np.lexsort((ids, -scores), axis=-1)
    return np.take_along_axis(scores, order, axis=1), np.take_along_axis(ids, order, axis=1)


@contextmanager
def _one_thread() -> Generator[None]:
    threads = faiss.omp_get_max_threads()  # a setting of the calling thread
    faiss.omp_set_num_threads(1)
    try:
        yield
    finally:
        faiss.omp_set_num_threads(threads)


def _norms(rows: Float32Array) -> Float32Array:
    with np.errstate(over="ignore"):  # an infinite bound only sends the row the exact way
        return np.sqrt(np.einsum("td,td->t", rows, rows))
