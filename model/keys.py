"""How a plastic layer reaches its routing keys: one Protocol, and the anchors as its simplest answer.

Knows nothing about versions being stored, scopes or FAISS; the key store's snapshots fit `KeyView` by shape.
"""

from collections.abc import Mapping
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

Float32Array = NDArray[np.float32]
Int64Array = NDArray[np.int64]


class KeyView(Protocol):
    """One immutable version of the routing keys of every plastic layer; each is itself alone, and can be referred to weakly."""

    @property
    def version(self) -> int: ...

    def keys_of(self, layer: int) -> Float32Array:
        """Keys of a layer, shape (experts, key_size), contiguous; the same array as long as the version is there."""
        ...

    def visible_ids(self, layer: int) -> Int64Array | None:
        """Rising ids of the experts that may be found, as `keys_of` always the same array; None: all."""
        ...

    def search(self, layer: int, queries: Float32Array, k: int) -> tuple[Float32Array, Int64Array]:
        """The k keys of largest inner product per query: scores and expert ids, both (tokens, k)."""
        ...

    def score(self, layer: int, queries: Float32Array, expert_ids: Int64Array) -> Float32Array:
        """Inner products of each query with given keys, (tokens, k): the bits that `search` has for them."""
        ...


class AnchorKeys:
    """The keys that a model was trained with, searched exactly in numpy. Version 0 of everything."""

    version = 0

    def __init__(self, anchors: Mapping[int, Float32Array]):
        self._anchors = dict(anchors)

    def keys_of(self, layer: int) -> Float32Array:
        return self._anchors[layer]

    def visible_ids(self, layer: int) -> Int64Array | None:
        return None

    def search(self, layer: int, queries: Float32Array, k: int) -> tuple[Float32Array, Int64Array]:
        scores = self._scores(layer, queries)
        order = np.argsort(-scores, axis=1, kind="stable")[:, :k]
        return np.take_along_axis(scores, order, axis=1), order.astype(np.int64)

    def score(self, layer: int, queries: Float32Array, expert_ids: Int64Array) -> Float32Array:
        return np.take_along_axis(self._scores(layer, queries), expert_ids, axis=1)

    def _scores(self, layer: int, queries: Float32Array) -> Float32Array:
        # Not `@`: a BLAS product gives a row other bits when there are other rows beside it.
        return np.einsum("td,ed->te", queries, self._anchors[layer])
