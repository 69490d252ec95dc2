"""The bytes in which statistics travel: what goes in comes out, and nothing else comes in."""

import struct
from dataclasses import replace
from uuid import UUID

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from keystore.backends.stats_blob import SentWindow, pack_window, unpack_window
from keystore.records import ScopeId
from keystore.statistics import LayerStats, RoutingStats, TokenCredit, TokenTrace, TokenUtility

TENANT, PRODUCER = ScopeId("tenant", "Zoë / 中文".replace("/", "-")), UUID(int=7)
SHAPES = {3: (16, 8), 5: (20, 8)}


def sent(*, coactivation: bool = False, settling: bool = False, scope: ScopeId = TENANT) -> SentWindow:
    rng = np.random.default_rng(3)
    traces: dict[int, TokenTrace] = {}
    for layer in (3, 5):
        ids, queries = rng.integers(0, 9, (12, 4)), rng.standard_normal((12, 8), dtype=np.float32)
        credit = TokenCredit(ids, rng.standard_normal((12, 4), dtype=np.float32))
        utility = TokenUtility(np.array([14, 15]), rng.standard_normal((12, 2), dtype=np.float32))
        traces[layer] = TokenTrace(ids, queries, 16, credit, utility if settling else None)
    return SentWindow(PRODUCER, 2**40, RoutingStats.from_tokens(scope, traces, coactivation=coactivation))


def arrays(sums: LayerStats) -> list[np.ndarray]:
    own = [sums.events, sums.credited, sums.weights, sums.weighted_queries]
    pairs = [] if sums.coactivation is None else [sums.coactivation]
    told = sums.utility
    return own + pairs + ([told.expert_ids, told.moments, told.weighted_queries] if told else [])


@pytest.mark.parametrize("coactivation", [False, True])
@pytest.mark.parametrize("settling", [False, True])
@pytest.mark.parametrize("scope", [TENANT, ScopeId("global"), ScopeId("session", "default", "a/b")])
def test_a_window_comes_out_as_it_went_in(coactivation, settling, scope) -> None:
    window = sent(coactivation=coactivation, settling=settling, scope=scope)
    blob = pack_window(window)
    found = unpack_window(blob, SHAPES, bonding=coactivation)
    assert (found.producer, found.sequence) == (PRODUCER, 2**40)
    assert (found.stats.scope, found.stats.tokens) == (scope, 12)
    for layer, sums in window.stats.layers.items():
        wanted, got = arrays(sums), arrays(found.stats.layers[layer])
        assert [each.dtype for each in got] == [each.dtype for each in wanted]
        assert [each.tobytes() for each in got] == [each.tobytes() for each in wanted]
    assert pack_window(found) == blob


def test_a_window_costs_what_it_touched_however_many_experts_there_are() -> None:
    window = sent()
    sums = window.stats.layers[3]

    def grow(array: np.ndarray) -> np.ndarray:
        return np.concatenate([array, np.zeros((100_000, *array.shape[1:]), array.dtype)])

    grown = LayerStats(*map(grow, (sums.events, sums.credited, sums.weighted_queries, sums.weights)), None)
    large = replace(window, stats=replace(window.stats, layers={**window.stats.layers, 3: grown}))
    assert len(pack_window(large)) == len(pack_window(window))
    found = unpack_window(pack_window(large), SHAPES | {3: (100_016, 8)}, bonding=False)
    assert found.stats.layers[3].weighted_queries.tobytes() == grown.weighted_queries.tobytes()


def test_every_truncation_is_refused() -> None:
    blob = pack_window(sent(coactivation=True, settling=True))
    for size in range(len(blob)):
        with pytest.raises(ValueError, match="blob"):
            unpack_window(blob[:size], SHAPES, bonding=True)
    with pytest.raises(ValueError, match="left over"):
        unpack_window(blob + b"\0", SHAPES, bonding=True)


@pytest.mark.parametrize(
    ("shapes", "bonding", "message"),
    [
        ({3: (16, 8)}, False, "layer 5 of 16 experts of 8"),
        ({3: (15, 8), 5: (20, 8)}, False, "up to 15"),
        ({3: (16, 9), 5: (20, 8)}, False, "up to 16 of 9"),
        (SHAPES, True, "bonding is on"),
    ],
)
def test_what_does_not_fit_the_model_is_refused(shapes, bonding, message) -> None:
    with pytest.raises(ValueError, match=message):
        unpack_window(pack_window(sent()), shapes, bonding=bonding)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("field", ["weights", "weighted_queries"])
def test_numbers_that_are_not_finite_are_refused(field, value) -> None:
    window = sent()
    getattr(window.stats.layers[5], field)[int(np.flatnonzero(window.stats.layers[5].events)[0])] = value
    with pytest.raises(ValueError, match="NaN or infinity"):
        unpack_window(pack_window(window), SHAPES, bonding=False)


@pytest.mark.parametrize("count", [-1, 2**41])
def test_counts_out_of_range_are_refused(count) -> None:
    window = sent()
    window.stats.layers[3].events[0] = count
    with pytest.raises(ValueError, match="counts"):
        unpack_window(pack_window(window), SHAPES, bonding=False)


def test_nobody_teaches_the_anchors_and_no_sequence_is_zero() -> None:
    with pytest.raises(ValueError, match="anchors"):
        unpack_window(pack_window(sent(scope=ScopeId("anchor"))), SHAPES, bonding=False)
    with pytest.raises(ValueError, match="sequence 0"):
        unpack_window(pack_window(replace(sent(), sequence=0)), SHAPES, bonding=False)


def test_sizes_that_would_fill_the_memory_are_refused_before_any_is_taken() -> None:
    blob = pack_window(sent())
    at = blob.index(struct.pack("<iI", 3, 16)) + 4
    for experts, rows in ((2**32 - 1, 1), (16, 2**32 - 1), (2**32 - 1, 2**32 - 1)):
        huge = blob[:at] + struct.pack("<II", experts, rows) + blob[at + 8 :]
        with pytest.raises(ValueError, match=r"allowed: up to 16|ends before byte"):
            unpack_window(huge, SHAPES, bonding=False)


def test_ids_so_far_apart_that_their_difference_wraps_around_are_refused() -> None:
    blob = pack_window(sent())
    at = blob.index(struct.pack("<iI", 3, 16)) + struct.calcsize("<iIIIB")
    wrapping = struct.pack("<qq", 2**62, -(2**62) - 1 - 2**61)  # within two rising ids
    with pytest.raises(ValueError, match="not rising"):
        unpack_window(blob[: at + 8] + wrapping + blob[at + 24 :], SHAPES, bonding=False)


@given(st.data())
def test_hostile_bytes_are_refused_or_are_statistics(data: st.DataObject) -> None:
    blob = bytearray(pack_window(sent(coactivation=True, settling=True)))
    for _ in range(data.draw(st.integers(1, 4))):
        at = data.draw(st.integers(0, len(blob) - 1))
        part = data.draw(st.binary(min_size=1, max_size=12))
        blob[at : at + len(part)] = part
    try:
        found = unpack_window(bytes(blob), SHAPES, bonding=True)
    except ValueError:
        return
    assert found.stats.is_finite
    assert found.stats.scope.kind != "anchor"
    for layer, sums in found.stats.layers.items():
        assert sums.weighted_queries.shape == (len(sums.events), 8)
        assert len(sums.events) <= SHAPES[layer][0]
        assert min(sums.events.min(), sums.credited.min()) >= 0
