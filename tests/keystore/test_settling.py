"""New experts find the address that predicts where they help, whatever the shape of the query space."""

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from keystore.backends.blobs import pack_settling, unpack_settling
from keystore.errors import InvalidStatistics, NonFiniteStatistics
from keystore.records import GravityConfig
from keystore.settling import SettlingState, advance_settling, settle
from keystore.statistics import LayerStats, TokenCredit, TokenTrace, TokenUtility

M, D, TOKENS = 6, 8, 400
IDS = np.array([2, 5])
CONFIG = GravityConfig(settling_warmup_tokens=100, settling_ridge=1e-6)
SEEDS = st.integers(0, 10_000)


def stretched_queries(rng: np.random.Generator, tokens: int = TOKENS) -> np.ndarray:
    """Queries as a router has them: a large common part, and directions that differ a hundredfold in size."""
    return (rng.standard_normal((tokens, D)) * np.logspace(0, -2, D) + 3 * np.eye(D)[0]).astype(np.float32)


def stats_of(queries: np.ndarray, utilities: np.ndarray, ids: np.ndarray = IDS) -> LayerStats:
    selected = np.zeros((len(queries), 1), np.int64)
    nothing = TokenCredit(selected[:, :0], np.empty((len(queries), 0), np.float32))
    utility = TokenUtility(ids, utilities.astype(np.float32))
    return LayerStats.from_tokens(TokenTrace(selected, queries, M, nothing, utility))


def planted(seed: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Queries, utilities with noise, and the addresses (S, D) that they come from."""
    rng = np.random.default_rng(seed)
    queries, addresses = stretched_queries(rng), rng.standard_normal((len(IDS), D))
    utilities = queries @ addresses.T
    return queries, utilities + 0.05 * utilities.std() * rng.standard_normal(utilities.shape), addresses


def settled(stats: LayerStats, tokens: int = TOKENS, config: GravityConfig = CONFIG, keys=None) -> np.ndarray:
    state = advance_settling(SettlingState.empty(IDS, D), stats, config, tokens)
    return settle(np.zeros((M, D), np.float32) if keys is None else keys, state, config, norm=2.0)[0]


def cosines(keys: np.ndarray, addresses: np.ndarray) -> np.ndarray:
    return (keys * addresses).sum(1) / np.linalg.norm(keys, axis=1) / np.linalg.norm(addresses, axis=1)


def correlations(queries: np.ndarray, keys: np.ndarray, utilities: np.ndarray) -> np.ndarray:
    """How well each key's scores predict its expert's utility."""
    return np.corrcoef((queries @ keys.T).T, utilities.T)[[0, 1], [2, 3]]


def test_the_planted_address_is_found_where_pulling_finds_the_common_direction() -> None:
    queries, utilities, addresses = planted(0)
    found = settled(stats_of(queries, utilities))[IDS]
    np.testing.assert_allclose(np.linalg.norm(found, axis=1), 2.0, rtol=1e-6)
    truth = queries @ addresses.T  # without the noise
    assert (correlations(queries, found, truth) > 0.99).all()
    assert (correlations(queries, utilities.T @ queries, truth) < 0.95).any()
    assert (cosines(found, addresses) > 0.9).all()


def test_the_address_is_the_ridge_regression() -> None:
    queries, utilities, _ = planted(1)
    ridge = replace(CONFIG, settling_ridge=0.1)
    wide = queries.astype(np.float64)
    moments = wide.T @ wide
    penalty = 0.1 * np.trace(moments) / D * np.eye(D)
    expected = np.linalg.solve(moments + penalty, wide.T @ utilities.astype(np.float32)).T
    expected *= 2.0 / np.linalg.norm(expected, axis=1, keepdims=True)
    np.testing.assert_allclose(
        settled(stats_of(queries, utilities), config=ridge)[IDS], expected, rtol=1e-5, atol=1e-6
    )


@given(SEEDS)
@settings(max_examples=25, deadline=None)
def test_order_and_split_of_tokens_do_not_matter(seed: int) -> None:
    queries, utilities, _ = planted(seed)
    order = np.random.default_rng(seed).permutation(TOKENS)
    whole = settled(stats_of(queries, utilities))
    parts = [stats_of(queries[cut], utilities[cut]) for cut in (order[:150], order[150:])]
    np.testing.assert_allclose(settled(parts[1].merge(parts[0])), whole, rtol=1e-4, atol=1e-5)
    state = SettlingState.empty(IDS, D)
    for part, tokens in zip(parts, (150, 250), strict=True):
        state = advance_settling(state, part, CONFIG, tokens)
    in_turn, _ = settle(np.zeros((M, D), np.float32), state, CONFIG, norm=2.0)
    np.testing.assert_allclose(in_turn, whole, rtol=1e-4, atol=1e-5)


def test_only_settling_experts_move_and_not_before_enough_tokens() -> None:
    queries, utilities, _ = planted(2)
    keys = np.random.default_rng(0).standard_normal((M, D)).astype(np.float32)
    moved = settled(stats_of(queries, utilities), keys=keys)
    others = np.setdiff1d(np.arange(M), IDS)
    assert np.array_equal(moved[others], keys[others])
    assert (moved[IDS] != keys[IDS]).any(axis=1).all()
    early = settled(stats_of(queries[:50], utilities[:50]), tokens=50, keys=keys)
    assert early is keys


def test_an_expert_that_never_helps_or_harms_stays_where_it_is() -> None:
    queries, utilities, _ = planted(3)
    keys = np.random.default_rng(0).standard_normal((M, D)).astype(np.float32)
    moved = settled(stats_of(queries, utilities * [1, 0]), keys=keys)
    assert np.array_equal(moved[IDS[1]], keys[IDS[1]])
    assert not np.array_equal(moved[IDS[0]], keys[IDS[0]])


def test_old_tokens_fade_with_a_half_life() -> None:
    queries, utilities, _ = planted(4)
    other, elsewhere, _ = planted(5)
    fading = replace(CONFIG, settling_halflife_tokens=20)
    state = SettlingState.empty(IDS, D)
    for stats in (stats_of(queries, utilities), stats_of(other, elsewhere)):
        state = advance_settling(state, stats, fading, TOKENS)
    newest = settled(stats_of(other, elsewhere))[IDS]
    got, _ = settle(np.zeros((M, D), np.float32), state, fading, norm=2.0)
    assert (cosines(got[IDS], newest) > 0.999).all()
    assert (state.tokens < TOKENS * 1.01).all()


def test_more_experts_join_without_anyone_forgetting() -> None:
    queries, utilities, _ = planted(6)
    state = advance_settling(SettlingState.empty(IDS, D), stats_of(queries, utilities), CONFIG, TOKENS)
    joined = state.of(np.array([2, 3, 5]))
    assert np.array_equal(joined.utilities[[0, 2]], state.utilities)
    assert not joined.utilities[1].any()
    early = advance_settling(joined, stats_of(queries, utilities), CONFIG, TOKENS)  # a window that knows no 3
    assert np.array_equal(early.utilities[[0, 2]], 2 * state.utilities)
    assert not early.utilities[1].any()
    assert early.tokens.tolist() == [2 * TOKENS, 0, 2 * TOKENS]
    without = replace(stats_of(queries, utilities), utility=None)
    with pytest.raises(InvalidStatistics, match="settle"):
        advance_settling(joined, without, CONFIG, TOKENS)


def test_an_expert_that_joins_later_waits_for_tokens_of_its_own() -> None:
    queries, utilities, addresses = planted(9)
    keys, ids = np.random.default_rng(0).standard_normal((M, D)).astype(np.float32), np.array([2, 3, 5])
    state = advance_settling(SettlingState.empty(IDS, D), stats_of(queries, utilities), CONFIG, TOKENS)
    few, later = queries[:50], np.random.default_rng(1).standard_normal(D)
    told = np.insert(few @ addresses.T, 1, few @ later, axis=1)
    state = advance_settling(state.of(ids), stats_of(few, told, ids), CONFIG, 50)
    moved, who = settle(keys, state, CONFIG, norm=2.0)
    assert who.tolist() == [2, 5]
    assert np.array_equal(moved[3], keys[3])
    queries = stretched_queries(np.random.default_rng(2))
    told = np.insert(queries @ addresses.T, 1, queries @ later, axis=1)
    state = advance_settling(state, stats_of(queries, told, ids), CONFIG, TOKENS)
    moved, who = settle(keys, state, CONFIG, norm=2.0)
    assert who.tolist() == [2, 3, 5]
    predicted = np.corrcoef(queries @ moved[3], queries @ later)[0, 1]
    assert predicted > 0.99, "that the query moments know more tokens than it does no harm"


def test_what_is_known_of_each_expert_is_stored() -> None:
    queries, utilities, _ = planted(10)
    state = advance_settling(SettlingState.empty(IDS, D), stats_of(queries, utilities), CONFIG, TOKENS)
    state = state.of(np.array([2, 3, 5]))
    read = unpack_settling(pack_settling({4: state}))[4]
    assert read.tokens.tolist() == [TOKENS, 0, TOKENS]
    for name in ("expert_ids", "moments", "utilities"):
        np.testing.assert_array_equal(getattr(read, name), getattr(state, name))


@pytest.mark.parametrize("poison", [np.nan, np.inf])
def test_utilities_that_are_not_finite_are_refused(poison: float) -> None:
    queries, utilities, _ = planted(7)
    utilities[3, 1] = poison
    with pytest.raises(NonFiniteStatistics):
        stats_of(queries, utilities)


def test_utilities_of_experts_that_are_not_there_or_of_other_tokens_are_refused() -> None:
    queries, utilities, _ = planted(8)
    with pytest.raises(InvalidStatistics, match="expert ids"):
        stats_of(queries, utilities, np.array([2, M]))
    with pytest.raises(InvalidStatistics, match="utilities"):
        stats_of(queries, utilities[:-1])
    with pytest.raises(InvalidStatistics, match="different experts"):
        stats_of(queries, utilities).merge(stats_of(queries, utilities, np.array([1, 5])))
