"""The law of docs/gravity as properties; the sequential reference lives here."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from keystore.errors import InvalidConfig, NonFiniteStatistics, OutOfBounds
from keystore.gravity import (
    advance_usage,
    check_bounds,
    consolidate_layer,
    credit_weights,
    initial_usage,
    pull,
    retention,
    scale_queries,
)
from keystore.records import GravityConfig
from keystore.statistics import LayerStats, TokenCredit, TokenTrace

M, D, K = 12, 6, 3
SEEDS = st.integers(0, 2**32 - 1)
RULES = st.sampled_from(["literal", "direct"])
INERTIAS = st.sampled_from(["ema", "count", "none"])
DARK_ENERGIES = st.sampled_from(["decay", "decay_to_zero", "repulsion", "none"])
RADII = st.sampled_from([0.0, 1e-7, 0.05, 0.2, 1.0, 3.0])
EVERYTHING_ON = {
    "bonding_rate": 0.05,
    "repulsion_rate": 0.1,
    "decay_rate": 0.5,
    "usage_threshold": 1.0,
    "warmup_tokens": 0,
}


def make_trace(seed: int, tokens: int = 20, *, literal: bool = False) -> TokenTrace:
    rng = np.random.default_rng(seed)
    ids = rng.random((tokens, M)).argsort(axis=1)[:, :K]
    queries = rng.standard_normal((tokens, D), dtype=np.float32)
    weights = rng.standard_normal((tokens, K), dtype=np.float32)
    return TokenTrace(ids, queries, M, None if literal else TokenCredit(ids, weights))


def make_keys(seed: int) -> np.ndarray:
    return np.random.default_rng([seed, 1]).standard_normal((M, D), dtype=np.float32)


def select(trace: TokenTrace, rows) -> TokenTrace:
    credit = trace.credit and TokenCredit(trace.credit.expert_ids[rows], trace.credit.weights[rows])
    return TokenTrace(trace.expert_ids[rows], trace.queries[rows], M, credit)


def step(anchors, keys, stats, config, usage=None, tokens=20, learned=0):
    usage = initial_usage(M, config) if usage is None else usage
    return consolidate_layer(
        anchors,
        keys,
        usage,
        stats,
        config,
        num_experts_per_tok=K,
        window_tokens=tokens,
        learned_tokens=learned,
    )


def sequential_literal(start: np.ndarray, queries: np.ndarray, rate: float) -> np.ndarray:
    key = start.astype(np.float64)
    for query in queries:
        key = key + rate * (query - key)
    return key


@given(SEEDS, RULES, st.booleans())
@settings(max_examples=40, deadline=None)
def test_order_and_split_of_tokens_do_not_matter(seed: int, rule: str, bonding: bool) -> None:
    trace, config = make_trace(seed), GravityConfig(rule=rule, bonding_rate=0.02 if bonding else 0.0)
    order = np.random.default_rng(seed).permutation(20)
    whole = LayerStats.from_tokens(trace, coactivation=bonding)
    shuffled = LayerStats.from_tokens(select(trace, order), coactivation=bonding)
    parts = [
        LayerStats.from_tokens(select(trace, order[cut]), coactivation=bonding)
        for cut in (slice(7), slice(7, 20))
    ]
    anchors = make_keys(seed)
    keys = [step(anchors, anchors, each, config).keys for each in (whole, shuffled, parts[1].merge(parts[0]))]
    np.testing.assert_allclose(keys[1], keys[0], rtol=1e-6, atol=1e-7)
    np.testing.assert_allclose(keys[2], keys[0], rtol=1e-6, atol=1e-7)


def test_sums_of_chunked_tokens_equal_a_plain_loop() -> None:
    trace = make_trace(0, tokens=2500)
    stats = LayerStats.from_tokens(trace, coactivation=True)
    sums, weights, events, pairs = np.zeros((M, D)), np.zeros(M), np.zeros(M, int), np.zeros((M, M), int)
    for ids, query, row in zip(trace.expert_ids, trace.queries, trace.credit.weights, strict=True):
        for expert, weight in zip(ids, row, strict=True):
            sums[expert] += np.float64(weight) * query
            weights[expert] += weight
            events[expert] += 1
            pairs[expert, [other for other in ids if other != expert]] += 1
    np.testing.assert_allclose(stats.weighted_queries, sums, atol=1e-9)
    np.testing.assert_allclose(stats.weights, weights, atol=1e-9)
    np.testing.assert_array_equal(stats.events, events)
    np.testing.assert_array_equal(stats.coactivation, pairs)


@given(SEEDS, st.integers(2, 12), st.sampled_from([0.01, 0.1, 0.4]))
@settings(max_examples=15, deadline=None)
def test_literal_closed_form_is_the_mean_over_random_orders(seed: int, events: int, rate: float) -> None:
    rng = np.random.default_rng(seed)
    queries, start = rng.standard_normal((events, D)), make_keys(seed)
    counts = np.eye(1, M, dtype=np.int64)[0] * events
    stats = LayerStats(counts, counts, np.eye(M)[:, :1] * queries.sum(axis=0), np.zeros(M), None)
    config = GravityConfig(rule="literal", plasticity_rate=rate, inertia="none")
    closed = start[0] + pull(start.astype(np.float64), initial_usage(M, config), stats, config, K)[0]
    orders = np.array([sequential_literal(start[0], rng.permutation(queries), rate) for _ in range(600)])
    noise = orders.std(axis=0) / np.sqrt(len(orders))
    assert (np.abs(orders.mean(axis=0) - closed) <= 6 * noise + 1e-9).all()


def test_count_retention_telescopes_over_windows_and_follows_the_sequential_law() -> None:
    config = GravityConfig(rule="literal", inertia="count")
    usage = np.array([50, 200], np.float32)
    first, second = np.array([30, 7]), np.array([11, 90])
    both = retention(first, usage, 0.3, config) * retention(
        second, usage + first.astype(np.float32), 0.3, config
    )
    np.testing.assert_allclose(both, retention(first + second, usage, 0.3, config), rtol=1e-6)
    sequential = [
        np.prod([1 - 0.3 / (1 + u + hit) for hit in range(n)]) for u, n in zip(usage, first, strict=True)
    ]
    np.testing.assert_allclose(retention(first, usage, 0.3, config), sequential, rtol=5e-3)


@given(SEEDS, INERTIAS, st.sampled_from([0.0, 0.3, 1.0]), st.sampled_from([0.05, 1.0]))
@settings(max_examples=60, deadline=None)
def test_literal_step_stays_in_the_convex_hull(seed: int, inertia: str, beta: float, alpha: float) -> None:
    config = GravityConfig(rule="literal", inertia=inertia, plasticity_rate=alpha, bonding_rate=beta)
    trace, start = make_trace(seed, literal=True), make_keys(seed)
    stats = LayerStats.from_tokens(trace, coactivation=True)
    after = start + pull(start.astype(np.float64), initial_usage(M, config), stats, config, K)
    points = np.concatenate([start, trace.queries]).astype(np.float64)
    for direction in np.random.default_rng(seed).standard_normal((30, D)):
        reach = points @ direction
        assert reach.min() - 1e-9 <= (after @ direction).min()
        assert (after @ direction).max() <= reach.max() + 1e-9


def test_shares_of_queries_and_peers_together_never_pass_one_half() -> None:
    config = GravityConfig(rule="literal", plasticity_rate=1.0, bonding_rate=1.0, inertia="none")
    stats, start = (
        LayerStats.from_tokens(make_trace(0, literal=True), coactivation=True),
        make_keys(0).astype(float),
    )
    mean_query = stats.weighted_queries / stats.events[:, None]
    mean_peer = stats.coactivation @ start / stats.coactivation.sum(axis=1)[:, None]
    displacement = pull(start, initial_usage(M, config), stats, config, num_experts_per_tok=2)
    np.testing.assert_allclose(
        displacement, 0.25 * (mean_query - start) + 0.25 * (mean_peer - start), atol=1e-12
    )


def test_credit_step_is_rate_over_inertia_times_mean_credit_weighted_query() -> None:
    config, stats, anchors = (
        GravityConfig(trust_radius=100.0),
        LayerStats.from_tokens(make_trace(1)),
        make_keys(1),
    )
    usage = np.linspace(0, 3, M, dtype=np.float32)
    expected = (
        anchors + (0.1 / (1 + usage))[:, None] * stats.weighted_queries / np.maximum(stats.events, 1)[:, None]
    )
    np.testing.assert_allclose(
        step(anchors, anchors, stats, config, usage).keys, expected, rtol=1e-5, atol=1e-6
    )


@given(
    st.integers(1, 4).flatmap(
        lambda tokens: st.tuples(
            hnp.arrays(np.uint32, (tokens, D)), hnp.arrays(np.uint32, (tokens, K)), st.just(tokens)
        )
    ),
    RULES,
    INERTIAS,
    DARK_ENERGIES,
    RADII,
)
@settings(max_examples=150, deadline=None)
def test_any_float32_bits_leave_keys_finite_and_inside(bits, rule, inertia, dark, radius) -> None:
    queries, weights, tokens = bits[0].view(np.float32), bits[1].view(np.float32), bits[2]
    ids = np.tile(np.arange(K), (tokens, 1))
    anchors = make_keys(0)
    config = GravityConfig(rule=rule, inertia=inertia, dark_energy=dark, trust_radius=radius, **EVERYTHING_ON)
    try:
        stats = LayerStats.from_tokens(
            TokenTrace(ids, queries, M, TokenCredit(ids, weights)),
            coactivation=True,
        )
    except NonFiniteStatistics:
        assert not (np.isfinite(queries).all() and np.isfinite(weights).all())
        return
    update = step(anchors, anchors, stats, config)
    check_bounds(anchors, update.keys, radius)
    assert np.isfinite(update.usage).all()


@given(hnp.arrays(np.uint32, (M, D)), SEEDS, RULES, RADII)
@settings(max_examples=100, deadline=None)
def test_trust_radius_holds_for_anchors_of_any_size(bits, seed, rule, radius) -> None:
    anchors = np.nan_to_num(bits.view(np.float32), nan=1.0, posinf=3e38, neginf=-3e38)
    config = GravityConfig(rule=rule, trust_radius=radius, **EVERYTHING_ON)
    keys = anchors
    for window in range(3):
        stats = LayerStats.from_tokens(make_trace(seed + window), coactivation=True)
        keys = step(anchors, keys, stats, config).keys
        check_bounds(anchors, keys, radius)


@given(SEEDS, RULES, INERTIAS, DARK_ENERGIES)
@settings(max_examples=40, deadline=None)
def test_radius_zero_returns_the_very_same_keys(seed, rule, inertia, dark) -> None:
    anchors = make_keys(seed)
    anchors[0, 0] = -0.0
    config = GravityConfig(rule=rule, inertia=inertia, dark_energy=dark, trust_radius=0.0, **EVERYTHING_ON)
    update = step(anchors, anchors, LayerStats.from_tokens(make_trace(seed), coactivation=True), config)
    assert update.keys is anchors
    assert not len(update.moved_ids)


@given(SEEDS, RULES, DARK_ENERGIES)
@settings(max_examples=20, deadline=None)
def test_rates_of_zero_return_the_very_same_keys(seed, rule, dark) -> None:
    anchors, keys = make_keys(seed), make_keys(seed) * np.float32(1.01)
    config = GravityConfig(rule=rule, plasticity_rate=0.0, decay_rate=0.0, dark_energy=dark, warmup_tokens=0)
    assert step(anchors, keys, LayerStats.from_tokens(make_trace(seed)), config).keys is keys


def test_literal_keys_keep_the_length_of_their_anchors() -> None:
    anchors, config = make_keys(3), GravityConfig(rule="literal", trust_radius=100.0)
    update = step(anchors, anchors, LayerStats.from_tokens(make_trace(3, literal=True)), config)
    assert len(update.moved_ids)
    np.testing.assert_allclose(
        np.linalg.norm(update.keys, axis=1), np.linalg.norm(anchors, axis=1), rtol=1e-6
    )


def test_idle_experts_go_home_only_after_warm_up_and_measured_in_tokens() -> None:
    anchors = make_keys(4)
    keys = anchors + np.float32(0.01)
    nothing = LayerStats(np.zeros(M, np.int64), np.zeros(M, np.int64), np.zeros((M, D)), np.zeros(M), None)
    config = GravityConfig(decay_rate=0.5, decay_window_tokens=100, warmup_tokens=10, usage_threshold=0.5)
    usage = np.where(np.arange(M) < 4, 0.1, 1.0).astype(np.float32)
    assert step(anchors, keys, nothing, config, usage, tokens=200, learned=9).keys is keys
    update = step(anchors, keys, nothing, config, usage, tokens=200, learned=10)
    np.testing.assert_array_equal(update.moved_ids, np.arange(4))
    np.testing.assert_allclose(update.keys[:4] - anchors[:4], 0.0025, atol=1e-6)


def test_repulsion_pushes_away_from_the_others_by_a_constant_length() -> None:
    anchors = make_keys(5)
    nothing = LayerStats(np.zeros(M, np.int64), np.zeros(M, np.int64), np.zeros((M, D)), np.zeros(M), None)
    config = GravityConfig(
        dark_energy="repulsion", repulsion_rate=0.1, decay_window_tokens=20, warmup_tokens=0
    )
    pushed = step(anchors, anchors, nothing, config, tokens=20).keys - anchors
    np.testing.assert_allclose(
        np.linalg.norm(pushed, axis=1), 0.1 * np.linalg.norm(anchors, axis=1), rtol=1e-4
    )
    away = anchors[0] - anchors[1:].mean(axis=0)
    assert pushed[0] @ away > 0.999 * np.linalg.norm(pushed[0]) * np.linalg.norm(away)


def test_usage_is_load_against_uniform_with_a_half_life_in_tokens() -> None:
    config = GravityConfig(usage_halflife_tokens=64)
    events = np.zeros(M, np.int64)
    events[0] = 10
    usage = advance_usage(initial_usage(M, config), events, config, window_tokens=64)
    np.testing.assert_allclose(usage, [0.5 + M / 2] + [0.5] * (M - 1))


def test_credit_is_divided_by_its_mean_size_and_clamped() -> None:
    raw = np.array([[1, -1, 0], [0, 0, 22]], np.float32)
    np.testing.assert_allclose(credit_weights(raw, 3.0), [[0.25, -0.25, 0], [0, 0, 3]])
    assert not credit_weights(np.zeros((2, 3), np.float32), 3.0).any()


def test_queries_are_scaled_to_the_anchor_norm_and_zero_stays_zero() -> None:
    queries = np.array([[3, 4], [0, 0], [1e30, 0]], np.float32)
    np.testing.assert_allclose(scale_queries(queries, 2.0), [[1.2, 1.6], [0, 0], [2, 0]], rtol=1e-6)


def test_bounds_reject_keys_that_are_far_or_not_finite() -> None:
    anchors = make_keys(6)
    for bad in (anchors * np.float32(1.3), np.where(np.arange(D) == 2, np.nan, anchors).astype(np.float32)):
        with pytest.raises(OutOfBounds):
            check_bounds(anchors, bad, 0.2)


@pytest.mark.parametrize(
    "wrong",
    [
        {"trust_radius": -0.1},
        {"plasticity_rate": float("nan")},
        {"rule": "other"},
        {"window_tokens": 0},
        {"warmup_tokens": 1.5},
    ],
)
def test_settings_outside_their_range_are_refused_by_name(wrong: dict[str, object]) -> None:
    with pytest.raises(InvalidConfig, match=next(iter(wrong))):
        GravityConfig(**wrong)
