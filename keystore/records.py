"""What travels through the key store: who learns (ScopeId), how (GravityConfig) and from what (RoutingStats).

Knows nothing about keys, versions or storage.
"""

# T tokens, K experts per token (or credit candidates), M experts of a layer, D key dimensions

import math
import unicodedata
from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Literal, get_args

import numpy as np
from numpy.typing import NDArray

from keystore.errors import InvalidConfig, InvalidStatistics, NonFiniteStatistics

Float32Array = NDArray[np.float32]
Float64Array = NDArray[np.float64]
Int64Array = NDArray[np.int64]

ScopeKind = Literal["anchor", "tenant", "session"]
Rule = Literal["literal", "direct"]
Inertia = Literal["ema", "count", "none"]
DarkEnergy = Literal["decay", "decay_to_zero", "repulsion", "none"]

MAX_NAME_CHARS = 128
TOKENS_PER_CHUNK = 1024  # bounds the float64 scratch of from_tokens to 1024 * K * D * 8 bytes


@dataclass(frozen=True, slots=True, order=True)
class ScopeId:
    """Who the keys learn from: everyone (anchor), one API key (tenant) or one conversation (session).

    `str()` gives "anchor", "tenant:default", "session:default/abc"; `parse` reads it back. Tenant names hold
    no "/". Raises InvalidConfig on a name that is empty, too long, has control characters or space at an
    edge.
    """

    kind: ScopeKind
    tenant: str = ""
    session: str | None = None

    def __post_init__(self) -> None:
        if self.kind not in get_args(ScopeKind):
            raise InvalidConfig("scope kind", self.kind, "anchor, tenant or session")
        if self.kind == "anchor":
            if self.tenant or self.session is not None:
                raise InvalidConfig("anchor scope", (self.tenant, self.session), "no tenant and no session")
            return
        _check_name("tenant", self.tenant)
        if "/" in self.tenant:
            raise InvalidConfig("tenant", self.tenant, "a name without '/'")
        if self.kind == "session":
            _check_name("session", self.session)
        elif self.session is not None:
            raise InvalidConfig("session of a tenant scope", self.session, "None")

    def __str__(self) -> str:
        if self.kind == "anchor":
            return "anchor"
        return f"tenant:{self.tenant}" if self.kind == "tenant" else f"session:{self.tenant}/{self.session}"

    @classmethod
    def parse(cls, text: str) -> "ScopeId":
        """Inverse of `str()`. Raises InvalidConfig."""
        if text == "anchor":
            return cls("anchor")
        kind, _, name = text.partition(":")
        if kind == "tenant":
            return cls("tenant", name)
        tenant, slash, session = name.partition("/")
        if kind == "session" and slash:
            return cls("session", tenant, session)
        raise InvalidConfig("scope", text[:200], "'anchor', 'tenant:NAME' or 'session:TENANT/NAME'")

    @property
    def parent(self) -> "ScopeId | None":
        """The tenant that a session forks from; None for the scopes that start at the anchors."""
        return ScopeId("tenant", self.tenant) if self.kind == "session" else None


def _check_name(what: str, name: str | None) -> None:
    printable = name is not None and not any(
        unicodedata.category(c) in ("Cc", "Cs", "Zl", "Zp") for c in name
    )
    if not name or not printable or len(name) > MAX_NAME_CHARS or name != name.strip():
        shown = name if name is None else name[:MAX_NAME_CHARS]
        allowed = f"1 to {MAX_NAME_CHARS} printable characters without space at the edges"
        raise InvalidConfig(f"{what} name", shown, allowed)


@dataclass(frozen=True, slots=True)
class GravityConfig:
    """Constants of the consolidation law (docs/gravity).

    Raises InvalidConfig on a value outside its range.
    """

    rule: Rule = "direct"
    plasticity_rate: float = 0.1  # alpha, SOME v2 section 5.1
    bonding_rate: float = 0.0  # beta; 0 leaves peers alone. The literal rule wants it below alpha
    usage_threshold: float = 0.1  # theta: an expert below this fraction of a fair share is idle
    decay_rate: float = 0.01  # delta: fraction of the way home that an idle expert goes per T0 tokens
    decay_window_tokens: int = 4096  # T0
    inertia: Inertia = "ema"
    usage_halflife_tokens: int = 4096
    warmup_tokens: int = 8192  # no dark energy before a scope has learned this many tokens
    dark_energy: DarkEnergy = "decay"
    repulsion_rate: float = 0.0  # push per T0 tokens, as a fraction of the anchor's norm
    trust_radius: float = 0.2  # |k - k0| <= trust_radius * |k0|
    window_tokens: int = 256
    credit_clamp: float = 3.0

    def __post_init__(self) -> None:
        for name, allowed in (
            ("rule", get_args(Rule)),
            ("inertia", get_args(Inertia)),
            ("dark_energy", get_args(DarkEnergy)),
        ):
            if getattr(self, name) not in allowed:
                raise InvalidConfig(name, getattr(self, name), " or ".join(allowed))
        for name, low, high in _RANGES:
            value = getattr(self, name)
            if isinstance(value, bool) or not (math.isfinite(value) and low <= value <= high):
                raise InvalidConfig(name, value, f"a number from {low:g} to {high:g}")
        for name in ("decay_window_tokens", "usage_halflife_tokens", "warmup_tokens", "window_tokens"):
            if not isinstance(getattr(self, name), int):
                raise InvalidConfig(name, getattr(self, name), "a whole number of tokens")


_RANGES = (
    ("plasticity_rate", 0.0, 1.0),
    ("bonding_rate", 0.0, 1.0),
    ("usage_threshold", 0.0, 1e6),
    ("decay_rate", 0.0, 1.0),
    ("decay_window_tokens", 1, 1e12),
    ("usage_halflife_tokens", 1, 1e12),
    ("warmup_tokens", 0, 1e15),
    ("repulsion_rate", 0.0, 1.0),
    ("trust_radius", 0.0, 100.0),
    ("window_tokens", 1, 1e9),
    ("credit_clamp", 1e-6, 1e6),
)


@dataclass(frozen=True, slots=True)
class TokenTrace:
    """One layer's routing of T tokens. `weights` None means 1 for every event (the literal rule)."""

    expert_ids: Int64Array  # (T, K)
    queries: Float32Array  # (T, D), scaled to the anchors' norm by the caller for the direct rule
    weights: Float32Array | None  # (T, K)
    num_experts: int


@dataclass(frozen=True, slots=True, eq=False)
class LayerStats:
    """Sufficient statistics of one layer and window: sums, so they merge by addition in any order.

    Sums are kept in float64: a float32 query times a float32 weight is exact there, so that the order of
    addition disappears when the keys are rounded to float32.
    """

    events: Int64Array  # n (M,), number of tokens that selected expert i
    weighted_queries: Float64Array  # S (M, D), sum_t w_ti q_t
    weights: Float64Array  # W (M,), sum_t w_ti
    coactivation: Int64Array | None  # C (M, M) with a zero diagonal; None when bonding is off

    @classmethod
    def from_tokens(cls, trace: TokenTrace, *, coactivation: bool = False) -> "LayerStats":
        """Sums of one trace. Raises InvalidStatistics, NonFiniteStatistics."""
        _check_trace(trace)
        experts = trace.num_experts
        sums = np.zeros((experts, trace.queries.shape[1]))
        with np.errstate(invalid="ignore"):  # infinity times zero is reported below
            for first in range(0, len(trace.queries), TOKENS_PER_CHUNK):
                _add_weighted_queries(sums, trace, slice(first, first + TOKENS_PER_CHUNK))
        flat_ids = trace.expert_ids.ravel()
        flat_weights = None if trace.weights is None else trace.weights.ravel()
        weights = np.bincount(flat_ids, weights=flat_weights, minlength=experts).astype(np.float64)
        if not (np.isfinite(sums).all() and np.isfinite(weights).all()):
            raise NonFiniteStatistics(
                "queries or weights hold NaN or infinity; allowed: finite float32 values"
            )
        events = np.bincount(flat_ids, minlength=experts).astype(np.int64)
        return cls(events, sums, weights, _count_pairs(trace) if coactivation else None)

    def merge(self, other: "LayerStats") -> "LayerStats":
        """Sum of two disjoint sets of tokens. Raises InvalidStatistics when the shapes differ."""
        mine, theirs = self.coactivation, other.coactivation
        if self.weighted_queries.shape != other.weighted_queries.shape or (mine is None) != (theirs is None):
            raise InvalidStatistics("cannot merge layer statistics of different shape or bonding")
        return LayerStats(
            self.events + other.events,
            self.weighted_queries + other.weighted_queries,
            self.weights + other.weights,
            None if mine is None or theirs is None else mine + theirs,
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
        return all(bool(np.isfinite(sums.weighted_queries).all()) for sums in self.layers.values())

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
    ids, queries = trace.expert_ids, trace.queries
    if ids.ndim != 2 or queries.ndim != 2 or len(ids) != len(queries):
        raise InvalidStatistics(
            f"expert_ids {ids.shape} and queries {queries.shape}; allowed: (T, K) and (T, D)"
        )
    if trace.weights is not None and trace.weights.shape != ids.shape:
        raise InvalidStatistics(
            f"weights {trace.weights.shape}; allowed: the shape of expert_ids {ids.shape}"
        )
    if ids.size and not (ids.min() >= 0 and ids.max() < trace.num_experts):
        raise InvalidStatistics(f"expert ids {ids.min()}..{ids.max()}; allowed: 0..{trace.num_experts - 1}")


def _add_weighted_queries(sums: Float64Array, trace: TokenTrace, tokens: slice) -> None:
    ids = trace.expert_ids[tokens]
    if not ids.size:
        return
    order = np.argsort(ids, axis=None, kind="stable")
    sorted_ids = ids.ravel()[order]
    events = trace.queries[tokens].astype(np.float64)[order // ids.shape[1]]  # (T*K, D)
    if trace.weights is not None:
        events *= trace.weights[tokens].ravel()[order, None]
    starts = np.flatnonzero(np.diff(sorted_ids, prepend=-1))
    sums[sorted_ids[starts]] += np.add.reduceat(events, starts, axis=0)


def _count_pairs(trace: TokenTrace) -> Int64Array:
    ids, experts = trace.expert_ids, trace.num_experts
    pairs = (ids[:, :, None] * experts + ids[:, None, :]).ravel()  # (T*K*K,)
    counts = np.bincount(pairs, minlength=experts * experts).reshape(experts, experts).astype(np.int64)
    np.fill_diagonal(counts, 0)
    return counts
