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

from keystore.errors import InvalidSnapshot, ModelMismatch, OutOfBounds, SnapshotExists
from keystore.gravity import check_bounds
from keystore.projection import drift_of_layers
from keystore.records import Float32Array, GravityConfig
from keystore.snapshot import KeySnapshot, build_indexes, checksum_of, read_only
from keystore.tensor_file import open_tensors

FORMAT = "libration-keys-1"
LARGEST_COUNT = 10**15


def write_version(path: Path, snapshot: KeySnapshot, origin: KeySnapshot, gravity: GravityConfig) -> None:
    """Write `snapshot` to `path`: there completely and durably, readable by its owner only, or not at all.

    Raises SnapshotExists; a full disk or a missing folder pass through as OSError.
    """
    tensors = {f"layers.{layer}.keys": keys for layer, keys in snapshot.keys.items()}
    tensors |= {f"layers.{layer}.usage": usage for layer, usage in snapshot.usage.items()}
    descriptor, name = tempfile.mkstemp(prefix=f".{path.name}.", suffix=".partial", dir=path.parent)
    os.close(descriptor)
    partial = Path(name)
    try:
        save_file(tensors, partial, _metadata_of(snapshot, origin, gravity))
        partial.chmod(0o600)  # learned keys derive from prompts
        _sync(partial)
        os.link(partial, path)  # unlike a rename it never replaces what is there
        _sync(path.parent)
    except FileExistsError as error:
        raise SnapshotExists(f"{path.name} exists already; allowed: a name that is free") from error
    finally:
        partial.unlink()


def read_version(path: Path, origin: KeySnapshot, gravity: GravityConfig) -> KeySnapshot:
    """What `write_version` wrote, bit for bit, held against the anchors of `origin`; scope and reason are the
    origin's.

    Raises ModelMismatch for keys of other weights; InvalidSnapshot, naming file and tensor, for whatever
    contradicts itself, for keys past the trust radius, moved keys of a layer that is not plastic here, and
    usage that is negative or measured otherwise. FileNotFoundError passes through.
    """
    shapes = {f"layers.{layer}.keys": keys.shape for layer, keys in origin.keys.items()}
    shapes |= {f"layers.{layer}.usage": usage.shape for layer, usage in origin.usage.items()}
    with open_tensors(path) as file:
        _check_origin(path.name, file.metadata, origin, gravity)
        tensors = file.read(shapes)
    keys = {layer: tensors[f"layers.{layer}.keys"] for layer in origin.keys}
    usage = {layer: tensors[f"layers.{layer}.usage"] for layer in origin.usage}
    checksum = file.metadata.get("checksum", "")
    if checksum_of(keys, usage) != checksum:
        raise InvalidSnapshot(f"{path.name}: its tensors do not match its checksum {checksum[:64]!r}")
    for layer in origin.keys.keys() - usage.keys():
        if not np.array_equal(keys[layer].view(np.uint32), origin.keys_of(layer).view(np.uint32)):
            raise InvalidSnapshot(
                f"{path.name}: tensor layers.{layer}.keys has moved, and the layer is not plastic here"
            )
        keys[layer] = origin.keys_of(layer)
    for layer in usage:
        name = f"{path.name}: tensor layers.{layer}"
        _check_layer(name, origin.keys_of(layer), keys[layer], usage[layer], gravity.trust_radius)
    return replace(
        origin,
        version=_count(path.name, file.metadata, "version"),
        tokens=_count(path.name, file.metadata, "tokens"),
        indexes=build_indexes(keys, origin.indexes),
        usage=read_only(usage),
        checksum=checksum,
    )


def _metadata_of(snapshot: KeySnapshot, origin: KeySnapshot, gravity: GravityConfig) -> dict[str, str]:
    plastic = {layer: snapshot.keys_of(layer) for layer in snapshot.usage}
    drift_max, drift_mean = drift_of_layers(origin.keys, plastic, gravity.trust_radius)
    return {
        "format": FORMAT,
        "model_id": snapshot.model_id,
        "anchors": checksum_of(origin.keys, {}),
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


def _check_origin(
    name: str, metadata: Mapping[str, str], origin: KeySnapshot, gravity: GravityConfig
) -> None:
    if metadata.get("format") != FORMAT:
        raise InvalidSnapshot(
            f"{name} has format {metadata.get('format', 'unknown')[:40]!r}; allowed: {FORMAT!r}"
        )
    ours = {"model_id": origin.model_id, "anchors": checksum_of(origin.keys, {})}
    for what, allowed in ours.items():
        given = metadata.get(what, "")[:64]
        if given != allowed:
            raise ModelMismatch(f"{name} holds keys of {what} {given!r}; allowed: {allowed!r}")
    inertia = _inertia(metadata.get("gravity", ""))
    if inertia is None or (inertia == "count") != (gravity.inertia == "count"):
        raise InvalidSnapshot(f"{name}: usage measured with inertia {inertia!r}; here: {gravity.inertia!r}")


def _inertia(gravity: str) -> str | None:
    try:
        constants: Any = json.loads(gravity)  # Any: JSON
    except (ValueError, RecursionError):
        return None
    return str(constants.get("inertia"))[:20] if isinstance(constants, dict) else None


def _count(name: str, metadata: Mapping[str, str], field: str) -> int:
    text = metadata.get(field, "")
    if not (text.isascii() and text.isdigit() and len(text) <= len(str(LARGEST_COUNT))):
        raise InvalidSnapshot(f"{name}: {field} is {text[:40]!r}; allowed: 0 to {LARGEST_COUNT}")
    return int(text)


def _check_layer(
    name: str, anchors: Float32Array, keys: Float32Array, usage: Float32Array, trust_radius: float
) -> None:
    if not (np.isfinite(usage).all() and (usage >= 0).all()):
        raise InvalidSnapshot(f"{name}.usage holds values that are negative or not finite")
    try:
        check_bounds(anchors, keys, trust_radius)
    except OutOfBounds as error:
        raise InvalidSnapshot(f"{name}.keys: {error}") from error


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
