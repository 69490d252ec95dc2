"""Binary layout of stored rows, usage and settling states. Little-endian, every size checked on the way in.

keys      "LKD1" | u32 layers | per layer: i32 layer, u32 rows R, u32 dim D | i64 ids[R] | f32 rows[R * D]
usage     "LKU1" | u32 layers | per layer: i32 layer, u32 experts M | f32 usage[M]
settling  "LKS2" | sha256 of the rest | u32 layers | per layer: i32 layer, u32 experts S, u32 dim D
          | i64 ids[S] | f64 tokens[S] | f64 moments[D * D] | f64 utilities[S * D]
"""

import hashlib
import struct
from collections.abc import Mapping
from typing import Any

import numpy as np

from keystore.backends.audit import canonical_json
from keystore.backends.base import PoolEvent, RowChanges
from keystore.records import Float32Array, Int64Array
from keystore.settling import SettlingState

_KEYS_MAGIC, _USAGE_MAGIC, _SETTLING_MAGIC = b"LKD1", b"LKU1", b"LKS2"
_COUNT, _KEYS_HEADER, _USAGE_HEADER = struct.Struct("<I"), struct.Struct("<iII"), struct.Struct("<iI")


def pack_changes(changes: Mapping[int, RowChanges]) -> bytes:
    """Bytes of changed rows, layers in order."""
    parts = [_KEYS_MAGIC, _COUNT.pack(len(changes))]
    for layer in sorted(changes):
        change = changes[layer]
        parts.append(_KEYS_HEADER.pack(layer, *change.rows.shape))
        parts.append(change.expert_ids.astype("<i8").tobytes())
        parts.append(change.rows.astype("<f4").tobytes())
    return b"".join(parts)


def unpack_changes(blob: bytes) -> Mapping[int, RowChanges]:
    """Inverse of pack_changes. Raises ValueError on a wrong magic, size or order of ids."""
    reader = Reader(blob, _KEYS_MAGIC)
    changes: dict[int, RowChanges] = {}
    for _ in range(reader.unpack(_COUNT)[0]):
        layer, rows, dim = reader.unpack(_KEYS_HEADER)
        ids = reader.rising_ids(rows)
        values = np.frombuffer(reader.take(4 * rows * dim), "<f4").astype(np.float32)
        changes[layer] = RowChanges(ids, values.reshape(rows, dim))
    reader.finish()
    return changes


def pack_usage(usage: Mapping[int, Float32Array]) -> bytes:
    """Bytes of usage vectors, layers in order."""
    parts = [_USAGE_MAGIC, _COUNT.pack(len(usage))]
    for layer in sorted(usage):
        parts.append(_USAGE_HEADER.pack(layer, len(usage[layer])))
        parts.append(usage[layer].astype("<f4").tobytes())
    return b"".join(parts)


def unpack_usage(blob: bytes) -> Mapping[int, Float32Array]:
    """Inverse of pack_usage. Raises ValueError on a wrong magic or size."""
    reader = Reader(blob, _USAGE_MAGIC)
    usage: dict[int, Float32Array] = {}
    for _ in range(reader.unpack(_COUNT)[0]):
        layer, experts = reader.unpack(_USAGE_HEADER)
        usage[layer] = np.frombuffer(reader.take(4 * experts), "<f4").astype(np.float32)
    reader.finish()
    return usage


def pack_settling(settling: Mapping[int, SettlingState]) -> bytes:
    """Bytes of settling states, layers in order, with a checksum."""
    parts = [_COUNT.pack(len(settling))]
    for layer in sorted(settling):
        state = settling[layer]
        parts.append(_KEYS_HEADER.pack(layer, *state.utilities.shape))
        parts.append(state.expert_ids.astype("<i8").tobytes())
        parts.append(state.tokens.astype("<f8").tobytes())
        parts.append(state.moments.astype("<f8").tobytes())
        parts.append(state.utilities.astype("<f8").tobytes())
    body = b"".join(parts)
    return _SETTLING_MAGIC + hashlib.sha256(body).digest() + body


def unpack_settling(blob: bytes) -> Mapping[int, SettlingState]:
    """Inverse of pack_settling. Raises ValueError on a wrong magic, checksum, size or order of ids."""
    reader = Reader(blob, _SETTLING_MAGIC)
    if reader.take(hashlib.sha256().digest_size) != hashlib.sha256(blob[reader.at :]).digest():
        raise ValueError("the settling state does not match its checksum")
    states: dict[int, SettlingState] = {}
    for _ in range(reader.unpack(_COUNT)[0]):
        layer, experts, dim = reader.unpack(_KEYS_HEADER)
        ids = np.frombuffer(reader.take(8 * experts), "<i8").astype(np.int64)
        tokens = np.frombuffer(reader.take(8 * experts), "<f8").astype(np.float64)
        moments = np.frombuffer(reader.take(8 * dim * dim), "<f8").astype(np.float64)
        utilities = np.frombuffer(reader.take(8 * experts * dim), "<f8").astype(np.float64)
        shaped = moments.reshape(dim, dim), utilities.reshape(experts, dim)
        states[layer] = SettlingState(ids, *shaped, tokens)
    reader.finish()
    return states


def event_checksum(event: PoolEvent) -> str:
    """sha256 hex over everything that a pool event says."""
    words = {
        "generation": event.generation,
        "kind": event.kind,
        "name": event.name,
        "scope": str(event.scope),
        "digest": event.digest,
        "at": event.at,
    }
    return hashlib.sha256(canonical_json(words).encode("ascii") + pack_changes(event.rows)).hexdigest()


class Reader:
    """A cursor over bytes that never reads past their end."""

    def __init__(self, blob: bytes, magic: bytes) -> None:
        self._blob, self.at = blob, 0
        found = self.take(len(magic))
        if found != magic:
            raise ValueError(f"blob starts with {found!r}; allowed: {magic!r}")

    def take(self, size_bytes: int) -> bytes:
        end = self.at + size_bytes
        if end > len(self._blob):
            raise ValueError(f"blob of {len(self._blob)} bytes ends before byte {end}")
        part, self.at = self._blob[self.at : end], end
        return part

    def unpack(self, layout: struct.Struct) -> tuple[Any, ...]:  # Any: as the layout says
        return layout.unpack(self.take(layout.size))

    def rising_ids(self, count: int) -> Int64Array:
        """The next expert ids, none twice. Raises ValueError."""
        ids = np.frombuffer(self.take(8 * count), "<i8").astype(np.int64)
        # Compared, not subtracted: differences of hostile ids wrap around.
        if count and (ids[0] < 0 or (ids[1:] <= ids[:-1]).any()):
            raise ValueError("expert ids are not rising from 0")
        return ids

    def finish(self) -> None:
        if self.at != len(self._blob):
            raise ValueError(f"blob of {len(self._blob)} bytes has {len(self._blob) - self.at} left over")
