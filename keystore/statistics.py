"""What windows of tokens leave behind: traces of routing, and sums of them that merge in any order.

Knows nothing about keys, versions or storage.
"""

# T tokens, K experts per token, C credit candidates, S settling experts, M experts of a layer, D key dimensions

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType

import numpy as np

from keystore.errors import InvalidStatistics, NonFiniteStatistics
from keystore.records import Float32Array, Float64Array, Int64Array, ScopeId

TOKENS_PER_CHUNK = 1024  # bounds the float64 scratch of from_tokens to 1024 * C * D * 8 bytes
DENSE_EXPERTS_A_CANDIDATE = (
    16  # up to this many experts a candidate, a product with zeros is faster than sorting
)


@dataclass(frozen=True, slots=True, eq=False)
class TokenTrace:
    """One layer's routing of T tokens: the K experts that each selected, and the C that earn credit for it.

    The literal rule has no credit: every selection weighs 1.
    """

    expert_ids: Int64Array  # (T, K), selected
    queries: Float32Array  # (T, D), scaled to the anchors' norm by the caller for the credit rules
    num_experts: int
    credit: "TokenCredit | None" = None  # None: the literal rule
    utility: "TokenUtility | None" = None  # of experts that are looking for their address


@dataclass(frozen=True, slots=True, eq=False)
class TokenCredit:
    """What some experts, selected or not, would have been worth to T tokens."""

    expert_ids: Int64Array  # (T, C)
    weights: Float32Array  # (T, C)


@dataclass(frozen=True, slots=True, eq=False)
class TokenUtility:
    """How much mixing each settling expert in would have lowered the loss of T tokens, in nats per unit of gate."""

    expert_ids: Int64Array  # (S,), rising
    values: Float32Array  # (T, S)


@dataclass(frozen=True, slots=True, eq=False)
class UtilityStats:
    """Sums for the regression of utilities on queries (keystore.settling)."""

    expert_ids: Int64Array  # (S,)
    moments: Float64Array  # (D, D), sum_t q_t q_t^T
    weighted_queries: Float64Array  # (S, D), sum_t u_ti q_t

    @classmethod
    def from_tokens(cls, queries: Float32Array, utility: TokenUtility) -> "UtilityStats":
        """Queries (T, D) as they are, not scaled to the anchors' norm."""
        wide = queries.astype(np.float64)
        return cls(utility.expert_ids, wide.T @ wide, utility.values.astype(np.float64).T @ wide)

    @property
    def is_finite(self) -> bool:
        return bool(np.isfinite(self.moments).all() and np.isfinite(self.weighted_queries).all())

    def merge(self, other: "UtilityStats") -> "UtilityStats":
        """Raises InvalidStatistics when the other is about other experts."""
        if not np.array_equal(self.expert_ids, other.expert_ids):
            raise InvalidStatistics("cannot merge utilities of different experts")
        return UtilityStats(
            self.expert_ids, self.moments + other.moments, self.weighted_queries + other.weighted_queries
        )


@dataclass(frozen=True, slots=True, eq=False)
class LayerStats:
    """Sufficient statistics of one layer and window: sums, so they merge by addition in any order.

    Sums are kept in float64: a float32 query times a float32 weight is exact there, so that the order of
    addition disappears when the keys are rounded to float32.
    """

    events: Int64Array  # n (M,), tokens that selected expert i
    credited: Int64Array  # (M,), tokens that gave expert i a weight; `events` under the literal rule
    weighted_queries: Float64Array  # S (M, D), sum_t w_ti q_t
    weights: Float64Array  # W (M,), sum_t w_ti
    coactivation: Int64Array | None  # C (M, M) with a zero diagonal; None when bonding is off
    utility: UtilityStats | None = None  # None when no expert of the scope is settling

    @classmethod
    def from_tokens(cls, trace: TokenTrace, *, coactivation: bool = False) -> "LayerStats":
        """Sums of one trace. Raises InvalidStatistics, NonFiniteStatistics."""
        _check_trace(trace)
        experts = trace.num_experts
        ids = trace.expert_ids if trace.credit is None else trace.credit.expert_ids
        weights = None if trace.credit is None else trace.credit.weights
        sums = np.zeros((experts, trace.queries.shape[1]))
        with np.errstate(invalid="ignore", over="ignore"):  # infinity times zero is reported below
            utility = trace.utility and UtilityStats.from_tokens(trace.queries, trace.utility)
            for first in range(0, len(trace.queries), TOKENS_PER_CHUNK):
                rows = slice(first, first + TOKENS_PER_CHUNK)
                chunk = None if weights is None else weights[rows]
                sums += _weighted_queries(ids[rows], trace.queries[rows], chunk, experts)
        flat_weights = None if weights is None else weights.ravel()
        weight_sums = np.bincount(ids.ravel(), weights=flat_weights, minlength=experts).astype(np.float64)
        finite = np.isfinite(sums).all() and np.isfinite(weight_sums).all()
        if not finite or (utility is not None and not utility.is_finite):
            raise NonFiniteStatistics(
                "queries or weights hold NaN or infinity; allowed: finite float32 values"
            )
        return cls(
            events=_count(trace.expert_ids, experts),
            credited=_count(ids, experts),
            weighted_queries=sums,
            weights=weight_sums,
            coactivation=_count_pairs(trace) if coactivation else None,
            utility=utility,
        )

    def merge(self, other: "LayerStats") -> "LayerStats":
        """Sum of two disjoint sets of tokens. Raises InvalidStatistics when the shapes differ."""
        mine, theirs = self.coactivation, other.coactivation
        same = (mine is None) == (theirs is None) and (self.utility is None) == (other.utility is None)
        if self.weighted_queries.shape != other.weighted_queries.shape or not same:
            raise InvalidStatistics("cannot merge layer statistics of different shape, bonding or settling")
        return LayerStats(
            self.events + other.events,
            self.credited + other.credited,
            self.weighted_queries + other.weighted_queries,
            self.weights + other.weights,
            None if mine is None or theirs is None else mine + theirs,
            None if self.utility is None or other.utility is None else self.utility.merge(other.utility),
        )


@dataclass(frozen=True, slots=True, eq=False)
class RoutingStats:
    """What one window of tokens taught one scope, layer by layer."""

    scope: ScopeId
    tokens: int
    layers: Mapping[int, LayerStats]

    @property
    def is_finite(self) -> bool:
        """Whether every weighted sum is a number; `from_tokens` makes no other."""
        return all(
            bool(np.isfinite(sums.weighted_queries).all())
            and (sums.utility is None or sums.utility.is_finite)
            for sums in self.layers.values()
        )

    @classmethod
    def from_tokens(
        cls, scope: ScopeId, traces: Mapping[int, TokenTrace], *, coactivation: bool = False
    ) -> "RoutingStats":
        """Statistics of the same T tokens in several layers.

        Raises InvalidStatistics, NonFiniteStatistics.
        """
        lengths = {len(trace.queries) for trace in traces.values()}
        if len(lengths) > 1:
            raise InvalidStatistics(
                f"layers saw {sorted(lengths)} tokens; allowed: the same tokens in every layer"
            )
        layers = {
            layer: LayerStats.from_tokens(trace, coactivation=coactivation) for layer, trace in traces.items()
        }
        return cls(scope, lengths.pop() if lengths else 0, MappingProxyType(layers))

    def merge(self, other: "RoutingStats") -> "RoutingStats":
        """Statistics of both sets of tokens. Raises InvalidStatistics for another scope or other layers."""
        if self.scope != other.scope or self.layers.keys() != other.layers.keys():
            raise InvalidStatistics(
                f"cannot merge statistics of {self.scope} and {other.scope} or of other layers"
            )
        layers = {layer: mine.merge(other.layers[layer]) for layer, mine in self.layers.items()}
        return RoutingStats(self.scope, self.tokens + other.tokens, MappingProxyType(layers))


def _check_trace(trace: TokenTrace) -> None:
    ids, queries, credit = trace.expert_ids, trace.queries, trace.credit
    if ids.ndim != 2 or queries.ndim != 2 or len(ids) != len(queries):
        raise InvalidStatistics(
            f"expert_ids {ids.shape} and queries {queries.shape}; allowed: (T, K) and (T, D)"
        )
    _check_ids(ids, trace.num_experts)
    if trace.utility is not None:
        _check_ids(trace.utility.expert_ids, trace.num_experts)
        if trace.utility.values.shape != (len(queries), len(trace.utility.expert_ids)):
            raise InvalidStatistics(f"utilities {trace.utility.values.shape}; allowed: (T, S)")
    if credit is None:
        return
    if credit.weights.shape != credit.expert_ids.shape or len(credit.weights) != len(queries):
        raise InvalidStatistics(
            f"weights {credit.weights.shape} of experts {credit.expert_ids.shape}; allowed: (T, C) for both"
        )
    _check_ids(credit.expert_ids, trace.num_experts)


def _check_ids(ids: Int64Array, num_experts: int) -> None:
    if ids.size and not (ids.min() >= 0 and ids.max() < num_experts):
        raise InvalidStatistics(f"expert ids {ids.min()}..{ids.max()}; allowed: 0..{num_experts - 1}")


def _count(ids: Int64Array, num_experts: int) -> Int64Array:
    return np.bincount(ids.ravel(), minlength=num_experts).astype(np.int64)


def _weighted_queries(
    ids: Int64Array, queries: Float32Array, weights: Float32Array | None, num_experts: int
) -> Float64Array:
    """sum_t w_ti q_t (M, D): as a product where most experts have a weight, else grouped by expert."""
    sums = np.zeros((num_experts, queries.shape[1]))
    if not ids.size:
        return sums
    if num_experts <= DENSE_EXPERTS_A_CANDIDATE * ids.shape[1]:
        places = (np.arange(len(ids))[:, None] * num_experts + ids).ravel()
        flat = None if weights is None else weights.ravel()
        dense = np.bincount(places, weights=flat, minlength=len(ids) * num_experts)
        return dense.reshape(len(ids), num_experts).T.astype(np.float64) @ queries.astype(np.float64)
    order = np.argsort(ids, axis=None, kind="stable")
    sorted_ids = ids.ravel()[order]
    events = queries.astype(np.float64)[order // ids.shape[1]]  # (T*C, D)
    if weights is not None:
        events *= weights.ravel()[order, None]
    starts = np.flatnonzero(np.diff(sorted_ids, prepend=-1))
    sums[sorted_ids[starts]] = np.add.reduceat(events, starts, axis=0)
    return sums


def _count_pairs(trace: TokenTrace) -> Int64Array:
    ids, experts = trace.expert_ids, trace.num_experts
    pairs = (ids[:, :, None] * experts + ids[:, None, :]).ravel()  # (T*K*K,)
    counts = np.bincount(pairs, minlength=experts * experts).reshape(experts, experts).astype(np.int64)
    np.fill_diagonal(counts, 0)
    return counts
