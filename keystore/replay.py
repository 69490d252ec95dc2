"""Between snapshots and stored rows: what to write for a version, and how to rebuild one from what was
written.
"""

from collections.abc import Mapping

import numpy as np

from keystore.backends.base import RowChanges, StoredVersion, VersionRecord, VersionRow
from keystore.errors import OutOfBounds, StoreCorrupted
from keystore.gravity import check_bounds
from keystore.projection import drift_of_layers
from keystore.records import Float32Array
from keystore.snapshot import KeySnapshot, build_indexes, checksum_of, read_only


def record_of(
    snapshot: KeySnapshot, base: KeySnapshot, origin: KeySnapshot, trust_radius: float, *, is_checkpoint: bool
) -> VersionRecord:
    """The rows in which `snapshot` differs from `base` (from the anchors for a checkpoint), with its
    metadata.
    """
    plastic = {layer: snapshot.keys_of(layer) for layer in snapshot.usage}
    drift_max, drift_mean = drift_of_layers(origin.keys, plastic, trust_radius)
    against = origin if is_checkpoint else base
    row = VersionRow(
        scope=snapshot.scope,
        version=snapshot.version,
        parent=snapshot.parent or 0,
        created_at=snapshot.created_at,
        tokens=snapshot.tokens,
        drift_max=min(drift_max, np.finfo(np.float64).max),  # a zero anchor's drift is infinite
        drift_mean=min(drift_mean, np.finfo(np.float64).max),
        checksum=snapshot.checksum,
        reason=snapshot.reason,
    )
    return VersionRecord(row, is_checkpoint, changed_rows(against.keys, plastic), snapshot.usage)


def changed_rows(
    base: Mapping[int, Float32Array], keys: Mapping[int, Float32Array]
) -> Mapping[int, RowChanges]:
    """Rows whose bits differ; layers that share their memory or are equal are left out."""
    changes: dict[int, RowChanges] = {}
    for layer, rows in keys.items():
        if rows is base[layer]:
            continue
        ids = np.flatnonzero((rows.view(np.uint32) != base[layer].view(np.uint32)).any(axis=1)).astype(
            np.int64
        )
        if len(ids):
            changes[layer] = RowChanges(ids, rows[ids])
    return changes


def rebuild(stored: StoredVersion, origin: KeySnapshot, trust_radius: float) -> KeySnapshot:
    """The snapshot of a stored version, verified. Raises StoreCorrupted (naming it) and OutOfBounds."""
    row = stored.row
    name = f"{row.scope} version {row.version}"
    keys = dict(origin.keys)
    for change in stored.changes:
        for layer, rows in change.items():
            _apply(name, keys, origin, layer, rows)
    _check_usage(name, stored.usage, origin)
    indexes = build_indexes(keys, origin.indexes)
    if checksum_of(keys, stored.usage) != row.checksum:
        raise StoreCorrupted(f"{name}: keys and usage do not match their checksum {row.checksum}")
    for layer in stored.usage:
        try:
            check_bounds(origin.keys_of(layer), indexes[layer].keys, trust_radius)
        except OutOfBounds as error:
            raise OutOfBounds(
                f"{name} layer {layer}: {error}; reset or roll back the scope, or restore the radius"
            ) from error
    return KeySnapshot(
        model_id=origin.model_id,
        scope=row.scope,
        version=row.version,
        parent=row.parent,
        reason=row.reason,
        created_at=row.created_at,
        tokens=row.tokens,
        indexes=indexes,
        usage=read_only(stored.usage),
        checksum=row.checksum,
    )


def _apply(
    name: str, keys: dict[int, Float32Array], origin: KeySnapshot, layer: int, change: RowChanges
) -> None:
    if layer not in origin.usage:
        raise StoreCorrupted(
            f"{name}: layer {layer} is stored but not plastic; plastic are {list(origin.usage)}"
        )
    num_experts, dim = keys[layer].shape
    if change.rows.shape[1] != dim or (len(change.expert_ids) and change.expert_ids[-1] >= num_experts):
        raise StoreCorrupted(f"{name}: rows of layer {layer} do not fit its {num_experts} keys of {dim}")
    if keys[layer] is origin.keys_of(layer):
        keys[layer] = keys[layer].copy()
    keys[layer][change.expert_ids] = change.rows


def _check_usage(name: str, usage: Mapping[int, Float32Array], origin: KeySnapshot) -> None:
    if usage.keys() != origin.usage.keys():
        raise StoreCorrupted(f"{name}: usage of layers {sorted(usage)}; plastic are {list(origin.usage)}")
    for layer, values in usage.items():
        if len(values) != len(origin.usage[layer]) or not np.isfinite(values).all():
            raise StoreCorrupted(f"{name}: usage of layer {layer} has the wrong length or is not finite")
