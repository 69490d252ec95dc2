import gc
import weakref

import apsw
import numpy as np
import pytest

from keystore.errors import InvalidConfig, InvalidStatistics, KeyVersionUnavailable, VersionConflict
from keystore.records import GravityConfig, ScopeId
from keystore.statistics import LayerStats, RoutingStats

TENANT, OTHER = ScopeId("tenant", "default"), ScopeId("tenant", "other")
SESSION = ScopeId("session", "default", "abc")


def bits(snapshot) -> list[bytes]:
    return [snapshot.keys_of(layer).tobytes() for layer in (1, 3, 5)]


def test_a_new_store_serves_the_anchors(store) -> None:
    view = store.view(TENANT)
    assert (view.version, view.parent, view.tokens) == (0, None, 0)
    np.testing.assert_array_equal(view.search(3, view.keys_of(3), 1)[1].shape, (16, 1))
    assert bits(store.view(SESSION)) == bits(view)
    with pytest.raises(ValueError, match="read-only"):
        view.keys_of(3)[0] = 0


def test_a_window_becomes_the_next_version_and_leaves_the_last_untouched(store, teach) -> None:
    before = store.view(TENANT)
    old = bits(before)
    teach(store)
    after = store.view(TENANT)
    assert (after.version, after.parent, after.tokens) == (1, 0, 32)
    assert bits(before) == old != bits(after)
    assert after.keys_of(1) is before.keys_of(1), "an unchanged layer shares its memory"
    assert bits(store.view(OTHER)) == old, "another scope sees nothing"


def test_each_window_is_its_own_version_however_they_are_drained(open_here, window, tmp_path) -> None:
    store = open_here()
    for seed in range(5):
        store.submit(window(seed=seed))
    together = [snapshot.checksum for snapshot in store.consolidate_once()]
    store.reset(TENANT)
    apart = []
    for seed in range(5):
        store.submit(window(seed=seed))
        apart += [snapshot.checksum for snapshot in store.consolidate_once()]
    assert apart == together
    assert store.view(TENANT).version == 11


def test_no_events_and_no_rates_make_no_version(open_here, window) -> None:
    store = open_here(GravityConfig(plasticity_rate=0.0))
    assert store.consolidate_once() == []
    store.submit(window())
    assert store.consolidate_once() == []
    assert store.view(TENANT).version == 0
    assert store.counters().updates["unchanged"] == 1


def test_usage_of_a_window_without_movement_counts_for_the_next(open_here, window) -> None:
    def silent(stats: RoutingStats) -> RoutingStats:
        layers = {
            layer: LayerStats(sums.events, sums.credited, 0 * sums.weighted_queries, 0 * sums.weights, None)
            for layer, sums in stats.layers.items()
        }
        return RoutingStats(stats.scope, stats.tokens, layers)

    store = open_here()
    store.submit(silent(window(seed=1)))
    store.submit(window(seed=2))
    (published,) = store.consolidate_once()
    assert (published.version, published.tokens) == (1, 64)


def test_frozen_store_keeps_keys_bit_identical(open_here, window, teach) -> None:
    store = open_here()
    teach(store)
    before = bits(store.view(TENANT))
    store.submit(window(seed=1))
    store.freeze()
    assert not store.submit(window(seed=2))
    assert store.consolidate_once() == []
    store = open_here()
    assert store.is_frozen()
    assert store.is_frozen(TENANT)
    assert not store.submit(window(seed=2))
    assert bits(store.view(TENANT)) == before
    assert store.counters().dropped["frozen"] == 1
    store.unfreeze()
    teach(store, 3)


def test_freezing_a_tenant_freezes_its_sessions_and_nobody_else(store, window) -> None:
    store.freeze(TENANT)
    assert [store.is_frozen(scope) for scope in (None, TENANT, SESSION, OTHER)] == [False, True, True, False]
    assert store.submit(window(OTHER))
    assert not store.submit(window(SESSION))


def test_rollback_brings_back_content_and_usage_under_a_new_number(store, teach) -> None:
    teach(store, 1)
    wanted = store.view(TENANT)
    teach(store, 2)
    assert store.rollback(TENANT, 1, if_version=2) == 3
    now = store.view(TENANT)
    assert (now.version, now.parent, now.reason) == (3, 2, "rollback to 1")
    assert (bits(now), now.checksum) == (bits(wanted), wanted.checksum)
    assert all(np.array_equal(now.usage[layer], wanted.usage[layer]) for layer in (3, 5))


def test_rollback_drops_windows_that_wait(store, window, teach) -> None:
    teach(store, 1)
    store.submit(window(seed=2))
    store.submit(window(OTHER, seed=2))
    store.rollback(TENANT, 0)
    assert [snapshot.scope for snapshot in store.consolidate_once()] == [OTHER]
    assert store.counters().dropped["superseded"] == 1


def test_rollback_refuses_unknown_versions_and_moved_heads(store, teach) -> None:
    teach(store)
    with pytest.raises(VersionConflict):
        store.rollback(TENANT, 0, if_version=0)
    with pytest.raises(KeyVersionUnavailable):
        store.rollback(TENANT, 9)
    assert store.view(TENANT).version == 1


def test_reset_returns_to_the_anchors(store, teach) -> None:
    anchors = store.view(TENANT)
    teach(store)
    assert store.reset(TENANT) == 2
    assert store.view(TENANT).checksum == anchors.checksum
    assert store.versions(TENANT)[0].reason == "reset to the anchors"


def test_a_full_queue_drops_and_counts_without_blocking(open_here, window) -> None:
    store = open_here(queue_size=2)
    assert [store.submit(window(seed=seed)) for seed in range(4)] == [True, True, False, False]
    assert store.counters().dropped["queue_full"] == 2
    assert len(store.consolidate_once()) == 2


def test_statistics_that_are_not_finite_are_dropped_and_counted(store, window) -> None:
    stats = window()
    stats.layers[3].weighted_queries[0, 0] = np.nan
    assert not store.submit(stats)
    assert store.counters().dropped["non_finite"] == 1


def test_statistics_that_do_not_fit_are_the_callers_error(store, window) -> None:
    stats = window()
    with pytest.raises(InvalidStatistics, match="layers"):
        store.submit(RoutingStats(TENANT, 32, {1: stats.layers[3]}))
    sums = stats.layers[3]
    small = LayerStats(sums.events[:4], sums.credited[:4], sums.weighted_queries[:4], sums.weights[:4], None)
    with pytest.raises(InvalidStatistics, match="layer 3"):
        store.submit(RoutingStats(TENANT, 32, {3: small}))


def test_bonding_needs_and_uses_coactivation(open_here, window) -> None:
    store = open_here(GravityConfig(bonding_rate=0.05))
    with pytest.raises(InvalidStatistics, match="coactivation"):
        store.submit(window())


def test_a_session_forks_from_its_tenant_and_then_goes_its_own_way(store, teach) -> None:
    teach(store, 1)
    fork = store.view(TENANT)
    assert store.view(SESSION) is fork
    teach(store, 2, SESSION)
    own = store.view(SESSION)
    assert (own.scope, own.version, own.parent) == (SESSION, 2, 1)
    assert "forked from tenant:default version 1" in own.reason
    teach(store, 3)
    assert store.view(SESSION) is own
    assert store.view(TENANT).version == 2
    assert store.view(SESSION, 1) is fork
    assert store.view(SESSION, 0).checksum == store.view(TENANT, 0).checksum
    assert store.view(SESSION, 2) is own
    with pytest.raises(KeyVersionUnavailable):
        store.view(SESSION, 3)


def test_idle_sessions_expire_durably_and_never_reuse_a_number(open_here, clock, teach) -> None:
    store = open_here(clock=clock, session_ttl_s=100)
    teach(store, 1, SESSION)
    clock.now_s += 90
    store.view(SESSION)
    clock.now_s += 90
    assert store.learning.expire_sessions(clock.now_s) == []
    assert store.learning.expire_sessions(clock.now_s + 11) == [SESSION]
    store = open_here(clock=clock)
    assert store.scopes() == []
    assert store.view(SESSION).version == 0
    teach(store, 2, SESSION)
    assert store.view(SESSION).version == 2, "version 1 belonged to the expired session"


def test_sessions_over_the_cap_leave_memory_but_not_the_disk(open_here, teach) -> None:
    store = open_here(max_sessions=2)
    sessions = [ScopeId("session", "default", name) for name in "abcd"]
    for seed, session in enumerate(sessions):
        teach(store, seed, session)
    assert store.counters().live_sessions == 2
    checksums = [store.view(session).checksum for session in sessions]
    assert len(set(checksums)) == 4
    assert all(store.view(session).version == 1 for session in sessions)


def test_old_versions_leave_memory_unless_pinned_and_load_again_from_disk(open_here, teach) -> None:
    store = open_here(versions_in_memory=2)
    teach(store, 0)
    pinned, loose = store.view(TENANT), None
    teach(store, 1)
    loose = weakref.ref(store.view(TENANT))
    wanted = bits(loose())
    for seed in range(2, 6):
        teach(store, seed)
    gc.collect()
    assert loose() is None
    assert store.view(TENANT, 1) is pinned
    assert bits(store.view(TENANT, 2)) == wanted


def test_restart_continues_at_the_last_version_with_identical_keys(open_here, teach) -> None:
    store = open_here()
    for seed in range(20):
        teach(store, seed)
    before = [
        (store.view(TENANT, version).checksum, bits(store.view(TENANT, version))) for version in range(21)
    ]
    store = open_here()
    assert store.view(TENANT).version == 20
    after = [
        (store.view(TENANT, version).checksum, bits(store.view(TENANT, version))) for version in range(21)
    ]
    assert after == before
    teach(store, 20)
    assert store.view(TENANT).version == 21
    assert store.verify_audit() == 21


def test_same_events_same_checksum(open_here, window, tmp_path) -> None:
    checksums = []
    for _ in range(2):
        store = open_here()
        store.reset(TENANT)
        for seed in range(4):
            store.submit(window(seed=seed))
        checksums.append([snapshot.checksum for snapshot in store.consolidate_once()])
    assert checksums[0] == checksums[1]


def test_versions_are_listed_newest_first_with_their_drift(store, teach) -> None:
    for seed in range(3):
        teach(store, seed)
    rows = store.versions(TENANT)
    assert [(row.version, row.parent, row.tokens) for row in rows] == [(3, 2, 96), (2, 1, 64), (1, 0, 32)]
    assert all(0 < row.drift_mean <= row.drift_max <= 1 for row in rows)
    assert store.scopes() == [TENANT]


def test_subscribers_hear_of_every_version_and_one_that_fails_harms_nobody(store, teach, caplog) -> None:
    heard = []

    def fail(snapshot) -> None:
        raise RuntimeError("subscriber bug")

    store.news.published.add(fail)
    unsubscribe = store.news.published.add(
        lambda snapshot: heard.append((snapshot.version, store.view(TENANT).version))
    )
    teach(store, 1)
    store.reset(TENANT)
    unsubscribe()
    teach(store, 2)
    assert heard == [(1, 1), (2, 2)]
    assert store.counters().subscriber_failures == 3
    assert "subscriber failed" in caplog.text


def test_settings_that_make_no_sense_are_refused(open_here) -> None:
    for wrong in ({"plastic_layers": (2,)}, {"queue_size": 0}, {"session_ttl_s": -1}):
        with pytest.raises(InvalidConfig):
            open_here(**wrong)


def test_a_scope_that_cannot_be_read_does_not_stop_the_others_from_learning(
    open_here, path, window, teach
) -> None:
    teach(open_here())
    connection = apsw.Connection(str(path))
    connection.execute("UPDATE versions SET changes = x'00'")
    connection.close()
    store = open_here()
    store.submit(window())
    store.submit(window(OTHER))
    assert [snapshot.scope for snapshot in store.consolidate_once()] == [OTHER]
    assert store.counters().updates["rejected"] == 1


def test_who_gathers_for_a_scope_hears_when_its_keys_are_replaced(store, teach, tmp_path, caplog) -> None:
    replaced: list[tuple[ScopeId, int]] = []

    def fail(scope: ScopeId) -> None:
        raise RuntimeError(scope)

    store.news.replaced.add(fail)
    end = store.news.replaced.add(lambda scope: replaced.append((scope, store.view(scope).version)))
    teach(store, 1)
    teach(store, 2, SESSION)
    store.snapshot(TENANT, None, tmp_path / "keys.safetensors")
    assert replaced == [], "learning replaces nothing"
    store.rollback(SESSION, 1)
    store.reset(TENANT)
    store.restore(TENANT, tmp_path / "keys.safetensors")
    assert replaced == [(SESSION, 3), (TENANT, 2), (TENANT, 3)]
    assert store.counters().subscriber_failures == 3
    assert "subscriber failed" in caplog.text
    end()
    store.reset(TENANT)
    assert len(replaced) == 3
