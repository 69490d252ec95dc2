"""Binary layout of stored rows and usage. Little-endian, every size checked on the way in.

keys   "LKD1" | u32 layers | per layer: i32 layer, u32 rows R, u32 dim D | i64 ids[R] | f32 rows[R * D]
usage  "LKU1" | u32 layers | per layer: i32 layer, u32 experts M | f32 usage[M]
"""

import struct
from collections.abc import Mapping

import numpy as np

from keystore.backends.base import RowChanges
from keystore.records import Float32Array

_KEYS_MAGIC, _USAGE_MAGIC = b"LKD1", b"LKU1"
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
    reader = _Reader(blob, _KEYS_MAGIC)
    changes: dict[int, RowChanges] = {}
    for _ in range(reader.unpack(_COUNT)[0]):
        layer, rows, dim = reader.unpack(_KEYS_HEADER)
        ids = np.frombuffer(reader.take(8 * rows), "<i8").astype(np.int64)
        if rows and (ids[0] < 0 or (np.diff(ids) <= 0).any()):
            raise ValueError(f"expert ids of layer {layer} are not rising from 0")
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
    reader = _Reader(blob, _USAGE_MAGIC)
    usage: dict[int, Float32Array] = {}
    for _ in range(reader.unpack(_COUNT)[0]):
        layer, experts = reader.unpack(_USAGE_HEADER)
        usage[layer] = np.frombuffer(reader.take(4 * experts), "<f4").astype(np.float32)
    reader.finish()
    return usage


class _Reader:
    """A cursor over bytes that never reads past their end."""

    def __init__(self, blob: bytes, magic: bytes) -> None:
        self._blob, self._at = blob, 0
        found = self.take(len(magic))
        if found != magic:
            raise ValueError(f"blob starts with {found!r}; allowed: {magic!r}")

    def take(self, size_bytes: int) -> bytes:
        end = self._at + size_bytes
        if end > len(self._blob):
            raise ValueError(f"blob of {len(self._blob)} bytes ends before byte {end}")
        part, self._at = self._blob[self._at : end], end
        return part

    def unpack(self, layout: struct.Struct) -> tuple[int, ...]:
        return layout.unpack(self.take(layout.size))

    def finish(self) -> None:
        if self._at != len(self._blob):
            raise ValueError(f"blob of {len(self._blob)} bytes has {len(self._blob) - self._at} left over")
