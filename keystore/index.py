"""Exact inner-product search over one immutable block of keys; the only file that imports faiss.

Results do not depend on what else is in the batch, bit for bit. FAISS computes a small batch row by row and a
large one through BLAS, whose rounding follows the batch shape, so FAISS only proposes candidates here: their
scores are recomputed by FAISS's own single-pair kernel, ties go to the lower id, and a query whose cut-off is
closer than the rounding of the proposal is ranked over all keys. The process-wide BLAS threshold is therefore
a hint for speed.
"""

# T queries, M keys, D dimensions, k results, c candidates

import faiss
import numpy as np

from keystore.errors import NonFiniteQueries
from keystore.records import Float32Array, Int64Array

SPARE_CANDIDATES = 8
PARALLEL_KEYS = 16_384  # below this one FAISS thread: torch owns the cores
BLAS_QUERIES = 8  # from this many queries on BLAS wins; FAISS compares its threshold with T * D
FLOAT32_ROUNDING = 2.0**-24


class KeyIndex:
    """Search over `keys` [M, D], C-contiguous float32 that nobody writes any more; nothing is copied."""

    __slots__ = ("_longest_key", "keys")

    def __init__(self, keys: Float32Array) -> None:
        assert keys.dtype == np.float32, keys.dtype
        assert keys.ndim == 2, keys.shape
        assert keys.flags.c_contiguous, keys.strides
        self.keys = keys
        self._longest_key = float(_norms(keys).max())
        faiss.cvar.distance_compute_blas_threshold = BLAS_QUERIES * keys.shape[1]

    def search(self, queries: Float32Array, k: int) -> tuple[Float32Array, Int64Array]:
        """The k best keys of each query: scores (T, k) falling, expert ids (T, k); equal scores by rising id.

        Raises NonFiniteQueries when an inner product is NaN or infinite (also for a finite query that
        overflows).
        """
        num_keys, dim = self.keys.shape
        assert queries.shape == (len(queries), dim), (queries.shape, dim)
        assert 0 < k <= num_keys, (k, num_keys)
        queries = np.ascontiguousarray(queries, dtype=np.float32)
        proposed, ids = self._propose(queries, min(k + SPARE_CANDIDATES, num_keys))
        if (ids < 0).any():
            raise NonFiniteQueries("a query or key is not finite; allowed: finite float32 values")
        scores, ids = _rank(self._score(queries, ids), ids)
        scores, ids = scores[:, :k], ids[:, :k]
        if not np.isfinite(scores).all():
            raise NonFiniteQueries("an inner product overflowed or is NaN; allowed: finite float32 values")
        if k + SPARE_CANDIDATES < num_keys:
            self._settle_close_calls(queries, proposed[:, -1], scores, ids)
        return np.ascontiguousarray(scores), np.ascontiguousarray(ids)

    def _propose(self, queries: Float32Array, count: int) -> tuple[Float32Array, Int64Array]:
        threads = faiss.omp_get_max_threads()  # a setting of the calling thread
        if len(self.keys) <= PARALLEL_KEYS:
            faiss.omp_set_num_threads(1)
        try:
            found = faiss.knn(queries, self.keys, count, metric=faiss.METRIC_INNER_PRODUCT)
        finally:
            faiss.omp_set_num_threads(threads)
        return found

    def _score(self, queries: Float32Array, ids: Int64Array) -> Float32Array:
        scores = np.empty(ids.shape, np.float32)
        faiss.fvec_inner_products_by_idx(  # pyright: ignore[reportAttributeAccessIssue] - missing from the stubs
            faiss.swig_ptr(scores),
            faiss.swig_ptr(queries),
            faiss.swig_ptr(self.keys),
            faiss.swig_ptr(ids),
            queries.shape[1],
            *ids.shape,
        )
        return scores

    def _settle_close_calls(
        self, queries: Float32Array, cut_off: Float32Array, scores: Float32Array, ids: Int64Array
    ) -> None:
        # |fl(q.k) - q.k| <= D u |q| |k| for any order of summation (Higham, Accuracy and Stability, 3.5); the
        # proposal and the recomputed score may each be off by that much, and the norms by a little.
        rounding = 2.2 * queries.shape[1] * FLOAT32_ROUNDING * self._longest_key
        certain = scores[:, -1] > cut_off + rounding * _norms(queries)
        for row in np.flatnonzero(~certain):
            everything = np.arange(len(self.keys), dtype=np.int64)[None]
            best_scores, best_ids = _rank(self._score(queries[row : row + 1], everything), everything)
            scores[row], ids[row] = best_scores[0, : scores.shape[1]], best_ids[0, : ids.shape[1]]


def _rank(scores: Float32Array, ids: Int64Array) -> tuple[Float32Array, Int64Array]:
    order = np.lexsort((ids, -scores), axis=-1)
    return np.take_along_axis(scores, order, axis=1), np.take_along_axis(ids, order, axis=1)


def _norms(rows: Float32Array) -> Float32Array:
    with np.errstate(over="ignore"):  # an infinite bound only sends the row the exact way
        return np.sqrt(np.einsum("td,td->t", rows, rows))
