"""The global scope in a store that several replicas share: learned by one of them, and judged before anybody has it."""

import threading
import time
from collections.abc import Callable
from uuid import uuid4

import numpy as np
import pytest
from cluster import SEAL, SHARDS

from keystore.backends.redis_lease import Leases
from keystore.backends.redis_names import GLOBAL_SHARD, shard_of
from keystore.backends.redis_streams import StatsStream
from keystore.backends.stats_blob import SentWindow
from keystore.canary import CanaryRun, Guard, GuardConfig
from keystore.records import ScopeId
from keystore.store import KeyStore

GLOBAL, TENANT = ScopeId("global"), ScopeId("tenant", "default")


def wait_until(condition: Callable[[], object], timeout_s: float = 30.0) -> None:
    deadline_s = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline_s, "it did not happen in time"
        time.sleep(0.005)


class Probe:
    """Finds that everything is as good as the anchors, until told otherwise."""

    def __init__(self) -> None:
        self.harm, self.seen = 0.0, list[int]()
        self.free = threading.Event()
        self.free.set()

    def run(self, view) -> CanaryRun:
        self.seen.append(view.version)
        assert self.free.wait(30.0)
        loss = 1.0 + (self.harm if view.version else 0.0)
        return CanaryRun(loss, {layer: np.zeros((4, 2), np.int64) for layer in (3, 5)})


@pytest.fixture
def probe() -> Probe:
    return Probe()


@pytest.fixture
def pair(cluster, probe) -> tuple[KeyStore, KeyStore]:
    """Two replicas that would both learn the global scope."""
    first, second = (cluster.replica(learn_global=True, guard=Guard(probe, GuardConfig())) for _ in range(2))
    return first, second


def versions(pair: tuple[KeyStore, KeyStore]) -> list[int]:
    return [store.view(GLOBAL).version for store in pair]


def counted(pair: tuple[KeyStore, KeyStore], outcome: str) -> int:
    return sum(store.counters().updates[outcome] for store in pair)


def test_what_passes_the_canary_all_have_and_what_fails_nobody(pair, probe, window) -> None:
    first, second = pair
    assert first.submit(window(GLOBAL, seed=1))
    wait_until(lambda: versions(pair) == [1, 1])
    assert first.view(GLOBAL).checksum == second.view(GLOBAL).checksum
    assert first.view(GLOBAL).reason == "learned from 32 tokens; canary loss +0.00 %, overlap 1.000"
    probe.harm = 0.1
    assert second.submit(window(GLOBAL, seed=2))
    wait_until(lambda: counted(pair, "guard_rejected") == 1)
    assert versions(pair) == [1, 1]
    probe.harm = 0.0
    assert second.submit(window(GLOBAL, seed=3))
    wait_until(lambda: versions(pair) == [2, 2])
    assert first.view(GLOBAL).tokens == second.view(GLOBAL).tokens == 64
    wait_until(lambda: counted(pair, "published") == 2)
    events = [event for event in first.audit_trail(GLOBAL, 10) if event["event"] == "canary"]
    assert [(event["version"], event["passed"]) for event in events] == [(2, True), (2, False), (1, True)]
    assert not any(store.degraded for store in pair)


def test_nobody_has_a_version_while_it_is_judged(pair, probe, window) -> None:
    probe.free.clear()
    assert pair[0].submit(window(GLOBAL))
    wait_until(lambda: probe.seen)
    assert versions(pair) == [0, 0]
    assert [store.versions(GLOBAL) for store in pair] == [[], []]
    probe.free.set()
    wait_until(lambda: versions(pair) == [1, 1])


def test_consolidating_by_hand_waits_for_the_verdict(pair, window) -> None:
    assert pair[1].submit(window(GLOBAL))
    assert [(each.scope, each.version) for each in pair[1].consolidate_once()] == [(GLOBAL, 1)]


def test_an_unjudged_version_that_was_learned_on_is_judged_when_that_fails(pair, probe, window) -> None:
    first, second = pair
    assert first.submit(window(GLOBAL, seed=1))
    wait_until(lambda: versions(pair) == [1, 1])
    kept = first.view(GLOBAL)
    assert second.rollback(GLOBAL, 0) == 2
    wait_until(lambda: versions(pair) == [2, 2])
    probe.harm = 0.1
    time.sleep(0.002)  # what comes in the same millisecond counts as sent before
    assert first.submit(window(GLOBAL, seed=2))
    wait_until(lambda: versions(pair) == [3, 3])
    assert first.view(GLOBAL).reason.startswith("rollback to 1: canary loss +10.00 %")
    assert second.view(GLOBAL).checksum == kept.checksum
    wait_until(lambda: sum(store.counters().rollbacks["canary"] for store in pair) == 1)
    wait_until(lambda: counted(pair, "guard_rejected") == 1)


def test_workers_leave_it_alone_and_a_replica_takes_over_from_another(cluster, probe, window) -> None:
    plain = cluster.replica()
    cluster.worker()
    plain.submit(window(GLOBAL))
    plain.submit(window(TENANT))
    wait_until(lambda: plain.view(TENANT).version == 1)
    assert plain.view(GLOBAL).version == 0
    stores = [cluster.replica(learn_global=True, guard=Guard(probe, GuardConfig())) for _ in range(2)]
    wait_until(lambda: plain.view(GLOBAL).version == 1)
    wait_until(lambda: sum(store.counters().updates["published"] for store in stores) == 1)
    stores.sort(key=lambda store: store.counters().updates["published"])
    stores[1].learning.stop()
    plain.submit(window(GLOBAL, seed=1))
    wait_until(lambda: plain.view(GLOBAL).version == 2)
    assert plain.view(GLOBAL).tokens == 64


def test_who_has_lost_the_lease_stores_nothing(cluster, probe, window, redis_client, card) -> None:
    store = cluster.replica(learn_global=True, guard=Guard(probe, GuardConfig()))
    probe.free.clear()
    store.submit(window(GLOBAL))
    wait_until(lambda: probe.seen)
    redis_client.call("DEL", card.names.lease(GLOBAL_SHARD))  # as if the probe had taken a minute
    taken = Leases(redis_client, card.names, "another", ttl_ms=600_000).take(GLOBAL_SHARD)
    probe.free.set()
    wait_until(lambda: store.learning._global.counters.fenced == 1)
    assert store.view(GLOBAL).version == 0
    assert store.versions(GLOBAL) == []
    Leases(redis_client, card.names, "another").release(taken)
    wait_until(lambda: store.view(GLOBAL).version == 1)
    assert store.view(GLOBAL).tokens == 32


def test_a_probe_that_fails_is_seen_and_nothing_is_lost(cluster, window) -> None:
    class Failing(Probe):
        def run(self, view) -> CanaryRun:
            if self.harm:
                raise RuntimeError("out of memory")
            return super().run(view)

    probe = Failing()
    probe.harm = 1.0
    store = cluster.replica(learn_global=True, guard=Guard(probe, GuardConfig()))
    store.submit(window(GLOBAL))
    wait_until(lambda: str(store.last_error) == "out of memory")
    assert store.counters().updates["failed"] >= 1
    probe.harm = 0.0
    wait_until(lambda: store.view(GLOBAL).version == 1)
    wait_until(lambda: not store.degraded)


def test_without_a_guard_nothing_is_judged(cluster, window) -> None:
    store = cluster.replica(learn_global=True)
    store.submit(window(GLOBAL))
    wait_until(lambda: store.view(GLOBAL).version == 1)
    assert store.view(GLOBAL).reason == "learned from 32 tokens"


def test_only_the_global_shard_teaches_the_global_scope(cluster, window, redis_client, card) -> None:
    assert shard_of(GLOBAL, SHARDS) == GLOBAL_SHARD
    assert card.names.stats(GLOBAL_SHARD).endswith(":stats:global")
    store = cluster.replica(start=False)
    stream = StatsStream(redis_client, card.names, SEAL)
    for shard, scope in ((0, GLOBAL), (GLOBAL_SHARD, TENANT)):
        stream.send(shard, stream.entry(shard, SentWindow(uuid4(), 1, window(scope))))
        learner = cluster.learner(shard)
        assert learner.learn_some() == 1
        assert learner.counters.entries()["refused"] == 1
    store.learning._follower.catch_up()
    assert store.scopes() == []
