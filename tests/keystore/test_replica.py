"""Replicas and workers of one Redis, in one process: what is taught anywhere is learned once and seen everywhere."""

import time
from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest
from cluster import LAW, SEAL, SHARDS

from keystore.backends.redis_names import shard_of
from keystore.backends.redis_streams import StatsStream
from keystore.backends.redis_use import SessionUse
from keystore.canary import CanaryRun, Guard, GuardConfig
from keystore.errors import (
    InvalidConfig,
    KeyVersionUnavailable,
    StoreUnavailable,
    VersionConflict,
    WrongGroupState,
)
from keystore.learner_counters import ENTRY_OUTCOMES
from keystore.outbox import MAX_PENDING_ENTRIES
from keystore.records import ScopeId

TENANT, OTHER = ScopeId("tenant", "default"), ScopeId("tenant", "other")
SESSION = ScopeId("session", "default", "abc")


def wait_until(condition: Callable[[], object], timeout_s: float = 30.0) -> None:
    deadline_s = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline_s, "it did not happen in time"
        time.sleep(0.005)


def test_what_one_replica_is_taught_both_have_bit_for_bit(cluster, window) -> None:
    first, second = cluster.replica(), cluster.replica()
    cluster.worker()
    for number in range(1, 4):
        assert (first if number % 2 else second).submit(window(seed=number))
        wait_until(lambda number=number: first.view(TENANT).version == second.view(TENANT).version == number)
    assert first.view(TENANT).tokens == 3 * 32
    for version in range(1, 4):
        views = [store.view(TENANT, version) for store in (first, second)]
        assert views[0].checksum == views[1].checksum
        for layer in (1, 3, 5):
            assert np.array_equal(views[0].keys_of(layer), views[1].keys_of(layer))
    assert first.view(OTHER).version == 0
    assert first.replication().refused == second.replication().refused == 0
    assert first.verify_audit() == 3


def test_duplicates_of_an_entry_teach_once(cluster, window) -> None:
    store = cluster.replica()
    stream = StatsStream(cluster.redis.client(), cluster.card.names, SEAL)
    sent: list[tuple[int, bytes]] = []
    send, outbox = stream.send, store.learning._outbox
    outbox._stream.send = lambda shard, entry: (sent.append((shard, entry)), send(shard, entry))
    for number in range(4):
        store.submit(window(seed=number))
        wait_until(lambda number=number: len(sent) == number + 1)
    for shard, entry in [*sent[::-1], *sent]:
        stream.send(shard, entry)
    worker = cluster.worker()
    wait_until(lambda: store.view(TENANT).tokens == 4 * 32)
    wait_until(lambda: worker.counters.entries()["duplicate"] == 8)
    assert worker.counters.entries()["learned"] == 4
    assert worker.counters.tokens == store.view(TENANT).tokens == 4 * 32
    assert stream.pending(shard_of(TENANT, SHARDS)) == 0


def test_an_entry_whose_arrival_is_uncertain_is_sent_again_and_teaches_once(cluster, window) -> None:
    store, shard = cluster.replica(), shard_of(TENANT, SHARDS)
    sender, sent = store.learning._outbox.sender, []
    stream = sender._stream

    def losing(send: Callable[..., bool | None]) -> Callable[..., bool | None]:
        def send_and_lose_the_answer(*words: object) -> bool | None:
            arrived = send(*words)
            sent.append(words[-1])
            if len(sent) in (1, 2, 4):
                raise StoreUnavailable("the answer is lost")
            return arrived

        return send_and_lose_the_answer

    stream.send = losing(stream.send)
    sender._producers.send_again = losing(sender._producers.send_again)
    for number in range(3):
        store.submit(window(seed=number))
        wait_until(lambda: not store.counters().waiting_windows)
    assert sent[0] == sent[1] == sent[2]
    assert store.replication().resent == len(sent) - 3 == 3
    assert stream.pending(shard) == 6
    worker = cluster.worker()
    wait_until(lambda: store.view(TENANT).tokens == 3 * 32)
    wait_until(lambda: worker.counters.entries()["duplicate"] == 3)
    assert worker.counters.tokens == 3 * 32


def test_a_window_waits_until_it_has_arrived(cluster, window) -> None:
    store, seen = cluster.replica(start=False), list[int]()
    stream = store.learning._outbox._stream

    def looking(act: Callable[..., object]) -> Callable[..., object]:
        def act_and_look(*words: object) -> object:
            done = act(*words)
            seen.append(store.counters().waiting_windows)
            return done

        return act_and_look

    stream.entry, stream.send = looking(stream.entry), looking(stream.send)
    assert store.submit(window())
    assert store.learning._outbox.send_waiting()
    assert seen == [1, 1]
    assert store.counters().waiting_windows == 0


def test_windows_that_move_no_key_are_learned_durably(cluster, window) -> None:
    law = replace(LAW, plasticity_rate=0.0, decay_rate=0.0)
    store = cluster.replica(gravity=law)
    cluster.worker(gravity=law)
    store.submit(window())
    wait_until(lambda: store.view(TENANT).version == 1)
    view = store.view(TENANT)
    assert view.tokens == 32
    assert all(np.array_equal(view.keys_of(layer), store.view(TENANT, 0).keys_of(layer)) for layer in (3, 5))
    assert any(usage.any() for usage in view.usage.values())


def test_a_session_forks_and_is_read_by_a_replica_that_asks_for_it(cluster, window) -> None:
    first, second = cluster.replica(), cluster.replica()
    cluster.worker()
    first.submit(window())
    wait_until(lambda: first.view(TENANT).version == 1)
    first.submit(window(SESSION, seed=1))
    wait_until(lambda: first.view(SESSION).version == 2)
    assert (first.view(SESSION).parent, first.view(SESSION).tokens) == (1, 64)
    wait_until(lambda: SESSION in second.scopes())
    assert second.view(SESSION).checksum == first.view(SESSION).checksum
    assert second.view(TENANT).version == 1
    second.submit(window(SESSION, seed=2))
    wait_until(lambda: first.view(SESSION).version == second.view(SESSION).version == 3)


def test_whoever_waits_is_told_once_the_version_is_at_hand(cluster, window) -> None:
    store = cluster.replica()
    cluster.worker()
    seen: list[int] = []
    for number in range(1, 6):
        store.submit(window(seed=number), done=lambda: seen.append(store.view(TENANT).version))
        wait_until(lambda number=number: len(seen) == number)
    assert seen == [1, 2, 3, 4, 5]
    store.freeze(TENANT)
    stream = store.learning._outbox
    stream.put(window(seed=9), lambda: seen.append(-1))  # as if the freeze had come a moment later
    wait_until(lambda: seen[-1] == -1)
    assert store.view(TENANT).version == 5


def test_consolidating_by_hand_waits_for_the_workers(cluster, window) -> None:
    store = cluster.replica()
    store.submit(window())
    store.submit(window(OTHER))
    cluster.worker()
    assert {(each.scope, each.version) for each in store.consolidate_once()} == {(TENANT, 1), (OTHER, 1)}
    assert store.consolidate_once() == []


def test_while_redis_is_away_everything_is_served_and_nothing_is_lost(cluster, window) -> None:
    first, second = cluster.replica(), cluster.replica()
    worker = cluster.worker()
    first.submit(window())
    first.submit(window(SESSION, seed=1))
    wait_until(lambda: first.view(TENANT).version == second.view(TENANT).version == 1)
    wait_until(lambda: first.view(SESSION).version and SESSION in second.scopes())
    cluster.redis.stop()
    told: list[int] = []
    for number in range(40):
        for store in (first, second):
            assert store.submit(window(seed=number), done=lambda: told.append(1))
            assert store.view(TENANT).version == 1
    wait_until(lambda: first.degraded and second.degraded)
    wait_until(lambda: len(told) == 80)  # nobody waits for it
    assert not first.replication().connected
    assert first.replication().outbox_scopes == 1
    assert first.counters().waiting_windows == 40
    with pytest.raises(StoreUnavailable, match="session:default/abc"):
        second.view(SESSION)
    with pytest.raises(StoreUnavailable):
        first.reset(TENANT)
    cluster.redis.start()
    wait_until(lambda: first.view(TENANT).tokens == second.view(TENANT).tokens == 81 * 32)
    assert first.view(TENANT).checksum == second.view(TENANT).checksum
    wait_until(lambda: not first.degraded and not second.degraded)
    wait_until(lambda: first.counters().waiting_windows == 0)
    assert second.view(SESSION).checksum == first.view(SESSION).checksum
    wait_until(lambda: worker.counters.tokens == 82 * 32)
    assert first.replication().regressions == 0


def test_more_scopes_than_the_outbox_holds_are_dropped_and_counted(cluster, window) -> None:
    store = cluster.replica(capacity=2, start=False)
    taken = [store.submit(window(ScopeId("tenant", name))) for name in "abc"]
    assert taken == [True, True, False]
    assert store.submit(window(ScopeId("tenant", "a"), seed=1))
    assert store.counters().dropped["queue_full"] == 1
    assert store.counters().waiting_windows == 3


def test_a_store_begins_with_the_anchors_while_redis_is_away(cluster, window) -> None:
    cluster.replica().reset(TENANT)
    cluster.redis.stop()
    late = cluster.replica()
    assert late.view(TENANT).version == 0
    assert late.degraded
    assert late.submit(window())
    cluster.redis.start()
    wait_until(lambda: late.view(TENANT).version == 1)
    cluster.worker()
    wait_until(lambda: late.view(TENANT).version == 2)


def test_what_was_taught_before_redis_was_there_is_learned_although_versions_are_found(
    cluster, window
) -> None:
    cluster.replica().reset(TENANT)
    cluster.redis.stop()
    late = cluster.replica(start=False)
    assert late.view(TENANT).version == 0
    assert late.submit(window())
    cluster.redis.start()
    with pytest.raises(VersionConflict):  # after reading what is stored, and before anything is sent
        late.reset(TENANT, if_version=0)
    assert late.view(TENANT).version == 1
    late.learning.start()
    cluster.worker()
    wait_until(lambda: late.view(TENANT).version == 2)


def test_a_change_by_hand_on_any_replica_holds_everywhere(cluster, window) -> None:
    first, second = cluster.replica(), cluster.replica()
    cluster.worker()
    for number in (1, 2):
        first.submit(window(seed=number))
        wait_until(lambda number=number: first.view(TENANT).version == second.view(TENANT).version == number)
    replaced: list[ScopeId] = []
    first.news.replaced.add(replaced.append)
    assert second.rollback(TENANT, 1, if_version=2) == 3
    wait_until(lambda: first.view(TENANT).version == 3)
    wait_until(lambda: replaced == [TENANT])
    assert first.view(TENANT).checksum == second.view(TENANT, 1).checksum
    with pytest.raises(VersionConflict, match="is at version 3, not 2"):
        first.rollback(TENANT, 1, if_version=2)
    first.freeze(TENANT)
    wait_until(lambda: second.is_frozen(TENANT))
    assert not second.submit(window(seed=3))
    first.unfreeze(TENANT)
    wait_until(lambda: second.submit(window(seed=3)))
    wait_until(lambda: first.view(TENANT).version == 4)
    assert first.view(TENANT).tokens == 2 * 32


def test_changes_by_hand_on_both_replicas_at_once_follow_one_another(cluster) -> None:
    first, second = cluster.replica(start=False), cluster.replica(start=False)
    versions = [store.reset(TENANT) for _ in range(4) for store in (first, second)]  # neither has read on
    assert versions == list(range(1, 9))
    with pytest.raises(VersionConflict):
        first.reset(TENANT, if_version=6)


def test_statistics_from_before_a_rollback_are_dropped(cluster, window) -> None:
    store = cluster.replica()
    first_worker = cluster.worker("first")
    store.submit(window(seed=1))
    wait_until(lambda: store.view(TENANT).version == 1)
    first_worker.stop()
    store.submit(window(seed=2))
    store.submit(window(OTHER, seed=2))
    wait_until(lambda: store.counters().waiting_windows == 0)
    store.reset(TENANT)
    worker = cluster.worker("second")
    wait_until(lambda: store.view(OTHER).version == 1)
    wait_until(lambda: worker.counters.entries()["superseded"] == 1)
    store.submit(window(seed=3))
    wait_until(lambda: store.view(TENANT).version == 3)
    assert store.view(TENANT).tokens == 32


def test_a_worker_that_learned_on_replaced_keys_begins_anew(cluster, window) -> None:
    store, learner = cluster.replica(), cluster.learner(shard_of(TENANT, SHARDS))
    store.submit(window(seed=1))
    wait_until(lambda: store.counters().waiting_windows == 0)
    assert learner.learn_some() == 1
    wait_until(lambda: store.view(TENANT).version == 1)
    store.reset(TENANT)
    time.sleep(0.002)  # what comes in the same millisecond counts as sent before
    store.submit(window(seed=2))
    wait_until(lambda: store.counters().waiting_windows == 0)
    assert learner.learn_some() == 0
    assert learner.counters.conflicts == 1
    assert learner.learn_some() == 1
    wait_until(lambda: store.view(TENANT).version == 3)
    assert store.view(TENANT).tokens == 32


def test_a_store_that_went_back_is_followed_back(cluster, window) -> None:
    store = cluster.replica()
    worker = cluster.worker()
    store.submit(window(seed=1))
    wait_until(lambda: store.view(TENANT).version == 1)
    kept = store.view(TENANT)
    replaced: list[ScopeId] = []
    store.news.replaced.add(replaced.append)
    with cluster.redis.older_disk():
        store.submit(window(seed=2))
        wait_until(lambda: store.view(TENANT).version == 2)
        lost = store.view(TENANT)
    wait_until(lambda: store.view(TENANT).version == 1)
    assert store.view(TENANT).checksum == kept.checksum
    assert store.replication().regressions == 1
    wait_until(lambda: replaced == [TENANT])
    with pytest.raises(KeyVersionUnavailable):
        store.view(TENANT, 2)
    store.submit(window(seed=3))
    wait_until(lambda: store.view(TENANT).version == 2)
    assert store.view(TENANT, 2).checksum != lost.checksum
    wait_until(lambda: worker.counters.tokens == 3 * 32)


def test_a_gap_in_the_stream_of_commits_is_closed_from_the_heads(cluster, window) -> None:
    first, late = cluster.replica(), cluster.replica(start=False)
    cluster.worker()
    for number in range(1, 4):
        first.submit(window(seed=number))
        wait_until(lambda number=number: first.view(TENANT).version == number)
    cluster.redis.client().call("XTRIM", cluster.card.names.delta, "MAXLEN", 1)
    heard: list[int] = []
    late.news.published.add(lambda snapshot: heard.append(snapshot.version))
    late.learning.start()
    wait_until(lambda: late.view(TENANT).version == 3)
    assert late.view(TENANT).checksum == first.view(TENANT).checksum
    wait_until(lambda: heard == [3])
    assert late.replication().resyncs == 1


def test_versions_out_of_bounds_are_not_adopted(cluster, window) -> None:
    strict, loose = cluster.replica(gravity=replace(LAW, trust_radius=1e-6)), cluster.replica()
    cluster.worker()
    loose.submit(window())
    wait_until(lambda: loose.view(TENANT).version == 1)
    wait_until(lambda: strict.replication().refused == 1)
    assert strict.view(TENANT).version == 0
    assert "trust" in str(strict.last_error) or "radius" in str(strict.last_error)


def test_above_the_limit_windows_wait_and_are_merged(cluster, window) -> None:
    store = cluster.replica()
    client, shard = cluster.redis.client(), shard_of(TENANT, SHARDS)
    for _ in range(MAX_PENDING_ENTRIES):
        client.call("XADD", cluster.card.names.stats(shard), "*", "window", b"not signed")
    for number in range(5):
        assert store.submit(window(seed=number))
    time.sleep(0.2)
    assert store.counters().waiting_windows == 5
    assert store.replication().outbox_scopes == 1
    worker = cluster.worker()
    wait_until(lambda: store.view(TENANT).tokens == 5 * 32)
    assert store.view(TENANT).version == 1
    entries = dict.fromkeys(ENTRY_OUTCOMES, 0) | {"learned": 1, "refused": MAX_PENDING_ENTRIES}
    wait_until(lambda: worker.counters.entries() == entries)


def test_workers_share_the_shards_and_take_over_from_one_another(cluster, window) -> None:
    store = cluster.replica()
    one = cluster.worker("one")
    wait_until(lambda: len(one.held) == SHARDS)
    two = cluster.worker("two")

    def shared_evenly() -> bool:
        held = one.held
        return len(held) == SHARDS // 2 and sorted([*held, *two.held]) == list(range(SHARDS))

    wait_until(shared_evenly)
    tenants = [ScopeId("tenant", name) for name in "abcdefgh"]
    assert len({shard_of(tenant, SHARDS) for tenant in tenants}) == SHARDS
    for tenant in tenants:
        store.submit(window(tenant))
    wait_until(lambda: all(store.view(tenant).version == 1 for tenant in tenants))
    wait_until(lambda: min(one.counters.tokens, two.counters.tokens) > 0)
    one.stop()
    wait_until(lambda: len(two.held) == SHARDS)
    for tenant in tenants:
        store.submit(window(tenant, seed=1))
    wait_until(lambda: all(store.view(tenant).tokens == 64 for tenant in tenants))


def test_what_does_not_fit_a_shared_store_is_refused(cluster) -> None:
    store = cluster.replica()
    with pytest.raises(WrongGroupState, match="alone"):
        store.experts.add("extra", TENANT, {3: np.ones((1, 8), np.float32)}, "cafe")
    with pytest.raises(InvalidConfig, match="shards"):
        cluster.replica(shards=SHARDS + 1)


def test_a_session_lives_while_any_replica_reads_it_and_ends_for_all(cluster, window, clock) -> None:
    stores = first, second = [cluster.replica(session_ttl_s=4.0, clock=clock) for _ in range(2)]
    cluster.worker(session_ttl_s=4.0, clock=clock)
    left = ScopeId("session", "default", "left")
    for session in (SESSION, left):
        first.submit(window(session))
    wait_until(lambda: all({SESSION, left} <= set(store.scopes()) for store in stores))
    gone: list[ScopeId] = []
    second.news.deleted.add(gone.append)

    clock.now_s += 1.5
    read_at = clock.now_s
    assert second.view(SESSION).version == 1
    clock.now_s += 1.5  # time to tell that it was read
    use = SessionUse(cluster.redis.client(), cluster.card.names)
    wait_until(lambda: use.of([SESSION]) == {SESSION: read_at})
    clock.now_s += 1.5
    wait_until(lambda: all(store.scopes() == [SESSION] for store in stores))
    wait_until(lambda: gone == [left])
    clock.now_s += 1.5
    wait_until(lambda: not first.scopes() and not second.scopes())
    first.submit(window(SESSION, seed=2))
    wait_until(lambda: second.view(SESSION).version == 2)  # numbers never come back


class Probe:
    """Finds that tenants' keys are as good as the anchors, until told otherwise."""

    def __init__(self) -> None:
        self.harm, self.seen = 0.0, []

    def run(self, view) -> CanaryRun:
        self.seen.append((view.scope, view.version))
        loss = 1.0 + (self.harm if view.version else 0.0)
        return CanaryRun(loss, {layer: np.zeros((4, 2), np.int64) for layer in (3, 5)})


def test_one_replica_judges_a_tenants_version_and_takes_back_one_that_fails(cluster, window) -> None:
    probes = Probe(), Probe()
    config = GuardConfig(tenant_every_versions=2)
    first, second = (cluster.replica(guard=Guard(probe, config)) for probe in probes)
    cluster.worker()

    def judged() -> list[int]:
        return [version for probe in probes for scope, version in probe.seen if scope == TENANT and version]

    for number in range(1, 4):
        first.submit(window(seed=number))
        wait_until(lambda number=number: first.view(TENANT).version == number)
    wait_until(lambda: judged() == [2])
    wait_until(lambda: any(event["event"] == "canary" for event in first.audit_trail(TENANT, 10)))
    wait_until(lambda: second.view(TENANT).version == 3)
    wait_until(lambda: not any(store.learning._canary._waiting for store in (first, second)))
    cluster.redis.client().call("DEL", cluster.card.names.canary(TENANT))  # as if a minute had passed
    for probe in probes:
        probe.harm = 0.1
    first.submit(window(seed=4))
    wait_until(lambda: first.view(TENANT).version == second.view(TENANT).version == 5)
    assert first.view(TENANT).reason.startswith("rollback to 2: canary loss +10.00 %")
    assert first.view(TENANT).checksum == second.view(TENANT, 2).checksum
    assert sorted(judged()) == [2, 4]
    wait_until(lambda: sum(store.counters().rollbacks["canary"] for store in (first, second)) == 1)
