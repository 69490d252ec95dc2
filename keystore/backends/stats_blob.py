"""Binary layout of one producer's window of statistics. Little-endian, every size checked on the way in.

"LRS1" | producer uuid[16] | u64 sequence | u32 bytes of the scope | scope | u64 tokens | u32 layers | per layer:
  i32 layer, u32 experts M, u32 rows R, u32 dim D, u8 flags | i64 ids[R] | i64 events[R] | i64 credited[R]
  | f64 weights[R] | f64 weighted_queries[R * D] | flag 1: i64 coactivation[R * R]
  | flag 2: u32 S, i64 ids[S], f64 moments[D * D], f64 weighted_queries[S * D]

Rows are the experts that the window has anything about, so that a window costs what it touched.
"""

import struct
from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import TypeVar
from uuid import UUID

import numpy as np
from numpy.typing import NDArray

from keystore.backends.blobs import Reader
from keystore.errors import KeyStoreError
from keystore.records import Float64Array, Int64Array, ScopeId
from keystore.statistics import LayerStats, RoutingStats, UtilityStats

_MAGIC = b"LRS1"
_HEAD, _SCOPE, _TOKENS = struct.Struct("<16sQ"), struct.Struct("<I"), struct.Struct("<QI")
_LAYER, _COUNT = struct.Struct("<iIIIB"), struct.Struct("<I")
_HAS_COACTIVATION, _HAS_UTILITY = 1, 2
MAX_COUNT = 2**40  # of tokens or events: sums of many windows stay far from overflow

_Number = TypeVar("_Number", np.int64, np.float64)
Shapes = Mapping[int, tuple[int, int]]  # layer to the most experts it may have, and its key dimensions


@dataclass(frozen=True, slots=True, eq=False)
class SentWindow:
    """Statistics with the number that their producer gave them: 1, 2, ... within a shard."""

    producer: UUID
    sequence: int
    stats: RoutingStats


def pack_window(window: SentWindow) -> bytes:
    """Bytes of a window; the same window packs to the same bytes."""
    stats, scope = window.stats, str(window.stats.scope).encode()
    parts = [
        _MAGIC,
        _HEAD.pack(window.producer.bytes, window.sequence),
        _SCOPE.pack(len(scope)) + scope,
        _TOKENS.pack(stats.tokens, len(stats.layers)),
    ]
    for layer in sorted(stats.layers):
        parts += _pack_layer(layer, stats.layers[layer])
    return b"".join(parts)


def unpack_window(blob: bytes, shapes: Shapes, *, bonding: bool) -> SentWindow:
    """Inverse of `pack_window`; with `bonding` every layer has its coactivation, else none has.

    Raises ValueError on anything that does not fit its sizes or `shapes`, and on numbers that are not finite.
    """
    reader = Reader(blob, _MAGIC)
    producer, sequence = reader.unpack(_HEAD)
    try:
        scope = ScopeId.parse(reader.take(reader.unpack(_SCOPE)[0]).decode())
    except KeyStoreError as error:
        raise ValueError(str(error)) from error
    tokens, count = reader.unpack(_TOKENS)
    if scope.kind == "anchor":
        raise ValueError("statistics of the anchors; allowed: those of scopes that learn")
    if not 1 <= sequence < 2**63 or tokens > MAX_COUNT:
        raise ValueError(f"sequence {sequence} of {tokens} tokens; allowed: 1 and more, up to {MAX_COUNT}")
    layers: dict[int, LayerStats] = {}
    for _ in range(count):
        layer, sums = _unpack_layer(reader, shapes, bonding=bonding)
        if layer in layers:
            raise ValueError(f"layer {layer} comes twice")
        layers[layer] = sums
    reader.finish()
    stats = RoutingStats(scope, tokens, MappingProxyType(layers))
    return SentWindow(UUID(bytes=producer), sequence, stats)


def _pack_layer(layer: int, sums: LayerStats) -> list[bytes]:
    rows = np.flatnonzero(
        (sums.events != 0) | (sums.credited != 0) | (sums.weights != 0) | sums.weighted_queries.any(axis=1)
    )
    pairs, utility = sums.coactivation, sums.utility
    flags = _HAS_COACTIVATION * (pairs is not None) | _HAS_UTILITY * (utility is not None)
    experts, dim = sums.weighted_queries.shape
    parts = [
        _LAYER.pack(layer, experts, len(rows), dim, flags),
        _ints(rows),
        _ints(sums.events[rows]),
        _ints(sums.credited[rows]),
        _floats(sums.weights[rows]),
        _floats(sums.weighted_queries[rows]),
    ]
    if pairs is not None:
        parts.append(_ints(pairs[np.ix_(rows, rows)]))
    if utility is not None:
        parts += [_COUNT.pack(len(utility.expert_ids)), _ints(utility.expert_ids)]
        parts += [_floats(utility.moments), _floats(utility.weighted_queries)]
    return parts


def _unpack_layer(reader: Reader, shapes: Shapes, *, bonding: bool) -> tuple[int, LayerStats]:
    layer, experts, rows, dim, flags = reader.unpack(_LAYER)
    most, wanted_dim = shapes.get(layer, (0, 0))
    if experts > most or dim != wanted_dim:
        raise ValueError(
            f"layer {layer} of {experts} experts of {dim}; allowed: up to {most} of {wanted_dim}"
        )
    if flags & ~_HAS_UTILITY != _HAS_COACTIVATION * bonding:
        raise ValueError(f"layer {layer} has flags {flags}; bonding is {'on' if bonding else 'off'}")
    ids = _rising_ids(reader, rows, experts)
    events, credited = _counts(reader, rows), _counts(reader, rows)
    weights = _take_floats(reader, rows)
    sums = LayerStats(
        events=_spread(events, ids, experts),
        credited=_spread(credited, ids, experts),
        weighted_queries=_spread(_take_floats(reader, rows * dim).reshape(rows, dim), ids, experts),
        weights=_spread(weights, ids, experts),
        coactivation=_unpack_pairs(reader, ids, experts) if flags & _HAS_COACTIVATION else None,
        utility=_unpack_utility(reader, experts, dim) if flags & _HAS_UTILITY else None,
    )
    return layer, sums


def _unpack_pairs(reader: Reader, ids: Int64Array, experts: int) -> Int64Array:
    pairs = np.zeros((experts, experts), np.int64)
    pairs[np.ix_(ids, ids)] = _counts(reader, len(ids) ** 2).reshape(len(ids), len(ids))
    return pairs


def _unpack_utility(reader: Reader, experts: int, dim: int) -> UtilityStats:
    settling = reader.unpack(_COUNT)[0]
    ids = _rising_ids(reader, settling, experts)
    moments = _take_floats(reader, dim * dim).reshape(dim, dim)
    return UtilityStats(ids, moments, _take_floats(reader, settling * dim).reshape(settling, dim))


def _rising_ids(reader: Reader, count: int, experts: int) -> Int64Array:
    ids = reader.rising_ids(count)
    if count and ids[-1] >= experts:
        raise ValueError(f"expert ids up to {ids[-1]}; allowed: 0..{experts - 1}")
    return ids


def _counts(reader: Reader, count: int) -> Int64Array:
    counts = np.frombuffer(reader.take(8 * count), "<i8").astype(np.int64)
    if count and not (counts.min() >= 0 and counts.max() <= MAX_COUNT):
        raise ValueError(f"counts {counts.min()}..{counts.max()}; allowed: 0..{MAX_COUNT}")
    return counts


def _take_floats(reader: Reader, count: int) -> Float64Array:
    values = np.frombuffer(reader.take(8 * count), "<f8").astype(np.float64)
    if not np.isfinite(values).all():
        raise ValueError("sums hold NaN or infinity; allowed: finite values")
    return values


def _spread(rows: NDArray[_Number], ids: Int64Array, experts: int) -> NDArray[_Number]:
    spread = np.zeros_like(rows, shape=(experts, *rows.shape[1:]))
    spread[ids] = rows
    return spread


def _ints(values: Int64Array) -> bytes:
    return values.astype("<i8", copy=False).tobytes()


def _floats(values: Float64Array) -> bytes:
    return values.astype("<f8", copy=False).tobytes()
