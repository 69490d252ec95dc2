"""Search over some of a layer's keys: the hidden ones are in no index, so no search can find or be moved by them."""

# T queries, M keys of which V are visible, D dimensions, k results

import numpy as np

from keystore.index import KeyIndex
from keystore.large_index import LargeKeyIndex
from keystore.records import Float32Array, Int64Array


class VisibleIndex:
    """An index of `keys` [M, D] through `rows`, which has only those of `visible_ids` (V,), rising."""

    __slots__ = ("keys", "rows", "visible_ids")

    def __init__(self, keys: Float32Array, rows: KeyIndex | LargeKeyIndex, visible_ids: Int64Array) -> None:
        self.keys, self.rows, self.visible_ids = keys, rows, visible_ids

    def derive(self, keys: Float32Array) -> "VisibleIndex":
        """The index of the version after this one, with the same visible rows."""
        return VisibleIndex(keys, self.rows.derive(rows_of(keys, self.visible_ids)), self.visible_ids)

    def search(self, queries: Float32Array, k: int) -> tuple[Float32Array, Int64Array]:
        """As KeyIndex.search over the visible keys, k up to V, with ids that index all M."""
        scores, places = self.rows.search(queries, k)
        return scores, self.visible_ids[places]


SearchIndex = KeyIndex | LargeKeyIndex | VisibleIndex


def derive_index(base: SearchIndex, keys: Float32Array, visible_ids: Int64Array | None) -> SearchIndex:
    """The index after `base` when rows were added or hidden; None: every row is visible."""
    rows = base.rows if isinstance(base, VisibleIndex) else base
    if visible_ids is None:
        return rows.derive(keys)
    return VisibleIndex(keys, rows.derive(rows_of(keys, visible_ids)), visible_ids)


def visible_ids_of(index: SearchIndex) -> Int64Array | None:
    """Rising ids of the rows that searches can find; None: all of them."""
    return index.visible_ids if isinstance(index, VisibleIndex) else None


def rows_of(array: Float32Array, ids: Int64Array) -> Float32Array:
    """Read-only rows of a read-only array; the memory is shared when the ids are its first ones."""
    if is_prefix(ids):
        return array[: len(ids)]
    rows = np.ascontiguousarray(array[ids])
    rows.flags.writeable = False
    return rows


def is_prefix(ids: Int64Array) -> bool:
    """Whether rising ids are 0 to V-1."""
    return int(ids[-1]) == len(ids) - 1
