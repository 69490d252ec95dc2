"""What becomes of sessions in a store that several replicas share, above the cap: ended for all by the workers."""

import time
from collections.abc import Callable

import pytest
from cluster import SHARDS

from keystore.backends.base import ScopeHead
from keystore.backends.redis_names import shard_of
from keystore.backends.redis_use import SessionUse
from keystore.errors import KeyVersionUnavailable
from keystore.records import ScopeId
from keystore.session_ends import SessionEnds, SessionLimits

TENANT = ScopeId("tenant", "default")
SHARD = shard_of(TENANT, SHARDS)
A, B, C, D = (ScopeId("session", "default", name) for name in "abcd")


def wait_until(condition: Callable[[], object], timeout_s: float = 30.0) -> None:
    deadline_s = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline_s, "it did not happen in time"
        time.sleep(0.005)


@pytest.fixture
def use(redis_client, card) -> SessionUse:
    return SessionUse(redis_client, card.names)


def head(session: ScopeId, taught_at: float) -> ScopeHead:
    return ScopeHead(session, 1, 0, 1, taught_at, 0)


def ends_of(use: SessionUse, shard: int, most: int | None, ttl_s: float = 1e9) -> SessionEnds:
    return SessionEnds(use, shard, SHARDS, SessionLimits(ttl_s, most))


def test_above_the_cap_those_end_that_nobody_taught_or_read_for_longest(use) -> None:
    heads = [ScopeHead(TENANT, 1, 0, 1, 0.0, 0), head(A, 10.0), head(B, 20.0), head(C, 30.0), head(D, 40.0)]
    assert ends_of(use, SHARD, None).due(heads, 50.0) == []
    assert ends_of(use, SHARD, 4).due(heads, 50.0) == []
    assert ends_of(use, SHARD, 2).due(heads, 50.0) == [A, B]
    use.note({A: 35.0, D: 5.0})
    assert ends_of(use, SHARD, 2).due(heads, 50.0) == [B, C]
    use.forget([A])
    assert ends_of(use, SHARD, 2).due(heads, 50.0) == [A, B]


def test_those_that_expire_make_room_already(use) -> None:
    heads = [head(A, 10.0), head(B, 20.0), head(C, 30.0)]
    assert ends_of(use, SHARD, 2, ttl_s=35.0).due(heads, 50.0) == [A]
    assert ends_of(use, SHARD, 1, ttl_s=35.0).due(heads, 50.0) == [A, B]


def test_the_workers_of_all_shards_end_together_what_one_would(use) -> None:
    tenants = "abcdefgh"
    heads = [
        head(ScopeId("session", tenant, f"{number}"), 10.0 * number + place)
        for place, tenant in enumerate(tenants)
        for number in range(1 + place)
    ]
    by_one = SessionEnds(use, 0, 1, SessionLimits(1e9, 17)).due(heads, 1e6)
    assert len(by_one) == len(heads) - 17
    shares = [ends_of(use, shard, 17).due(heads, 1e6) for shard in range(SHARDS)]
    assert sorted(str(each) for share in shares for each in share) == sorted(map(str, by_one))
    left = heads
    for shard in range(SHARDS):  # one after the other, each seeing what the one before has left
        ended = ends_of(use, shard, 17).due(left, 1e6)
        left = [each for each in left if each.scope not in ended]
    assert {each.scope for each in heads} - {each.scope for each in left} == set(by_one)
    assert {each.scope.tenant for each in left} == set(tenants), "nobody's many push others out"


def test_with_discard_the_session_used_longest_ago_ends_on_every_replica(cluster, window, clock) -> None:
    stores = first, second = [cluster.replica(clock=clock) for _ in range(2)]
    cluster.worker(session_ttl_s=4.0, max_sessions=2, session_eviction="discard", clock=clock)
    gone: list[ScopeId] = []
    for store in stores:
        store.news.deleted.add(gone.append)
    for session in (A, B):
        first.submit(window(session))
        wait_until(lambda session=session: all(session in store.scopes() for store in stores))
        clock.now_s += 1.0
    assert second.view(A).version == first.view(A).version == 1
    first.submit(window(C))
    wait_until(lambda: all(store.scopes() == [B, C] for store in stores))
    wait_until(lambda: gone == [A, A])
    for store in stores:
        assert store.view(A).version == 0, "its tenant's"
        with pytest.raises(KeyVersionUnavailable):
            store.view(A, 1)
    second.submit(window(A, seed=1))
    wait_until(lambda: first.view(A).version == 2)  # numbers never come back
    assert first.view(A).tokens == 32


def test_with_save_all_of_them_stay(cluster, window) -> None:
    store, learner = cluster.replica(), cluster.learner(SHARD)
    for session in (A, B, C):
        store.submit(window(session))
    wait_until(lambda: store.counters().waiting_windows == 0)
    assert learner.learn_some() == 3
    assert learner.end_sessions() == []


def test_what_waited_for_a_session_that_was_discarded_teaches_nobody(cluster, window) -> None:
    store, learner = cluster.replica(start=False), cluster.learner(SHARD, most_sessions=1)
    outbox = store.learning._outbox
    for session in (A, B):
        store.submit(window(session))
        outbox.send_waiting()
        assert learner.learn_some() == 1
    store.submit(window(A, seed=1))  # on its keys
    outbox.send_waiting()
    assert learner.end_sessions() == [A]
    store.submit(window(A, seed=2))  # not sent yet when its end is heard of
    store.learning._follower.catch_up()
    assert store.counters().waiting_windows == 0
    assert store.counters().dropped["superseded"] == 1
    assert learner.learn_some() == 1
    assert learner.counters.entries()["superseded"] == 1
    assert store.scopes() == [B]

    time.sleep(0.002)  # what comes in the same millisecond counts as sent before
    store.submit(window(A, seed=3))  # begins it anew
    outbox.send_waiting()
    assert learner.learn_some() == 1
    store.learning._follower.catch_up()
    assert (store.view(A).version, store.view(A).tokens) == (2, 32)
