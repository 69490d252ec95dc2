"""One version of one scope as one safetensors file: written whole, and believed only after every check.

The file holds the keys of every layer (`layers.N.keys`, float32 (M, D)) and the usage of the plastic ones
(`layers.N.usage`, float32 (M,)); what they are is in its metadata. Knows no store and no commits.
"""

import json
import os
import tempfile
from collections.abc import Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save_file

from keystore.errors import InvalidConfig, InvalidSnapshot, ModelMismatch, OutOfBounds, SnapshotExists
from keystore.generations import Content, Generations, same_bits
from keystore.gravity import check_bounds
from keystore.pool import ExpertPool
from keystore.records import GravityConfig, ScopeId
from keystore.replay import drift_of
from keystore.snapshot import KeySnapshot, checksum_of
from keystore.tensor_file import open_tensors

FORMAT = "libration-keys-1"
LARGEST_COUNT = 10**15


def write_version(path: Path, snapshot: KeySnapshot, pool: ExpertPool, gravity: GravityConfig) -> None:
    """Write `snapshot`, of the generation `pool`, to `path`: there completely and durably, readable by its owner
    only, or not at all.

    Raises SnapshotExists; a full disk or a missing folder pass through as OSError.
    """
    tensors = {f"layers.{layer}.keys": keys for layer, keys in snapshot.keys.items()}
    tensors |= {f"layers.{layer}.usage": usage for layer, usage in snapshot.usage.items()}
    descriptor, name = tempfile.mkstemp(prefix=f".{path.name}.", suffix=".partial", dir=path.parent)
    os.close(descriptor)
    partial = Path(name)
    try:
        save_file(tensors, partial, _metadata_of(snapshot, pool, gravity))
        partial.chmod(0o600)  # learned keys derive from prompts
        _sync(partial)
        os.link(partial, path)  # unlike a rename it never replaces what is there
        _sync(path.parent)
    except FileExistsError as error:
        raise SnapshotExists(f"{path.name} exists already; allowed: a name that is free") from error
    finally:
        partial.unlink()


def read_version(path: Path, scope: ScopeId, generations: Generations, gravity: GravityConfig) -> KeySnapshot:
    """What `write_version` wrote, bit for bit, held against the anchors of its generation of the expert pool and
    lifted to the current one as `scope` sees it; the reason is the anchors'.

    Raises ModelMismatch for keys of other weights or another pool; InvalidSnapshot, naming file and tensor, for
    whatever contradicts itself, for keys past the trust radius, moved keys of a layer that is not plastic here or
    of a hidden expert, and usage that is negative or measured otherwise. FileNotFoundError passes through.
    """
    now = generations.now
    origin = now.origin_of(scope)
    with open_tensors(path) as file:
        _check_format(path.name, file.metadata, gravity)
        _check_same(path.name, file.metadata, {"model_id": origin.model_id})
        then = generations.pool_of(_count(path.name, file.metadata, "generation", missing="0"))
        _check_same(path.name, file.metadata, {"pool": then.digest, "anchors": checksum_of(then.keys, {})})
        usage_shapes = {f"layers.{n}.usage": then.keys[n].shape[:1] for n in then.plastic_layers}
        tensors = file.read({f"layers.{n}.keys": keys.shape for n, keys in then.keys.items()} | usage_shapes)
    written_by = _scope(path.name, file.metadata)
    content = Content(
        keys={layer: tensors[f"layers.{layer}.keys"] for layer in then.keys},
        usage={layer: tensors[f"layers.{layer}.usage"] for layer in then.plastic_layers},
        visible=then.visible(written_by),
    )
    checksum = file.metadata.get("checksum", "")
    if checksum_of(content.keys, content.usage, content.visible) != checksum:
        raise InvalidSnapshot(f"{path.name}: its tensors do not match its checksum {checksum[:64]!r}")
    lifted = now.lift(_checked(path.name, content, then, written_by, gravity.trust_radius), then, scope)
    described = replace(
        origin,
        version=_count(path.name, file.metadata, "version"),
        tokens=_count(path.name, file.metadata, "tokens"),
    )
    return now.adopt(described, lifted, base=origin)


def _metadata_of(snapshot: KeySnapshot, pool: ExpertPool, gravity: GravityConfig) -> dict[str, str]:
    drift_max, drift_mean = drift_of(snapshot, pool, gravity.trust_radius)
    return {
        "format": FORMAT,
        "model_id": snapshot.model_id,
        "anchors": checksum_of(pool.keys, {}),
        "generation": str(pool.generation),
        "pool": pool.digest,
        "scope": str(snapshot.scope),
        "version": str(snapshot.version),
        "parent": str(snapshot.parent or 0),
        "reason": snapshot.reason,
        "created_at": str(snapshot.created_at),
        "tokens": str(snapshot.tokens),
        "drift_max": str(drift_max),
        "drift_mean": str(drift_mean),
        "gravity": json.dumps(asdict(gravity)),
        "checksum": snapshot.checksum,
    }


def _check_format(name: str, metadata: Mapping[str, str], gravity: GravityConfig) -> None:
    if metadata.get("format") != FORMAT:
        raise InvalidSnapshot(
            f"{name} has format {metadata.get('format', 'unknown')[:40]!r}; allowed: {FORMAT!r}"
        )
    inertia = _inertia(metadata.get("gravity", ""))
    if inertia is None or (inertia == "count") != (gravity.inertia == "count"):
        raise InvalidSnapshot(f"{name}: usage measured with inertia {inertia!r}; here: {gravity.inertia!r}")


def _check_same(name: str, metadata: Mapping[str, str], ours: Mapping[str, str]) -> None:
    for what, allowed in ours.items():
        given = metadata.get(what, "")[:64]
        if given != allowed:
            raise ModelMismatch(f"{name} holds keys of {what} {given!r}; allowed: {allowed!r}")


def _inertia(gravity: str) -> str | None:
    try:
        constants: Any = json.loads(gravity)  # Any: JSON
    except (ValueError, RecursionError):
        return None
    return str(constants.get("inertia"))[:20] if isinstance(constants, dict) else None


def _scope(name: str, metadata: Mapping[str, str]) -> ScopeId:
    try:
        return ScopeId.parse(metadata.get("scope", ""))
    except InvalidConfig as error:
        raise InvalidSnapshot(f"{name}: {error}") from error


def _count(name: str, metadata: Mapping[str, str], field: str, missing: str = "") -> int:
    text = metadata.get(field, missing)
    if not (text.isascii() and text.isdigit() and len(text) <= len(str(LARGEST_COUNT))):
        raise InvalidSnapshot(f"{name}: {field} is {text[:40]!r}; allowed: 0 to {LARGEST_COUNT}")
    return int(text)


def _checked(name: str, content: Content, then: ExpertPool, scope: ScopeId, trust_radius: float) -> Content:
    """`content`, with the memory of the anchors where nothing may move."""
    keys = dict(content.keys)
    for layer in keys:
        tensor = f"{name}: tensor layers.{layer}"
        if layer not in then.plastic_layers:
            if not same_bits(keys[layer], then.keys[layer]):
                raise InvalidSnapshot(f"{tensor}.keys has moved, and the layer is not plastic here")
            keys[layer] = then.keys[layer]
            continue
        usage, shown = content.usage[layer], content.visible.get(layer)
        hidden = np.empty(0, np.int64) if shown is None else np.setdiff1d(np.arange(len(usage)), shown)
        if not same_bits(keys[layer][hidden], then.keys[layer][hidden]):
            raise InvalidSnapshot(f"{tensor}.keys has moved keys of experts that are hidden from {scope}")
        if not (np.isfinite(usage).all() and (usage >= 0).all()):
            raise InvalidSnapshot(f"{tensor}.usage holds values that are negative or not finite")
        try:
            check_bounds(then.keys[layer], keys[layer], then.radius(scope, layer, trust_radius))
        except OutOfBounds as error:
            raise InvalidSnapshot(f"{tensor}.keys: {error}") from error
    return replace(content, keys=keys)


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
