"""When large pools of keys get new inverted lists: decided by wear and by sampled recall, done on one thread.

A failed build is logged and counted, and the index goes on as it was: exact or with a larger overlay.
"""

import itertools
import logging
import threading
import weakref
from collections import Counter, deque
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from types import MappingProxyType

import numpy as np

from keystore.index import BuildStopped, InvertedLists, KeyIndex
from keystore.large_index import Base, LargeKeyIndex, Overlay, changed_rows
from keystore.records import Float32Array, Int64Array
from keystore.visible_index import SearchIndex

MIN_RECALL = 0.98  # sampled; below, lists are built anew
BUILD_RECALL = 0.99  # what a build must reach on its sample, by probing more lists
SAMPLE_EVERY = 64  # searches: one query of every so many is kept
SAMPLE_QUERIES = 64
UNSAMPLED_K = 8
MAX_SAMPLED_K = 64  # larger searches are people's, not the router's

logger = logging.getLogger(__name__)


class IndexBuilder:
    """Makes the indexes of version 0, and looks after those of large layers from then on. Thread-safe."""

    def __init__(self, exact_limit: int) -> None:
        self._exact_limit = exact_limit
        self._layers: dict[int, LayerCaretaker] = {}
        self._stopped = threading.Event()
        self._lock = threading.Lock()
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="key-index")

    def create(self, keys: Mapping[int, Float32Array]) -> Mapping[int, SearchIndex]:
        """Indexes in layer order: exact up to `exact_limit` keys a layer."""
        indexes: dict[int, SearchIndex] = {}
        for layer in sorted(keys):
            keys[layer].flags.writeable = False
            if len(keys[layer]) <= self._exact_limit:
                indexes[layer] = KeyIndex(keys[layer])
                continue
            self._layers[layer] = LayerCaretaker(layer, self._submit, self._stopped.is_set)
            indexes[layer] = LargeKeyIndex(keys[layer], self._layers[layer])
        return MappingProxyType(indexes)

    def recall(self) -> Mapping[int, float]:
        """Last sampled recall@K of each large layer that was sampled."""
        return {layer: each.recall for layer, each in self._layers.items() if each.recall is not None}

    def builds(self) -> Mapping[tuple[int, str], int]:
        """Builds of each large layer by outcome, built or failed; the first one counts too."""
        return {
            (n, outcome): count for n, each in self._layers.items() for outcome, count in each.builds.items()
        }

    def close(self) -> None:
        """Start nothing more; a build that runs ends on its own and is thrown away."""
        with self._lock:
            self._stopped.set()
            self._thread.shutdown(wait=False, cancel_futures=True)

    def _submit(self, job: Callable[[], None]) -> None:
        with self._lock:
            if not self._stopped.is_set():
                self._thread.submit(job)


class LayerCaretaker:
    """One layer's lists, of whatever scope, and a sample of its queries."""

    def __init__(
        self, layer: int, submit: Callable[[Callable[[], None]], None], stopped: Callable[[], bool]
    ) -> None:
        self._layer, self._submit, self._stopped = layer, submit, stopped
        self._bases: weakref.WeakSet[Base] = weakref.WeakSet()
        self._poor_bases: weakref.WeakSet[Base] = weakref.WeakSet()  # where the sampled recall fell
        self._newest_base: Base | None = None  # for later versions, when the one it was made of is gone
        self._bases_lock = threading.Lock()
        self._searches, self._sampled = itertools.count(), itertools.count(1)
        self._sample: deque[tuple[Float32Array, int]] = deque(maxlen=SAMPLE_QUERIES)
        self.recall: float | None = None
        self.builds: Counter[str] = Counter(built=0, failed=0)

    def answered(self, index: LargeKeyIndex, queries: Float32Array, k: int) -> None:
        if next(self._searches) % SAMPLE_EVERY or k > MAX_SAMPLED_K:
            return
        self._sample.append((queries[0].copy(), k))
        if next(self._sampled) % SAMPLE_QUERIES == 0:
            self._submit_for(index, self._measure)

    def created(self, index: LargeKeyIndex, parent: LargeKeyIndex | None) -> None:
        if parent is not None and parent.overlay is not None and self._needs_lists(index):
            self._take_nearer(index, parent.overlay.base)
        if self._needs_lists(index):
            self._submit_for(index, self._improve)

    def _needs_lists(self, index: LargeKeyIndex) -> bool:
        return index.worn or (index.overlay is not None and index.overlay.base in self._poor_bases)

    def _submit_for(self, index: LargeKeyIndex, act: Callable[[LargeKeyIndex], None]) -> None:
        wanted = weakref.ref(index)  # a version that nobody holds any more needs nothing

        def job() -> None:
            index = wanted()
            if index is None:
                return
            try:
                act(index)
            except BuildStopped:
                pass
            except Exception:
                self.builds["failed"] += 1
                logger.exception("key index not built", extra={"layer": self._layer, "keys": len(index.keys)})

        self._submit(job)

    def _improve(self, index: LargeKeyIndex) -> None:
        self._take_nearer(index, None if index.overlay is None else index.overlay.base)
        if self._needs_lists(index) and not index.superseded:
            self._build(index)

    def _take_nearer(self, index: LargeKeyIndex, known: Base | None) -> None:
        """The overlay of another scope's or version's lists, if fewer rows differ from those or `known` is poor."""
        with self._bases_lock:
            others = [base for base in self._bases if base is not known and base not in self._poor_bases]
        for base in others:
            changed, now = changed_rows(base.lists.keys, index.keys), index.overlay
            if now is None or now.base in self._poor_bases or len(changed) < len(now.changed_ids):
                index.overlay = Overlay(base, index.keys, changed)

    def _build(self, index: LargeKeyIndex) -> None:
        lists = InvertedLists(index.keys, self._stopped)
        sampled = bool(self._sample)
        queries, k = self._queries() if sampled else _rows_as_queries(index.keys)
        overlay, recall = _tuned(lists, index.exact, queries, k)
        with self._bases_lock:
            self._bases.add(overlay.base)
            self._newest_base = overlay.base
        index.overlay = overlay
        self.builds["built"] += 1
        if sampled:
            self.recall = recall

    def _measure(self, index: LargeKeyIndex) -> None:
        overlay = index.overlay
        if overlay is None:
            return
        queries, k = self._queries()
        self.recall = _recall(index.exact, overlay, queries, k)
        if self.recall < MIN_RECALL:
            self._poor_bases.add(overlay.base)
            self._improve(index)

    def _queries(self) -> tuple[Float32Array, int]:
        sample = list(self._sample)
        return np.stack([query for query, _ in sample]), max(k for _, k in sample)


def _rows_as_queries(keys: Float32Array) -> tuple[Float32Array, int]:
    """Before the first query came: points between two keys, harder to serve than the keys themselves."""
    rows = np.linspace(0, len(keys) - 1, SAMPLE_QUERIES).astype(np.int64)
    return (keys[rows] + 0.5 * keys[rows[::-1]]).astype(np.float32), UNSAMPLED_K


def _tuned(lists: InvertedLists, exact: KeyIndex, queries: Float32Array, k: int) -> tuple[Overlay, float]:
    """The fewest probed lists, by doubling, that reach BUILD_RECALL; all of them are exact."""
    wanted, nothing = exact.search(queries, k)[1], np.empty(0, np.int64)
    probes = 1
    while True:
        overlay = Overlay(Base(lists, probes), exact.keys, nothing)
        recall = _overlap(overlay.search(exact, queries, k)[1], wanted)
        if recall >= BUILD_RECALL or probes == lists.count:
            return overlay, recall
        probes = min(2 * probes, lists.count)


def _recall(exact: KeyIndex, overlay: Overlay, queries: Float32Array, k: int) -> float:
    return _overlap(overlay.search(exact, queries, k)[1], exact.search(queries, k)[1])


def _overlap(found: Int64Array, wanted: Int64Array) -> float:
    """Mean share of the wanted ids that were found."""
    return float(np.mean([np.isin(row, seen).mean() for row, seen in zip(wanted, found, strict=True)]))
