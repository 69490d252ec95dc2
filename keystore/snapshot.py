"""KeySnapshot: one immutable version of one scope's keys, ready to search. Knows nothing about how it was
learned.
"""

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType

import numpy as np

from keystore.errors import NonFiniteQueries
from keystore.index import score_pairs
from keystore.index_builder import SearchIndex
from keystore.records import Float32Array, Int64Array, ScopeId


@dataclass(frozen=True, slots=True, weakref_slot=True, eq=False)
class KeySnapshot:
    """A published version; never written again. Holding a reference pins it.

    Layers that did not change since the parent share its memory. Two snapshots with one checksum hold the
    same keys and usage, whatever their numbers; a cache of anything computed with the keys goes by the
    checksum.
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

    @property
    def keys(self) -> Mapping[int, Float32Array]:
        """Layer to read-only keys (M, D)."""
        return {layer: index.keys for layer, index in self.indexes.items()}

    def keys_of(self, layer: int) -> Float32Array:
        """Read-only keys (M, D) of one layer. Raises KeyError for a layer without routing keys."""
        return self.indexes[layer].keys

    def search(self, layer: int, queries: Float32Array, k: int) -> tuple[Float32Array, Int64Array]:
        """Scores (T, k) and expert ids (T, k) of the best keys. Raises NonFiniteQueries."""
        return self.indexes[layer].search(queries, k)

    def score(self, layer: int, queries: Float32Array, expert_ids: Int64Array) -> Float32Array:
        """Inner products (T, k) with given keys, the bits that `search` has for them. Raises NonFiniteQueries."""
        queries, expert_ids = np.ascontiguousarray(queries), np.ascontiguousarray(expert_ids)
        scores = score_pairs(queries, self.indexes[layer].keys, expert_ids)
        if not np.isfinite(scores).all():
            raise NonFiniteQueries("an inner product overflowed or is NaN; allowed: finite float32 values")
        return scores


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


def read_only(arrays: Mapping[int, Float32Array]) -> Mapping[int, Float32Array]:
    """The same arrays in layer order, closed for writing."""
    for array in arrays.values():
        array.flags.writeable = False
    return MappingProxyType({layer: arrays[layer] for layer in sorted(arrays)})


def checksum_of(keys: Mapping[int, Float32Array], usage: Mapping[int, Float32Array]) -> str:
    """sha256 hex over the layers in order: layer number, keys, and usage where the layer is plastic (little-
    endian).
    """
    digest = hashlib.sha256()
    for layer in sorted(keys):
        digest.update(layer.to_bytes(8, "little", signed=True))
        digest.update(keys[layer].astype("<f4", copy=False).data)
        if layer in usage:
            digest.update(usage[layer].astype("<f4", copy=False).data)
    return digest.hexdigest()
