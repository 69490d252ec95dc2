"""Search over a large block of keys: inverted lists of an older version, and every row that changed since exactly.

An index is replaced by a better one in one assignment, so that a reader sees the old or the new, never a part.
Does not know when to build one (index_builder).
"""

# T queries, M keys, D dimensions, k results, c candidates

from dataclasses import dataclass
from typing import Protocol

import numpy as np

from keystore.errors import NonFiniteQueries
from keystore.index import SPARE_CANDIDATES, InvertedLists, KeyIndex, ListSearch, rank, score_pairs
from keystore.records import Float32Array, Int64Array

MAX_CHANGED_SHARE = 0.05  # of the rows; above, the lists are built anew


@dataclass(frozen=True, slots=True, eq=False, weakref_slot=True)
class Base:
    """Inverted lists of one version, and how many of them to probe."""

    lists: InvertedLists
    probes: int


class Overlay:
    """A base seen from another version of M keys: rows that differ are never taken from the lists, but scored
    exactly, and rows that the lists have beyond M are never found.
    """

    __slots__ = ("_rows", "_search", "base", "changed_ids")

    def __init__(self, base: Base, keys: Float32Array, changed_ids: Int64Array) -> None:
        assert not len(changed_ids) or changed_ids[-1] < len(keys), (changed_ids[-1], len(keys))
        self.base, self.changed_ids = base, changed_ids
        self._rows = KeyIndex(keys[changed_ids]) if len(changed_ids) else None
        self._search = ListSearch(base.probes, changed_ids, len(keys), len(base.lists.keys))

    def search(self, exact: KeyIndex, queries: Float32Array, k: int) -> tuple[Float32Array, Int64Array]:
        """As KeyIndex.search, except that unchanged rows outside the probed lists may be missing."""
        proposed = self.base.lists.propose(queries, k + SPARE_CANDIDATES, self._search)
        missing = proposed < 0
        scores = score_pairs(queries, exact.keys, np.where(missing, 0, proposed))
        scores[missing] = -np.inf
        if self._rows is not None:
            row_scores, rows = self._rows.search(queries, min(k, len(self.changed_ids)))
            scores = np.concatenate([scores, row_scores], axis=1)
            proposed = np.concatenate([proposed, self.changed_ids[rows]], axis=1)
        scores, ids = rank(scores, proposed)
        scores, ids = np.ascontiguousarray(scores[:, :k]), np.ascontiguousarray(ids[:, :k])
        short = np.flatnonzero(ids.min(axis=1) < 0)
        if len(short):
            scores[short], ids[short] = exact.search(queries[short], k)
        if not np.isfinite(scores).all():
            raise NonFiniteQueries("an inner product overflowed or is NaN; allowed: finite float32 values")
        return scores, ids


class Caretaker(Protocol):
    """Who improves indexes, on a thread of its own."""

    def answered(self, index: "LargeKeyIndex", queries: Float32Array, k: int) -> None:
        """A search through lists went well. Must be quick."""
        ...

    def created(self, index: "LargeKeyIndex", parent: "LargeKeyIndex | None") -> None:
        """A version's index was made; its overlay, if any, is its parent's."""
        ...


class LargeKeyIndex:
    """Like KeyIndex, and as exact until the first lists are built."""

    __slots__ = ("__weakref__", "_caretaker", "_is_origin", "exact", "keys", "overlay", "superseded")

    def __init__(
        self, keys: Float32Array, caretaker: Caretaker, parent: "LargeKeyIndex | None" = None
    ) -> None:
        self.keys, self.exact, self._caretaker = keys, KeyIndex(keys), caretaker
        self.overlay: Overlay | None = None  # read once a search
        self.superseded = False  # a later version exists: not worth new lists of its own
        self._is_origin = parent is None  # what new scopes start from is never superseded
        known = parent.overlay if parent is not None else None
        if parent is not None and known is not None:
            left = known.changed_ids[known.changed_ids < len(keys)]  # hidden experts leave fewer rows
            self.overlay = Overlay(known.base, keys, np.union1d(left, changed_rows(parent.keys, keys)))
        if parent is not None:
            parent.superseded = not parent._is_origin
        caretaker.created(self, parent)

    def derive(self, keys: Float32Array) -> "LargeKeyIndex":
        """The index of the version after this one: the same lists, the rows that differ on top."""
        return LargeKeyIndex(keys, self._caretaker, self)

    def search(self, queries: Float32Array, k: int) -> tuple[Float32Array, Int64Array]:
        """The best keys of each query, as KeyIndex.search; a changed row is never missed.

        Raises NonFiniteQueries.
        """
        assert queries.shape == (len(queries), self.keys.shape[1]), (queries.shape, self.keys.shape)
        assert 0 < k <= len(self.keys), (k, len(self.keys))
        overlay = self.overlay
        queries = np.ascontiguousarray(queries, dtype=np.float32)
        if overlay is None or not len(queries):
            return self.exact.search(queries, k)
        found = overlay.search(self.exact, queries, k)
        self._caretaker.answered(self, queries, k)
        return found

    @property
    def worn(self) -> bool:
        """Whether too much has changed since the lists were built, or there are none."""
        return self.overlay is None or len(self.overlay.changed_ids) > MAX_CHANGED_SHARE * len(self.keys)


def changed_rows(before: Float32Array, after: Float32Array) -> Int64Array:
    """Rising ids of the rows of `after` whose bits differ or that `before` does not have."""
    both = min(len(before), len(after))
    differs = np.ones(len(after), bool)
    differs[:both] = (before[:both].view(np.uint32) != after[:both].view(np.uint32)).any(axis=1)
    return np.flatnonzero(differs).astype(np.int64)
