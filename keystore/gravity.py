"""The consolidation law: how one window of statistics moves one layer's keys. Pure functions, no clock, no
storage.

Symbols and sources: docs/gravity. Arithmetic is float64 from float32 masters and rounds once at the end, so a
row that nothing pushes comes back bit-identical.
"""

# M experts, D dimensions, T tokens, K experts per token; a displacement is always (M, D) float64

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from keystore.errors import OutOfBounds
from keystore.records import Float32Array, Float64Array, GravityConfig, Int64Array
from keystore.statistics import LayerStats

BoolArray = NDArray[np.bool_]
Radius = float | Float64Array  # of every row, or (M,) row by row

STEP_BOUND = 0.5  # A + B with bonding on: a step stays a convex combination and never overshoots
ROUNDING = 2.0**-23  # twice float32's unit roundoff


@dataclass(frozen=True, slots=True, eq=False)
class LayerUpdate:
    """A layer after one window. `keys` is the very array that went in when `moved_ids` is empty."""

    keys: Float32Array  # (M, D)
    usage: Float32Array  # (M,)
    moved_ids: Int64Array  # ids of the rows whose bits changed, rising


def consolidate_layer(
    anchors: Float32Array,
    keys: Float32Array,
    usage: Float32Array,
    stats: LayerStats,
    config: GravityConfig,
    *,
    num_experts_per_tok: int,
    window_tokens: int,
    learned_tokens: int,
    radius: Float64Array | None = None,
    movable: BoolArray | None = None,
) -> LayerUpdate:
    """Pull and peers from one snapshot, then repulsion or decay, then bounds, then usage.

    `window_tokens` is the number of tokens in `stats`, `learned_tokens` what the scope had learned before
    them. `radius` (M,) replaces the trust radius row by row, infinity meaning free; only `movable` rows (M,)
    move.
    """
    limits = np.full(len(keys), config.trust_radius) if radius is None else radius
    start = keys.astype(np.float64)
    pulled = pull(start, usage, stats, config, num_experts_per_tok)
    displaced = start + pulled
    if learned_tokens >= config.warmup_tokens:
        displaced += dark_energy(anchors, displaced, usage, config, window_tokens)
    if config.rule == "literal":
        restore_norms(displaced, anchors, rows=np.flatnonzero(pulled.any(axis=1)))
    may_move = (displaced != start).any(axis=1)
    moved = np.flatnonzero(may_move if movable is None else may_move & movable)
    next_keys = keys.copy()
    next_keys[moved] = bound_rows(anchors[moved], keys[moved], displaced[moved], limits[moved])
    moved = moved[(next_keys[moved].view(np.uint32) != keys[moved].view(np.uint32)).any(axis=1)]
    return LayerUpdate(
        keys=next_keys if len(moved) else keys,
        usage=advance_usage(usage, stats.events, config, window_tokens),
        moved_ids=moved.astype(np.int64),
    )


def pull(
    start: Float64Array,
    usage: Float32Array,
    stats: LayerStats,
    config: GravityConfig,
    num_experts_per_tok: int,
) -> Float64Array:
    """Displacement by queries and peers, both from the window's start keys.

    With bonding on, A + B is held at STEP_BOUND by shrinking both; without it the literal closed form stays
    exact. A credit-weighted step has no share of the key to give up, so there only B is bounded.
    """
    query_share = np.zeros(len(start))
    if config.rule == "literal":
        query_share = 1.0 - retention(stats.events, usage, config.plasticity_rate, config)
    peer_share = bonding_share(stats, usage, config, num_experts_per_tok)
    if peer_share.any():
        shrink = np.minimum(1.0, STEP_BOUND / np.maximum(query_share + peer_share, STEP_BOUND))
        query_share, peer_share = query_share * shrink, peer_share * shrink
    displacement = peer_pull(start, stats, peer_share)
    if config.rule == "literal":
        return displacement + literal_pull(start, stats, query_share)
    return displacement + credit_pull(stats, inertial_rate(usage, config.plasticity_rate, config))


def inertial_rate(usage: Float32Array, rate: float, config: GravityConfig) -> Float64Array:
    """a = rate / (1 + u), or the bare rate without inertia."""
    if config.inertia == "none":
        return np.full(len(usage), rate)
    return rate / (1.0 + usage.astype(np.float64))


def retention(events: Int64Array, usage: Float32Array, rate: float, config: GravityConfig) -> Float64Array:
    """1 - A: what is left of a key after `events` sequential pulls, (1-a)^n.

    With count inertia usage grows inside the window and the power law ((1+u)/(1+u+n))^rate telescopes over
    windows.
    """
    if config.inertia == "count":
        mass = 1.0 + usage.astype(np.float64)
        return (mass / (mass + events)) ** rate
    return (1.0 - inertial_rate(usage, rate, config)) ** events


def literal_pull(start: Float64Array, stats: LayerStats, query_share: Float64Array) -> Float64Array:
    """A (S/n - k): the mean over all orders of n sequential pulls (SOME v2 3.1, closed form)."""
    mean_query = stats.weighted_queries / np.maximum(stats.events, 1)[:, None]
    return np.where(stats.events[:, None] > 0, query_share[:, None] * (mean_query - start), 0.0)


def credit_pull(stats: LayerStats, rates: Float64Array) -> Float64Array:
    """alpha_i S_i / n_i over the tokens that gave credit. No -k term: a key moves only where credit points."""
    return rates[:, None] * stats.weighted_queries / np.maximum(stats.credited, 1)[:, None]


def bonding_share(
    stats: LayerStats, usage: Float32Array, config: GravityConfig, num_experts_per_tok: int
) -> Float64Array:
    """B (M,): the share that m_i peer events at beta/(K-1) each give away; zero without bonding or peers."""
    if stats.coactivation is None or not config.bonding_rate or num_experts_per_tok < 2:
        return np.zeros(len(stats.events))
    meetings = stats.coactivation.sum(axis=1)  # m_i
    rate = config.bonding_rate / (num_experts_per_tok - 1)
    if config.inertia == "count":  # the count grows once a token, the token brings m/n peers
        peers_per_event = meetings / np.maximum(stats.events, 1)
        return 1.0 - retention(stats.events, usage, 1.0, config) ** (rate * peers_per_event)
    return 1.0 - retention(meetings, usage, rate, config)


def peer_pull(start: Float64Array, stats: LayerStats, peer_share: Float64Array) -> Float64Array:
    """B (pbar - k) with pbar_i = sum_j C_ij k_j / m_i."""
    if stats.coactivation is None or not peer_share.any():
        return np.zeros_like(start)
    meetings = stats.coactivation.sum(axis=1)
    mean_peer = stats.coactivation.astype(np.float64) @ start / np.maximum(meetings, 1)[:, None]
    return np.where(meetings[:, None] > 0, peer_share[:, None] * (mean_peer - start), 0.0)


def dark_energy(
    anchors: Float32Array, keys: Float64Array, usage: Float32Array, config: GravityConfig, window_tokens: int
) -> Float64Array:
    """Displacement of idle experts towards home (or zero), or of all experts away from each other."""
    windows = window_tokens / config.decay_window_tokens  # T / T0
    if config.dark_energy == "repulsion":
        return repulsion(anchors, keys, config.repulsion_rate * windows)
    if config.dark_energy == "none":
        return np.zeros_like(keys)
    share = 1.0 - (1.0 - config.decay_rate) ** windows
    idle = fair_share(usage, config) < config.usage_threshold
    target = anchors.astype(np.float64) if config.dark_energy == "decay" else 0.0
    return np.where(idle[:, None], share * (target - keys), 0.0)


def repulsion(anchors: Float32Array, keys: Float64Array, push: float) -> Float64Array:
    """A push of constant length `push` |k0| away from the centroid of the other keys; none from the centroid
    itself.
    """
    others = max(len(keys) - 1, 1)
    away = keys - (keys.sum(axis=0) - keys) / others
    distance = np.linalg.norm(away, axis=1, keepdims=True)
    unit = np.divide(away, distance, out=np.zeros_like(away), where=distance > 0)
    return push * _norms(anchors)[:, None] * unit if len(keys) > 1 else np.zeros_like(keys)


def restore_norms(keys: Float64Array, anchors: Float32Array, rows: Int64Array) -> None:
    """Give `rows` the length of their anchors, in place; averaging shortens. A zero key keeps its place."""
    norms = _norms(keys)
    rows = rows[norms[rows] > 0]
    keys[rows] *= (_norms(anchors)[rows] / norms[rows])[:, None]


def bound_rows(
    anchors: Float32Array, start: Float32Array, displaced: Float64Array, trust_radius: Radius
) -> Float32Array:
    """`displaced` rounded to float32 inside |k - k0| <= trust_radius |k0|; a row that overflows stays at
    `start`. An infinite radius leaves a row free.

    The ball is shrunk by float32's rounding of the row first, so that the rounded key is inside too.
    """
    limits = _limits(anchors, trust_radius)
    bound = np.where(np.isinf(limits), 0.0, limits)
    targets = np.where(np.isinf(limits), np.inf, bound - ROUNDING * (_norms(anchors) + bound))
    home = anchors.astype(np.float64)
    offsets = displaced - home
    distances = _norms(offsets)
    outside = distances > targets
    scale = np.maximum(np.where(outside, targets, 1.0), 0.0) / np.where(outside, distances, 1.0)
    placed = np.where(outside[:, None], home + scale[:, None] * offsets, displaced)
    with np.errstate(over="ignore"):
        rounded = placed.astype(np.float32)
    overflowed = ~np.isfinite(rounded).all(axis=1)
    rounded[overflowed] = start[overflowed]
    stuck = (targets <= 0) | (_norms(rounded.astype(np.float64) - home) > limits)
    rounded[stuck] = anchors[stuck]
    return rounded


def check_bounds(anchors: Float32Array, keys: Float32Array, trust_radius: Radius) -> None:
    """Every adopter of a version calls this; an infinite radius leaves a row free.

    Raises OutOfBounds on a non-finite key or one past the trust radius.
    """
    if not np.isfinite(keys).all():
        raise OutOfBounds("keys hold NaN or infinity; allowed: finite float32 values")
    limits = _limits(anchors, trust_radius)
    outside = np.flatnonzero(_norms(keys.astype(np.float64) - anchors) > limits)
    if len(outside):
        allowed = np.broadcast_to(trust_radius, len(keys))[outside[0]]
        raise OutOfBounds(
            f"{len(outside)} keys, expert {outside[0]} first, lie further than {allowed:g} |k0| from home"
        )


def fair_share(usage: Float32Array, config: GravityConfig) -> Float64Array:
    """Usage with 1 = the load of a uniform router.

    Count inertia keeps counts, all others keep it this way.
    """
    share = usage.astype(np.float64)
    if config.inertia != "count":
        return share
    return share * len(share) / share.sum() if share.any() else np.ones_like(share)


def initial_usage(num_experts: int, config: GravityConfig) -> Float32Array:
    """Usage of the anchors: a fair share each, or no events yet with count inertia."""
    return np.full(num_experts, 0.0 if config.inertia == "count" else 1.0, np.float32)


def advance_usage(
    usage: Float32Array, events: Int64Array, config: GravityConfig, window_tokens: int
) -> Float32Array:
    """u after the window: an EMA, measured in tokens, of load relative to uniform; or the count so far."""
    total = events.sum()
    if not total:
        return usage
    if config.inertia == "count":
        return (usage.astype(np.float64) + events).astype(np.float32)
    keep = 0.5 ** (window_tokens / config.usage_halflife_tokens)
    load = events * (len(events) / total)
    return (keep * usage + (1.0 - keep) * load).astype(np.float32)


def credit_weights(raw_credit: Float32Array, clamp: float, selected: int | None = None) -> Float32Array:
    """Raw credit of one layer and window (T, C) over the mean |c| of its first `selected` columns (None: all),
    clamped to +-`clamp`.

    The mean is that of the selected experts, so that asking about more candidates leaves their weights alone.
    All-zero credit stays zero.
    """
    credit = raw_credit.astype(np.float64)
    mean = np.abs(credit[:, :selected]).mean() if credit.size else 0.0
    if mean == 0.0:
        return np.zeros_like(raw_credit)
    return np.clip(credit / mean, -clamp, clamp).astype(np.float32)


def scale_queries(queries: Float32Array, target_norm: float) -> Float32Array:
    """Each query (T, D) at length `target_norm`, the layer's mean anchor norm; a zero query stays zero."""
    wide = queries.astype(np.float64)
    norms = _norms(wide)[:, None]
    return np.divide(wide * target_norm, norms, out=np.zeros_like(wide), where=norms != 0).astype(np.float32)


def _limits(anchors: Float32Array, trust_radius: Radius) -> Float64Array:
    """How far each row may be from home; a free row of zero length is free all the same."""
    radii = np.broadcast_to(np.asarray(trust_radius, np.float64), len(anchors))
    return np.where(np.isinf(radii), np.inf, np.where(np.isinf(radii), 0.0, radii) * _norms(anchors))


def _norms(rows: Float32Array | Float64Array) -> Float64Array:
    return np.linalg.norm(rows.astype(np.float64), axis=1)
