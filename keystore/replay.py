"""Between snapshots and stored rows: what to write for a version, and how to rebuild one from what was
written.
"""

from collections.abc import Mapping
from dataclasses import replace

import numpy as np

from keystore.backends.base import RowChanges, StoredVersion, VersionRecord, VersionRow
from keystore.errors import OutOfBounds, StoreCorrupted
from keystore.generations import Content, Generation
from keystore.gravity import check_bounds
from keystore.pool import ExpertPool
from keystore.projection import drift_of_layers
from keystore.records import Float32Array
from keystore.snapshot import KeySnapshot, checksum_of


def record_of(
    snapshot: KeySnapshot, base: KeySnapshot, pool: ExpertPool, trust_radius: float, *, is_checkpoint: bool
) -> VersionRecord:
    """The rows in which `snapshot` differs from `base` (from the pool's anchors for a checkpoint), with its
    metadata.
    """
    drift_max, drift_mean = drift_of(snapshot, pool, trust_radius)
    against = pool.keys if is_checkpoint else base.keys
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
        generation=snapshot.generation,
    )
    plastic = {layer: snapshot.keys_of(layer) for layer in snapshot.usage}
    return VersionRecord(row, is_checkpoint, changed_rows(against, plastic), snapshot.usage)


def drift_of(snapshot: KeySnapshot, pool: ExpertPool, trust_radius: float) -> tuple[float, float]:
    """Largest and mean fraction of the trust radius used by the experts that have one: not those that settle."""
    anchors, bounded = dict(pool.keys), {layer: snapshot.keys_of(layer) for layer in snapshot.usage}
    for layer in bounded:
        free = pool.settling_ids(snapshot.scope, layer)
        if len(free):
            anchors[layer] = np.delete(anchors[layer], free, axis=0)
            bounded[layer] = np.delete(bounded[layer], free, axis=0)
    return drift_of_layers(anchors, bounded, trust_radius)


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


def rebuild(stored: StoredVersion, then: ExpertPool, now: Generation, trust_radius: float) -> KeySnapshot:
    """The snapshot of a version stored under the pool `then`: verified there, lifted to `now`.

    Raises StoreCorrupted (naming it) and OutOfBounds.
    """
    row = stored.row
    name = f"{row.scope} version {row.version}"
    content = now.lift(_verified(name, stored, then, trust_radius), then, row.scope)
    origin = now.origin_of(row.scope)
    return now.adopt(_described(origin, row), content, base=origin)


def follow(record: VersionRecord, base: KeySnapshot, now: Generation, trust_radius: float) -> KeySnapshot:
    """The snapshot of a version that somebody else has made from `base`, of the current pool; verified like a loaded one.

    Raises StoreCorrupted (naming it) and OutOfBounds.
    """
    stored = StoredVersion(record.row, [record.changes], record.usage)
    if record.is_checkpoint:
        return rebuild(stored, now.pool, now, trust_radius)
    name = f"{record.row.scope} version {record.row.version}"
    content = _verified(name, stored, now.pool, trust_radius, base.keys)
    return now.adopt(_described(base, record.row), content, base)


def _described(origin: KeySnapshot, row: VersionRow) -> KeySnapshot:
    return replace(
        origin,
        scope=row.scope,
        version=row.version,
        parent=row.parent,
        reason=row.reason,
        created_at=row.created_at,
        tokens=row.tokens,
    )


def _verified(
    name: str,
    stored: StoredVersion,
    then: ExpertPool,
    trust_radius: float,
    start: Mapping[int, Float32Array] | None = None,
) -> Content:
    """`start`, or the anchors, after the changes."""
    before, scope = start or then.keys, stored.row.scope
    keys = dict(before)
    for change in stored.changes:
        for layer, rows in change.items():
            _apply(name, keys, before, then, layer, rows)
    _check_usage(name, stored.usage, then)
    visible = then.visible(scope)
    if checksum_of(keys, stored.usage, visible) != stored.row.checksum:
        raise StoreCorrupted(f"{name}: keys and usage do not match their checksum {stored.row.checksum}")
    for layer in stored.usage:
        try:
            check_bounds(then.keys[layer], keys[layer], then.radius(scope, layer, trust_radius))
        except OutOfBounds as error:
            raise OutOfBounds(
                f"{name} layer {layer}: {error}; reset or roll back the scope, or restore the radius"
            ) from error
    return Content(keys, stored.usage, visible)


def _apply(
    name: str,
    keys: dict[int, Float32Array],
    before: Mapping[int, Float32Array],
    then: ExpertPool,
    layer: int,
    change: RowChanges,
) -> None:
    if layer not in then.plastic_layers:
        raise StoreCorrupted(
            f"{name}: layer {layer} is stored but not plastic; plastic are {list(then.plastic_layers)}"
        )
    num_experts, dim = keys[layer].shape
    if change.rows.shape[1] != dim or (len(change.expert_ids) and change.expert_ids[-1] >= num_experts):
        raise StoreCorrupted(f"{name}: rows of layer {layer} do not fit its {num_experts} keys of {dim}")
    if keys[layer] is before[layer]:
        keys[layer] = keys[layer].copy()
    keys[layer][change.expert_ids] = change.rows


def _check_usage(name: str, usage: Mapping[int, Float32Array], then: ExpertPool) -> None:
    if sorted(usage) != sorted(then.plastic_layers):
        raise StoreCorrupted(
            f"{name}: usage of layers {sorted(usage)}; plastic are {list(then.plastic_layers)}"
        )
    for layer, values in usage.items():
        if len(values) != len(then.keys[layer]) or not np.isfinite(values).all():
            raise StoreCorrupted(f"{name}: usage of layer {layer} has the wrong length or is not finite")
