"""KeySnapshot: one immutable version of one scope's keys, ready to search. Knows nothing about how it was
learned.
"""

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType

import numpy as np

from keystore.errors import ExpertNotVisible, NonFiniteQueries
from keystore.index import score_pairs
from keystore.records import Float32Array, Int64Array, ScopeId
from keystore.visible_index import SearchIndex, derive_index, is_prefix, rows_of, visible_ids_of

LEARNED = "learned from"  # how the reason of a version begins that learning made


@dataclass(frozen=True, slots=True, weakref_slot=True, eq=False)
class KeySnapshot:
    """A published version; never written again. Holding a reference pins it.

    Layers that did not change since the parent share its memory. Two snapshots with one checksum hold the
    same visible keys and usage, whatever their numbers; a cache of anything that routing computes goes by the
    checksum. Hidden rows are at their anchors and come last or between the others: expert ids index all rows.
    """

    model_id: str
    scope: ScopeId
    version: int  # 0 is the anchors
    parent: int | None  # for the first version of a session, a version of its tenant
    reason: str
    created_at: float  # unix seconds
    tokens: int  # learned so far
    indexes: Mapping[int, SearchIndex]
    usage: Mapping[int, Float32Array]  # plastic layers, (M,)
    checksum: str  # sha256, see checksum_of
    generation: int = 0  # of the expert pool that says which rows there are and who sees them

    @property
    def is_learned(self) -> bool:
        """Whether it came about by learning from its parent, not in place of it."""
        return self.reason.startswith(LEARNED)

    @property
    def keys(self) -> Mapping[int, Float32Array]:
        """Layer to read-only keys (M, D)."""
        return {layer: index.keys for layer, index in self.indexes.items()}

    def keys_of(self, layer: int) -> Float32Array:
        """Read-only keys (M, D) of one layer. Raises KeyError for a layer without routing keys."""
        return self.indexes[layer].keys

    def visible_ids(self, layer: int) -> Int64Array | None:
        """Rising ids of the experts that this scope may use; None: all rows of `keys_of`."""
        return visible_ids_of(self.indexes[layer])

    @property
    def visible(self) -> Mapping[int, Int64Array]:
        """Visible ids of the layers that hide experts."""
        shown = {layer: self.visible_ids(layer) for layer in self.indexes}
        return {layer: ids for layer, ids in shown.items() if ids is not None}

    def search(self, layer: int, queries: Float32Array, k: int) -> tuple[Float32Array, Int64Array]:
        """Scores (T, k) and expert ids (T, k) of the best visible keys. Raises NonFiniteQueries."""
        return self.indexes[layer].search(queries, k)

    def score(self, layer: int, queries: Float32Array, expert_ids: Int64Array) -> Float32Array:
        """Inner products (T, k) with given keys, the bits that `search` has for them.

        Raises NonFiniteQueries, and ExpertNotVisible for an id that is hidden or not there.
        """
        queries, expert_ids = np.ascontiguousarray(queries), np.ascontiguousarray(expert_ids)
        self._check_visible(layer, expert_ids)
        scores = score_pairs(queries, self.indexes[layer].keys, expert_ids)
        if not np.isfinite(scores).all():
            raise NonFiniteQueries("an inner product overflowed or is NaN; allowed: finite float32 values")
        return scores

    def _check_visible(self, layer: int, expert_ids: Int64Array) -> None:
        visible = self.visible_ids(layer)
        allowed = np.arange(len(self.keys_of(layer))) if visible is None else visible
        wrong = expert_ids[~np.isin(expert_ids, allowed)]
        if wrong.size:
            raise ExpertNotVisible(
                f"expert {wrong.flat[0]} of layer {layer}; {self.scope} version {self.version} has"
                f" {len(allowed)} of them, the last is {allowed[-1]}"
            )


def build_indexes(
    keys: Mapping[int, Float32Array], base: Mapping[int, SearchIndex]
) -> Mapping[int, SearchIndex]:
    """Read-only indexes in layer order; a layer whose array is the very one of `base` keeps its index."""
    indexes: dict[int, SearchIndex] = {}
    for layer in sorted(keys):
        keys[layer].flags.writeable = False
        unchanged = base[layer].keys is keys[layer]
        indexes[layer] = base[layer] if unchanged else base[layer].derive(keys[layer])
    return MappingProxyType(indexes)


def rebuild_indexes(
    keys: Mapping[int, Float32Array], base: Mapping[int, SearchIndex], visible: Mapping[int, Int64Array]
) -> Mapping[int, SearchIndex]:
    """As `build_indexes`, for keys of which other rows may be there or visible than in `base`."""
    indexes: dict[int, SearchIndex] = {}
    for layer in sorted(keys):
        keys[layer].flags.writeable = False
        shown = visible.get(layer)
        known = base[layer].keys is keys[layer] and same_ids(visible_ids_of(base[layer]), shown)
        indexes[layer] = base[layer] if known else derive_index(base[layer], keys[layer], shown)
    return MappingProxyType(indexes)


def same_ids(first: Int64Array | None, second: Int64Array | None) -> bool:
    """Whether two sets of visible ids are equal; None, everything, equals only None."""
    if first is None or second is None:
        return first is second
    return np.array_equal(first, second)


def read_only(arrays: Mapping[int, Float32Array]) -> Mapping[int, Float32Array]:
    """The same arrays in layer order, closed for writing."""
    for array in arrays.values():
        array.flags.writeable = False
    return MappingProxyType({layer: arrays[layer] for layer in sorted(arrays)})


def checksum_of(
    keys: Mapping[int, Float32Array],
    usage: Mapping[int, Float32Array],
    visible: Mapping[int, Int64Array] = MappingProxyType({}),
) -> str:
    """sha256 hex over the layers in order: layer number, keys, and usage where the layer is plastic (little-
    endian).

    Of a layer in `visible` only those rows count, and their ids when they are not its first: rows that are
    hidden at the end change nothing.
    """
    digest = hashlib.sha256()
    for layer in sorted(keys):
        digest.update(layer.to_bytes(8, "little", signed=True))
        parts = [keys[layer], usage[layer]] if layer in usage else [keys[layer]]
        shown = visible.get(layer)
        if shown is not None:
            parts = [rows_of(part, shown) for part in parts]
            if not is_prefix(shown):
                digest.update(b"ids" + shown.astype("<i8", copy=False).tobytes())
        for part in parts:
            digest.update(part.astype("<f4", copy=False).data)
    return digest.hexdigest()
