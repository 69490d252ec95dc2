"""Experts added, promoted and retired while a store serves: who sees them, who moves, and what survives."""

import threading
from dataclasses import replace

import apsw
import numpy as np
import pytest

from keystore.errors import (
    ExpertGroupExists,
    ExpertNotVisible,
    InvalidExperts,
    InvalidSnapshot,
    InvalidStatistics,
    ModelMismatch,
    StoreCorrupted,
    UnknownExpertGroup,
    WrongGroupState,
)
from keystore.projection import layer_drift
from keystore.records import GravityConfig, ScopeId
from keystore.statistics import LayerStats, RoutingStats, TokenCredit, TokenTrace, TokenUtility

TENANT, OTHER = ScopeId("tenant", "default"), ScopeId("tenant", "other")
SESSION, STRANGER = ScopeId("session", "default", "abc"), ScopeId("session", "other", "abc")
BORN, ADDED = 16, 2  # experts of a layer
NEW_IDS = [16, 17]


def new_keys(seed: int = 7, layers: tuple[int, ...] = (3, 5), n: int = ADDED) -> dict[int, np.ndarray]:
    rng = np.random.default_rng(seed)
    return {layer: rng.standard_normal((n, 8), dtype=np.float32) for layer in layers}


def bits(snapshot) -> list[bytes]:
    return [snapshot.keys_of(layer).tobytes() for layer in (1, 3, 5)]


def found(snapshot, k: int = BORN) -> list[bytes]:
    """Bits of scores and ids of some searches in every layer."""
    queries = np.random.default_rng(3).standard_normal((64, 8), dtype=np.float32)
    return [part.tobytes() for layer in (1, 3, 5) for part in snapshot.search(layer, queries, k)]


def widened(stats: RoutingStats, num_experts: int) -> RoutingStats:
    """The same window, of a model that has more experts which nobody selected."""

    def wide(array: np.ndarray) -> np.ndarray:
        return np.pad(array, [(0, num_experts - len(array))] + [(0, 0)] * (array.ndim - 1))

    layers = {
        layer: LayerStats(wide(s.events), wide(s.credited), wide(s.weighted_queries), wide(s.weights), None)
        for layer, s in stats.layers.items()
    }
    return RoutingStats(stats.scope, stats.tokens, layers)


@pytest.fixture
def settle(window):
    """One window over all 18 experts, consolidated."""

    def learn(store, seed: int, scope: ScopeId = TENANT, num_experts: int = BORN + ADDED) -> None:
        assert store.submit(window(scope, seed, num_experts=num_experts))
        assert len(store.consolidate_once()) == 1

    return learn


# ---- who sees them


def test_settling_experts_are_seen_by_one_tenant_and_its_sessions_only(store, teach) -> None:
    teach(store, 1)
    teach(store, 2, SESSION)
    teach(store, 3, STRANGER)
    keys = new_keys()
    group = store.experts.add("extra", TENANT, keys, "cafe")
    assert (group.name, group.scope, group.state, group.digest) == ("extra", TENANT, "settling", "cafe")
    assert {layer: ids.tolist() for layer, ids in group.expert_ids.items()} == {3: NEW_IDS, 5: NEW_IDS}
    for scope in (TENANT, SESSION, ScopeId("session", "default", "new")):
        view = store.view(scope)
        assert view.visible_ids(3) is None
        scores, ids = view.search(3, keys[3], BORN + ADDED)
        assert all(new in row for new, row in zip(NEW_IDS, ids.tolist(), strict=True))
        np.testing.assert_array_equal(view.score(3, keys[3], ids), scores)
    for scope in (OTHER, STRANGER, ScopeId("tenant", "new"), ScopeId("anchor")):
        view = store.view(scope)
        assert view.visible_ids(3).tolist() == list(range(BORN))
        assert view.visible_ids(1) is None
        np.testing.assert_array_equal(view.keys_of(3)[NEW_IDS], keys[3])
        assert view.search(3, keys[3], BORN)[1].max() < BORN


def test_scores_of_a_hidden_or_unknown_expert_are_refused(store) -> None:
    before = store.view(OTHER)
    store.experts.add("extra", TENANT, new_keys(), "cafe")
    queries = np.ones((1, 8), np.float32)
    for view, wrong in ((store.view(OTHER), 16), (before, 16), (store.view(TENANT), 18), (before, -1)):
        with pytest.raises(ExpertNotVisible, match=f"expert {wrong} of layer 3"):
            view.score(3, queries, np.array([[0, wrong]]))


@pytest.mark.parametrize("exact_limit", [16_384, 8])
def test_nobody_else_can_tell_that_experts_were_added(
    open_here, window, tmp_path, exact_limit, teach
) -> None:
    def life(with_experts: bool) -> list:
        store = open_here(exact_limit=exact_limit)
        for scope in (OTHER, STRANGER):
            teach(store, 1, scope)
        seen = []
        if with_experts:
            store.experts.add("extra", TENANT, new_keys(), "cafe")
            store.submit(window(TENANT, 5, num_experts=BORN + ADDED))
        for seed, scope in ((2, OTHER), (3, STRANGER), (4, ScopeId("tenant", "new"))):
            store.submit(widened(window(scope, seed), BORN + ADDED) if with_experts else window(scope, seed))
        store.consolidate_once()
        for scope in (OTHER, STRANGER, ScopeId("tenant", "new")):
            view = store.view(scope)
            usage = [view.usage[layer][:BORN].tobytes() for layer in (3, 5)]
            seen.append((view.version, view.reason, view.checksum, found(view), usage))
        (tmp_path / "keys-tiny.sqlite3").rename(tmp_path / f"kept-{with_experts}.sqlite3")
        return seen

    assert life(with_experts=True) == life(with_experts=False)


def test_promoted_experts_are_everybodys_and_retired_ones_nobodys(store, teach, settle) -> None:
    teach(store, 1, OTHER)
    store.experts.add("extra", TENANT, new_keys(), "cafe")
    settle(store, 2)
    settled = store.view(TENANT).keys_of(3)[NEW_IDS]
    assert store.experts.promote("extra").state == "promoted"
    for scope in (TENANT, OTHER, STRANGER, ScopeId("anchor")):
        for version in (None, 0):
            view = store.view(scope, version)
            assert view.visible_ids(3) is None
            np.testing.assert_array_equal(view.keys_of(3)[NEW_IDS], settled)
    held = store.view(OTHER)
    assert store.experts.retire("extra").state == "retired"
    for scope in (TENANT, SESSION, OTHER, ScopeId("anchor")):
        view = store.view(scope)
        assert view.visible_ids(3).tolist() == list(range(BORN))
        assert view.search(3, settled, BORN)[1].max() < BORN
        assert store.view(scope, 0).visible_ids(3) is not None
    assert held.search(3, settled, 1)[1].ravel().tolist() == NEW_IDS, "who holds a version goes on with it"


def test_ids_never_come_back(store) -> None:
    store.experts.add("first", TENANT, new_keys(), "cafe")
    store.experts.retire("first")
    second = store.experts.add("second", OTHER, new_keys(8, (3,), 1), "beef")
    assert second.expert_ids[3].tolist() == [18]
    view = store.view(OTHER)
    assert view.visible_ids(3).tolist() == [*range(BORN), 18]
    scores, ids = view.search(3, view.keys_of(3)[[18, 2]], BORN + 1)
    assert 18 in ids[0]
    assert not set(NEW_IDS) & set(ids.ravel().tolist())
    np.testing.assert_array_equal(view.score(3, view.keys_of(3)[[18, 2]], ids), scores)
    assert [group.state for group in store.experts.all()] == ["retired", "settling"]


def test_versions_say_what_happened_and_only_to_whom_it_happened(store, teach, settle) -> None:
    teach(store, 1, OTHER)
    teach(store, 1, SESSION)
    heard = []
    store.news.published.add(lambda new: heard.append((new.scope, new.version, new.parent, new.reason)))
    store.experts.add("extra", TENANT, new_keys(), "cafe")
    assert heard == [(TENANT, 1, 0, "experts added: extra"), (SESSION, 2, 1, "experts added: extra")]
    heard.clear()
    store.experts.promote("extra")
    assert {(scope, version) for scope, version, _, _ in heard} == {(TENANT, 2), (SESSION, 3), (OTHER, 2)}
    assert {reason for *_, reason in heard} == {"experts promoted: extra"}
    heard.clear()
    store.experts.retire("extra")
    assert {(scope, version) for scope, version, _, _ in heard} == {(TENANT, 3), (SESSION, 4), (OTHER, 3)}
    assert store.versions(OTHER)[0].reason == "experts retired: extra"


# ---- who moves


def test_while_experts_settle_only_they_move_and_they_are_free(open_here, window) -> None:
    store = open_here(GravityConfig(plasticity_rate=1.0))
    keys = new_keys(layers=(3,))
    store.experts.add("extra", TENANT, keys, "cafe")
    start = store.view(TENANT)
    for seed in range(10):
        of_layer_3 = window(TENANT, seed, num_experts=BORN + ADDED).layers[3]
        layers = {3: of_layer_3, 5: window(TENANT, seed).layers[5]}
        assert store.submit(RoutingStats(TENANT, 32, layers))
        assert len(store.consolidate_once()) == 1
    view = store.view(TENANT)
    np.testing.assert_array_equal(view.keys_of(3)[:BORN], start.keys_of(3)[:BORN])
    assert view.keys_of(5) is start.keys_of(5)
    drift = layer_drift(keys[3], view.keys_of(3)[NEW_IDS], 1.0).relative
    assert (drift > store.gravity.trust_radius).all()
    assert store.versions(TENANT)[0].drift_max == 0, "experts without a radius have no share of it"


def test_in_a_session_everything_moves_but_the_experts_that_settle_in_its_tenant(open_here, window) -> None:
    store = open_here(GravityConfig(plasticity_rate=1.0))
    store.experts.add("extra", TENANT, new_keys(layers=(3,)), "cafe")
    start = store.view(TENANT)
    layers = {3: window(SESSION, 0, num_experts=BORN + ADDED).layers[3], 5: window(SESSION, 0).layers[5]}
    assert store.submit(RoutingStats(SESSION, 32, layers))
    (learned,) = store.consolidate_once()
    np.testing.assert_array_equal(learned.keys_of(3)[NEW_IDS], start.keys_of(3)[NEW_IDS])
    for layer in (3, 5):
        assert not np.array_equal(learned.keys_of(layer)[:BORN], start.keys_of(layer)[:BORN])


# ---- addresses by regression


def utilities(scope: ScopeId, seed: int, tokens: int = 64) -> tuple[RoutingStats, dict[int, np.ndarray]]:
    """A window whose settling experts help exactly along an address of their own in every layer."""
    rng = np.random.default_rng(seed)
    truth = {layer: np.random.default_rng(layer).standard_normal((ADDED, 8)) for layer in (3, 5)}
    traces: dict[int, TokenTrace] = {}
    for layer, address in truth.items():
        queries = rng.standard_normal((tokens, 8), dtype=np.float32)
        ids = rng.random((tokens, BORN)).argsort(axis=1)[:, :2]
        nothing = TokenCredit(ids[:, :0], np.empty((tokens, 0), np.float32))
        helped = TokenUtility(np.array(NEW_IDS), (queries @ address.T).astype(np.float32))
        traces[layer] = TokenTrace(ids, queries, BORN + ADDED, nothing, helped)
    return RoutingStats.from_tokens(scope, traces), truth


def alike(first: np.ndarray, second: np.ndarray) -> np.ndarray:
    return (first * second).sum(1) / np.linalg.norm(first, axis=1) / np.linalg.norm(second, axis=1)


def test_settling_experts_find_their_address_and_keep_what_they_know_over_a_restart(open_here) -> None:
    law = GravityConfig(settling_warmup_tokens=100, settling_ridge=1e-6)
    store = open_here(law)
    store.experts.add("extra", TENANT, new_keys(), "cafe")
    assert {
        layer: ids.tolist() for layer, ids in store.experts.settling_ids(TENANT).items()
    } == dict.fromkeys((3, 5), NEW_IDS)
    assert not store.experts.settling_ids(SESSION)
    assert not store.experts.settling_ids(OTHER)
    start = store.view(TENANT)
    first, truth = utilities(TENANT, 0)
    store.submit(first)
    assert store.consolidate_once() == [], "64 tokens are too few to speak for an address"
    store.submit(utilities(TENANT, 1)[0])
    (found,) = store.consolidate_once()
    for layer, address in truth.items():
        assert (alike(found.keys_of(layer)[NEW_IDS], address) > 0.99).all()
        born = start.keys_of(layer)[:BORN]
        lengths = np.linalg.norm(found.keys_of(layer)[NEW_IDS], axis=1)
        np.testing.assert_allclose(lengths, np.linalg.norm(born, axis=1).mean(), rtol=1e-5)
        np.testing.assert_array_equal(found.keys_of(layer)[:BORN], born)
    store.close()
    again = open_here(law)
    again.submit(utilities(TENANT, 2, tokens=10)[0])
    (more,) = again.consolidate_once()
    for layer, address in truth.items():
        assert (alike(more.keys_of(layer)[NEW_IDS], address) > 0.99).all(), (
            "ten tokens alone are below the warm-up"
        )


def test_watching_while_a_window_is_learned_forgets_nothing(open_here, monkeypatch) -> None:
    law = GravityConfig(settling_warmup_tokens=100)
    open_here(law).experts.add("extra", TENANT, new_keys(), "cafe")
    store = open_here(law)
    read, reads = store._backend.settling, []

    def read_slowly(scope: ScopeId):
        stored = read(scope)
        reads.append(scope)
        if len(reads) == 1:  # the watcher's; the window's own comes second
            store.submit(utilities(TENANT, 0)[0])
            assert store.consolidate_once() == [], "64 tokens are too few"
        return stored

    monkeypatch.setattr(store._backend, "settling", read_slowly)
    store.experts.settling("extra")
    assert len(reads) == 2
    store.submit(utilities(TENANT, 1)[0])
    assert len(store.consolidate_once()) == 1, "128 are enough"


def test_after_a_reset_settling_experts_begin_anew(open_here) -> None:
    store = open_here(GravityConfig(settling_warmup_tokens=100))
    store.experts.add("extra", TENANT, new_keys(), "cafe")
    for seed in range(2):
        store.submit(utilities(TENANT, seed)[0])
    assert store.consolidate_once()
    store.reset(TENANT)
    home = store.view(TENANT)
    store.submit(utilities(TENANT, 2)[0])
    assert store.consolidate_once() == []
    assert store.view(TENANT) is home


def test_a_promoted_expert_stays_near_its_anchor_and_the_others_move_again(open_here, settle) -> None:
    store = open_here(GravityConfig(plasticity_rate=1.0, trust_radius=0.1))
    store.experts.add("extra", TENANT, new_keys(), "cafe")
    settle(store, 0)
    store.experts.promote("extra")
    anchors = store.view(TENANT, 0)
    for seed in range(10):
        settle(store, seed)
        settle(store, seed, OTHER)
    for scope in (TENANT, OTHER):
        for layer in (3, 5):
            drift = layer_drift(anchors.keys_of(layer), store.view(scope).keys_of(layer), 0.1).of_radius
            assert 0 < drift[NEW_IDS].min() <= drift.max() <= 1
            assert np.count_nonzero(drift) == BORN + ADDED


def test_windows_from_before_an_expert_came_and_after_it_went_teach_the_others(store, window) -> None:
    early = window(OTHER, 1)
    store.experts.add("extra", TENANT, new_keys(), "cafe")
    store.experts.promote("extra")
    late = window(OTHER, 2, num_experts=BORN + ADDED)
    assert store.submit(early)
    (learned,) = store.consolidate_once()
    assert not np.array_equal(learned.keys_of(3)[:BORN], store.view(OTHER, 0).keys_of(3)[:BORN])
    np.testing.assert_array_equal(learned.keys_of(3)[NEW_IDS], store.view(OTHER, 0).keys_of(3)[NEW_IDS])
    store.submit(late)
    store.experts.retire("extra")
    (learned,) = store.consolidate_once()
    anchors = store.view(OTHER, 0)
    np.testing.assert_array_equal(learned.keys_of(3)[NEW_IDS], anchors.keys_of(3)[NEW_IDS])
    np.testing.assert_array_equal(learned.usage[3][NEW_IDS], [1.0, 1.0])
    with pytest.raises(InvalidStatistics, match="16 to 18 experts"):
        store.submit(window(OTHER, 3, num_experts=BORN + ADDED + 1))


def test_a_window_of_as_many_experts_as_are_seen_now_is_still_of_those_it_was_of(store, window) -> None:
    store.experts.add("old", TENANT, new_keys(), "cafe")
    early = window(TENANT, 1, num_experts=BORN + ADDED)
    store.experts.retire("old")
    store.experts.add("new", TENANT, new_keys(8), "beef")
    store.experts.promote("new")
    home = store.view(TENANT)
    assert len(home.visible_ids(3)) == BORN + ADDED
    assert store.submit(early)
    (learned,) = store.consolidate_once()
    assert not np.array_equal(learned.keys_of(3)[:BORN], home.keys_of(3)[:BORN])
    np.testing.assert_array_equal(learned.keys_of(3)[BORN:], home.keys_of(3)[BORN:])
    assert (learned.usage[3][BORN + ADDED :] < 1).all(), "the new ones were selected by nobody"


@pytest.mark.parametrize(("inertia", "expected"), [("ema", 1.0), ("count", 0.0)])
def test_new_experts_start_with_the_usage_of_an_anchor(open_here, teach, inertia, expected) -> None:
    store = open_here(GravityConfig(inertia=inertia))
    teach(store)
    before = store.view(TENANT).usage[3]
    store.experts.add("extra", TENANT, new_keys(), "cafe")
    usage = store.view(TENANT).usage[3]
    np.testing.assert_array_equal(usage, [*before, expected, expected])


def test_what_was_learned_without_moving_a_key_is_kept(store, window) -> None:
    def silent(stats: RoutingStats) -> RoutingStats:
        layers = {
            layer: replace(s, weighted_queries=0 * s.weighted_queries) for layer, s in stats.layers.items()
        }
        return RoutingStats(stats.scope, stats.tokens, layers)

    for scope in (TENANT, OTHER):
        store.submit(silent(window(scope, 1)))
    assert store.consolidate_once() == []
    store.experts.add("extra", TENANT, new_keys(), "cafe")
    assert store.view(TENANT).tokens == 32
    store.submit(window(OTHER, 2))
    (learned,) = store.consolidate_once()
    assert learned.tokens == 64


def test_settling_can_be_watched(store, settle, window) -> None:
    keys = new_keys()
    store.experts.add("extra", TENANT, keys, "cafe")
    assert store.experts.settling("extra")[3].credited_tokens.tolist() == [0, 0]
    settle(store, 1)
    before = store.view(TENANT)
    stats = window(TENANT, 2, num_experts=BORN + ADDED)
    store.submit(stats)
    store.consolidate_once()
    after = store.view(TENANT)
    reading = store.experts.settling("extra")[3]
    assert reading.expert_ids.tolist() == NEW_IDS
    np.testing.assert_array_equal(reading.credited_tokens, stats.layers[3].credited[NEW_IDS])
    lengths = np.linalg.norm(keys[3], axis=1)
    drift = np.linalg.norm(after.keys_of(3)[NEW_IDS] - keys[3], axis=1) / lengths
    step = np.linalg.norm((after.keys_of(3) - before.keys_of(3))[NEW_IDS], axis=1) / lengths
    np.testing.assert_allclose(reading.drift, drift, rtol=1e-5)
    np.testing.assert_allclose(reading.window_drift, step, rtol=1e-4)
    assert (reading.drift != reading.window_drift).all()
    np.testing.assert_allclose(reading.usage_share, after.usage[3][NEW_IDS] / after.usage[3].sum(), rtol=1e-6)
    store.experts.promote("extra")
    with pytest.raises(WrongGroupState, match="'extra' is promoted"):
        store.experts.settling("extra")


# ---- what is refused

WRONG = {
    "no layer": ({}, "no layer"),
    "a layer that is not plastic": ({1: np.zeros((2, 8), np.float32)}, "layer 1; allowed: plastic layers"),
    "an unknown layer": ({9: np.zeros((2, 8), np.float32)}, "layer 9"),
    "another width": ({3: np.zeros((2, 7), np.float32)}, r"allowed: float32 \(n, 8\)"),
    "no rows": ({3: np.zeros((0, 8), np.float32)}, "n from 1"),
    "float64": ({3: np.zeros((2, 8))}, "float64"),
    "NaN": ({3: np.full((2, 8), np.nan, np.float32)}, "NaN or infinity"),
}


@pytest.mark.parametrize("case", WRONG)
def test_experts_that_do_not_fit_change_nothing(store, case) -> None:
    keys, message = WRONG[case]
    with pytest.raises(InvalidExperts, match=message):
        store.experts.add("extra", TENANT, keys, "cafe")
    assert store.experts.all() == []
    assert store.view(TENANT).version == store.verify_audit() == 0


@pytest.mark.parametrize("name", ["", "Extra", "-x", "a" * 65, "a/b", "a\n"])
def test_names_are_plain(store, name) -> None:
    with pytest.raises(InvalidExperts, match="group name"):
        store.experts.add(name, TENANT, new_keys(), "cafe")


def test_groups_are_named_once_and_go_one_way(store) -> None:
    with pytest.raises(InvalidExperts, match="session:default/abc"):
        store.experts.add("extra", SESSION, new_keys(), "cafe")
    for change in (store.experts.promote, store.experts.retire, store.experts.settling):
        with pytest.raises(UnknownExpertGroup, match="'extra'"):
            change("extra")
    store.experts.add("extra", TENANT, new_keys(), "cafe")
    with pytest.raises(ExpertGroupExists, match="'extra', settling"):
        store.experts.add("extra", TENANT, new_keys(), "cafe")
    store.experts.promote("extra")
    with pytest.raises(WrongGroupState, match="promoted"):
        store.experts.promote("extra")
    store.experts.retire("extra")
    for change in (store.experts.promote, store.experts.retire):
        with pytest.raises(WrongGroupState, match="retired"):
            change("extra")
    with pytest.raises(ExpertGroupExists, match="retired"):
        store.experts.add("extra", TENANT, new_keys(), "cafe")


# ---- what survives


def everything(store) -> list:
    """All that readers see of some scopes, at their latest and at every kept version."""
    seen = []
    for scope in (TENANT, SESSION, OTHER, STRANGER, ScopeId("anchor")):
        for version in (None, 0, *(row.version for row in store.versions(scope))):
            view = store.view(scope, version)
            shown = [None if view.visible_ids(n) is None else view.visible_ids(n).tolist() for n in (1, 3, 5)]
            usage = [values.tobytes() for values in view.usage.values()]
            seen.append((str(scope), view.version, view.checksum, view.tokens, bits(view), shown, usage))
    groups = [
        (g.name, g.scope, g.state, g.digest, g.added_at, {n: ids.tolist() for n, ids in g.expert_ids.items()})
        for g in store.experts.all()
    ]
    return [*seen, groups]


def test_a_restart_finds_every_generation_as_it_was(open_here, clock, teach, settle) -> None:
    store = open_here(clock=clock)
    seen = [everything(store)]

    def restart():
        seen.append(everything(store))
        again = open_here(clock=clock)
        assert everything(again) == seen[-1] != seen[-2]
        return again

    teach(store, 1, OTHER)
    teach(store, 1, SESSION)
    store.experts.add("one", TENANT, new_keys(1), "aa")
    store = restart()
    settle(store, 2)
    settle(store, 3, SESSION)
    store.experts.add("two", OTHER, new_keys(2, n=1), "bb")
    store = restart()
    store.experts.promote("one")
    store = restart()
    settle(store, 4, OTHER, 19)
    settle(store, 5, STRANGER, 19)
    store = restart()
    store.experts.retire("two")
    store = restart()
    events = 4  # of the pool, each in the audit trail beside the versions
    scopes = (TENANT, SESSION, OTHER, STRANGER)
    assert store.verify_audit() == events + sum(len(store.versions(scope)) for scope in scopes)


def test_a_scope_that_was_not_in_memory_is_lifted_when_it_is_read(open_here, teach, settle) -> None:
    teach(open_here(), 1, OTHER)
    store = open_here()
    store.experts.add("extra", TENANT, new_keys(), "cafe")
    store.experts.promote("extra")
    view = store.view(OTHER)
    assert (view.version, view.visible_ids(3)) == (1, None)
    np.testing.assert_array_equal(view.keys_of(3)[NEW_IDS], new_keys()[3])
    for seed in range(3):
        settle(store, seed, OTHER)
    wanted = everything(store)
    assert everything(open_here()) == wanted


def test_rollback_across_an_add_and_a_promote(open_here, teach, settle) -> None:
    store = open_here()
    teach(store, 1)
    old = store.view(TENANT)
    store.experts.add("extra", TENANT, new_keys(), "cafe")
    settle(store, 2)
    settle(store, 3)
    settling = store.view(TENANT)
    store.rollback(TENANT, 1)
    back = store.view(TENANT)
    assert (back.version, back.reason) == (5, "rollback to 1")
    np.testing.assert_array_equal(back.keys_of(3), np.concatenate([old.keys_of(3), new_keys()[3]]))
    np.testing.assert_array_equal(back.usage[3][:BORN], old.usage[3])
    store.rollback(TENANT, 4)
    assert store.view(TENANT).checksum == settling.checksum
    store.experts.promote("extra")
    store.rollback(TENANT, 3)
    promoted = store.view(TENANT)
    np.testing.assert_array_equal(promoted.keys_of(3)[NEW_IDS], settling.keys_of(3)[NEW_IDS])
    np.testing.assert_array_equal(promoted.keys_of(3)[:BORN], old.keys_of(3))
    store.reset(TENANT)
    assert store.view(TENANT).checksum == store.view(TENANT, 0).checksum
    wanted = everything(store)
    assert everything(open_here()) == wanted


def test_snapshot_files_go_on_in_later_generations(open_here, teach, settle, tmp_path) -> None:
    store = open_here()
    teach(store, 1)
    old = store.view(TENANT)
    store.snapshot(TENANT, None, tmp_path / "born.safetensors")
    store.experts.add("extra", TENANT, new_keys(), "cafe")
    settle(store, 2)
    settling = store.view(TENANT)
    store.snapshot(TENANT, None, tmp_path / "settling.safetensors")
    store = open_here()
    for name, wanted in (("settling", settling.keys_of(3)), ("born", [*old.keys_of(3), *new_keys()[3]])):
        store.restore(TENANT, tmp_path / f"{name}.safetensors")
        np.testing.assert_array_equal(store.view(TENANT).keys_of(3), wanted)
        store.restore(OTHER, tmp_path / f"{name}.safetensors")
        other = store.view(OTHER)
        np.testing.assert_array_equal(other.keys_of(3), [*old.keys_of(3), *new_keys()[3]])
        assert other.visible_ids(3).tolist() == list(range(BORN))
    store.experts.promote("extra")
    store.restore(OTHER, tmp_path / "settling.safetensors")
    np.testing.assert_array_equal(store.view(OTHER).keys_of(3)[NEW_IDS], new_keys()[3])
    store.snapshot(OTHER, None, tmp_path / "promoted.safetensors")
    checksum = store.view(OTHER).checksum
    store.reset(OTHER)
    store.restore(OTHER, tmp_path / "promoted.safetensors")
    assert store.view(OTHER).checksum == checksum


def test_a_snapshot_file_of_another_pool_is_refused(open_here, path, tmp_path) -> None:
    store = open_here()
    store.experts.add("extra", TENANT, new_keys(), "cafe")
    store.snapshot(TENANT, None, tmp_path / "keys.safetensors")
    path.unlink()
    store = open_here()
    with pytest.raises(ModelMismatch, match="generation 1 of the expert pool; this store is at 0"):
        store.restore(TENANT, tmp_path / "keys.safetensors")
    store.experts.add("extra", TENANT, new_keys(), "another file")
    with pytest.raises(ModelMismatch, match=r"keys\.safetensors holds keys of pool"):
        store.restore(TENANT, tmp_path / "keys.safetensors")


def test_a_snapshot_file_cannot_smuggle_in_hidden_keys(store, tmp_path) -> None:
    store.experts.add("extra", TENANT, new_keys(), "cafe")
    file = tmp_path / "keys.safetensors"
    store.snapshot(OTHER, None, file)
    hidden = store.view(OTHER).keys_of(3)[NEW_IDS].tobytes()
    data = file.read_bytes()
    assert data.count(hidden) == 1
    file.write_bytes(data.replace(hidden, hidden[:-1] + bytes([hidden[-1] ^ 1])))
    with pytest.raises(InvalidSnapshot, match=r"layers\.3\.keys has moved keys of experts that are hidden"):
        store.restore(OTHER, file)


def test_thinning_keeps_versions_of_every_generation_loadable(open_here, teach, settle) -> None:
    store = open_here(versions_on_disk=4, versions_in_memory=1)
    for seed in range(20):
        teach(store, seed)
    store.experts.add("extra", TENANT, new_keys(), "cafe")
    for seed in range(20):
        settle(store, seed)
    store.experts.promote("extra")
    for seed in range(20):
        settle(store, seed)
    latest = store.view(TENANT).checksum
    store = open_here()
    rows = store.versions(TENANT)
    assert {row.generation for row in rows} == {0, 1, 2}
    assert len(rows) < 30
    assert store.view(TENANT).checksum == rows[0].checksum == latest
    for row in rows:
        view = store.view(TENANT, row.version)
        assert view.visible_ids(3) is None
        assert (view.checksum == row.checksum) == (row.generation == 2)


def test_a_store_from_before_the_pool_goes_on_and_an_unknown_one_is_refused(open_here, path, teach) -> None:
    store = open_here()
    teach(store)
    wanted = everything(store)
    store.close()
    connection = apsw.Connection(str(path))
    connection.execute(
        "ALTER TABLE versions DROP COLUMN generation; DROP TABLE pool_events; DROP TABLE settling"
    )
    connection.pragma("user_version", 1)
    connection.close()
    store = open_here()
    assert everything(store) == wanted
    store.experts.add("extra", TENANT, new_keys(), "cafe")
    wanted = everything(store)
    assert everything(open_here()) == wanted
    open_here().close()
    connection = apsw.Connection(str(path))
    connection.pragma("user_version", 3)
    connection.close()
    with pytest.raises(StoreCorrupted, match="schema version 3; allowed: 1 to 2"):
        open_here()


@pytest.mark.parametrize(
    "edit",
    [
        "UPDATE pool_events SET scope = 'tenant:other'",
        "UPDATE pool_events SET kind = 'retire'",
        "UPDATE pool_events SET rows = x'00'",
        "UPDATE pool_events SET scope = 'nobody'",
        "DELETE FROM pool_events WHERE generation = 1",
    ],
)
def test_an_edited_pool_is_not_believed(open_here, path, edit) -> None:
    store = open_here()
    store.experts.add("extra", TENANT, new_keys(), "cafe")
    store.experts.promote("extra")
    store.close()
    connection = apsw.Connection(str(path))
    connection.execute(edit)
    connection.close()
    with pytest.raises(StoreCorrupted, match="event 1 of the expert pool"):
        open_here()


def test_a_pool_of_layers_that_are_not_plastic_here_is_refused(open_here) -> None:
    open_here(plastic_layers=(3, 5)).experts.add("extra", TENANT, new_keys(layers=(5,)), "cafe")
    with pytest.raises((StoreCorrupted, ModelMismatch)):
        open_here(plastic_layers=(3,))


def test_readers_see_one_generation_or_the_other(open_here, teach, window) -> None:
    store = open_here()
    teach(store, 1)
    teach(store, 1, OTHER)
    done, problems = threading.Event(), []

    def read(scope: ScopeId) -> None:
        last = (0, 0)
        while not done.is_set():
            view = store.view(scope)
            experts = {BORN + ADDED * min(view.generation, 1)}
            shapes = {len(view.keys_of(3)), len(view.usage[3])}
            if shapes != experts or (view.version, view.generation) < last:
                problems.append((view.version, view.generation, shapes, last))
            last = (view.version, view.generation)
            older = store.view(scope, 1)
            if len(older.keys_of(3)) != len(older.usage[3]):
                problems.append(older)

    readers = [threading.Thread(target=read, args=(scope,)) for scope in (TENANT, OTHER)]
    for reader in readers:
        reader.start()
    store.experts.add("extra", TENANT, new_keys(), "cafe")
    for seed in range(5):
        store.submit(window(TENANT, seed, num_experts=BORN + ADDED))
        store.consolidate_once()
    store.experts.promote("extra")
    store.experts.retire("extra")
    done.set()
    for reader in readers:
        reader.join()
    assert problems == []
