"""Redis came back with an older log, or lost what somebody had read: readers and workers notice."""

from uuid import UUID

import numpy as np
import pytest

from keystore.backends.base import RowChanges, VersionRecord, VersionRow
from keystore.backends.redis import RedisBackend
from keystore.backends.redis_client import RedisClient
from keystore.backends.redis_journal import Position
from keystore.backends.redis_lease import Leases
from keystore.backends.redis_leased import LeasedBackend
from keystore.backends.redis_seal import Seal
from keystore.backends.redis_streams import DeltaStream, StatsStream
from keystore.backends.redis_use import SessionUse
from keystore.backends.stats_blob import SentWindow
from keystore.errors import FellBehind, StoreRegressed
from keystore.learner_counters import LearnerCounters
from keystore.records import GravityConfig, ScopeId
from keystore.session_ends import SessionEnds, SessionLimits
from keystore.shard_learner import ShardLearner
from keystore.shelf import ShelfLimits

TENANT = ScopeId("tenant", "default")


def record(version: int, value: float = 1.0) -> VersionRecord:
    row = VersionRow(TENANT, version, version - 1, 1e6, 32 * version, 0.5, 0.1, f"{value}", "learned", 0)
    rows = RowChanges(np.array([1]), np.full((1, 8), value, np.float32))
    return VersionRecord(row, version == 1, {3: rows}, {3: np.ones(16, np.float32)})


@pytest.fixture
def deltas(redis_client, card) -> DeltaStream:
    return DeltaStream(redis_client, card.names, Seal())


@pytest.mark.parametrize("commits_since", [0, 1, 2, 3])
def test_a_reader_notices_when_the_store_has_lost_what_it_has_seen(
    redis_server, redis_client, card, deltas, commits_since
) -> None:
    backend = RedisBackend(redis_client, card.names)
    backend.commit([record(1)])
    with redis_server.older_disk():
        backend.commit([record(2, 1.0)])
        backend.commit([record(3, 1.0)])
        (*_, seen) = deltas.read(Position())
        assert seen.position.sequence == 3
    for version in range(2, 2 + commits_since):
        backend.commit([record(version, 2.0)])
    with pytest.raises(StoreRegressed):
        deltas.read(seen.position)
    again = deltas.read(Position())
    assert len(again) == deltas.position().sequence == 1 + commits_since


def test_a_store_that_was_emptied_is_another_one(redis_client, card, deltas) -> None:
    backend = RedisBackend(redis_client, card.names)
    backend.commit([record(1)])
    (seen,) = deltas.read(Position())
    redis_client.call("FLUSHALL")
    with pytest.raises(StoreRegressed):
        deltas.read(seen.position)


def test_a_reader_that_slept_too_long_is_sent_to_the_heads(redis_client, card, deltas) -> None:
    backend = RedisBackend(redis_client, card.names)
    for version in range(1, 6):
        backend.commit([record(version)])
    redis_client.call("XTRIM", card.names.delta, "MAXLEN", 2)
    with pytest.raises(FellBehind, match="1 to 3"):
        deltas.read(Position())
    assert [
        delta.position.sequence for delta in deltas.read(Position(3, _hash_after(redis_client, card, 3)))
    ] == [4, 5]


def _hash_after(client: RedisClient, card, sequence: int) -> str:
    ((_, fields),) = client.call("XRANGE", card.names.delta, f"{sequence + 1}-0", f"{sequence + 1}-0")
    return fields[b"before"].decode()


@pytest.mark.parametrize("commits_since", [0, 1, 2, 3])
def test_a_worker_notices_once_that_the_store_has_lost_what_it_goes_on_from(
    redis_server, redis_client, card, commits_since
) -> None:
    admin, lease = (
        RedisBackend(redis_client, card.names),
        Leases(redis_client, card.names, "first", ttl_ms=600_000).take(0),
    )
    backend = LeasedBackend(redis_client, card.names, lease, seal=Seal(), shards=8)
    backend.commit([record(1)])
    backend.heads()
    with redis_server.older_disk():
        backend.commit([record(2, 1.0)])
        backend.commit([record(3, 1.0)])
    for version in range(2, 2 + commits_since):
        admin.commit([record(version, 2.0)])
    following = record(2 + commits_since, 2.0)
    with pytest.raises(StoreRegressed):
        backend.commit([following])
    assert backend.verify_audit() == 1 + commits_since
    backend.heads()
    backend.commit([following])
    assert backend.heads()[0].version == 2 + commits_since


def test_commits_of_others_in_between_are_no_regression(redis_client, card) -> None:
    admin, lease = (
        RedisBackend(redis_client, card.names),
        Leases(redis_client, card.names, "first", ttl_ms=600_000).take(0),
    )
    backend = LeasedBackend(redis_client, card.names, lease, seal=Seal(), shards=8)
    backend.heads()
    for version in range(1, 9, 2):
        admin.commit([record(version)])
        backend.commit([record(version + 1)])
        backend.consume()
    assert backend.verify_audit() == 8


def test_what_the_store_has_lost_is_learned_again(redis_server, redis_client, card, store_on, window) -> None:
    gravity, lease = GravityConfig(), Leases(redis_client, card.names, "first", ttl_ms=600_000).take(0)
    store = store_on(RedisBackend(redis_client, card.names, card=card), gravity)
    stream = StatsStream(redis_client, card.names, Seal())
    learner = ShardLearner(
        0,
        LeasedBackend(redis_client, card.names, lease, seal=Seal(), shards=8),
        stream,
        store.view(ScopeId("anchor")),
        gravity,
        card.num_experts_per_tok,
        LearnerCounters(),
        ends=SessionEnds(SessionUse(redis_client, card.names), 0, 8, SessionLimits(1e6, most=None)),
        limits=ShelfLimits(1, 16),
        versions_on_disk=8,
    )
    for sequence in (1, 2):
        stream.send(0, stream.entry(0, SentWindow(UUID(int=1), sequence, window(seed=sequence))))
        if sequence == 1:
            assert learner.learn_some() == 1
    with redis_server.older_disk():
        assert learner.learn_some() == 1
        assert store_on(RedisBackend(redis_client, card.names), gravity).view(TENANT).tokens == 64
    assert stream.pending(0) == 1
    with pytest.raises(StoreRegressed):
        learner.learn_some()
    assert learner.learn_some() == 1
    assert stream.pending(0) == 0
    assert store_on(RedisBackend(redis_client, card.names), gravity).view(TENANT).tokens == 64
