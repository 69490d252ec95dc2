"""One writer a shard: who holds a lease, and that nobody commits without one that holds."""

from collections.abc import Callable, Iterator

import numpy as np
import pytest

from keystore.backends.base import RowChanges, VersionRecord, VersionRow
from keystore.backends.redis import RedisBackend
from keystore.backends.redis_client import Transaction
from keystore.backends.redis_lease import Lease, Leases
from keystore.backends.redis_leased import LeasedBackend, Receipt
from keystore.backends.redis_seal import Seal
from keystore.errors import Fenced, StoreUnavailable, VersionConflict
from keystore.records import ScopeId

TENANT = ScopeId("tenant", "default")


def record(version: int) -> VersionRecord:
    row = VersionRow(TENANT, version, version - 1, 1e6, 32 * version, 0.5, 0.1, "c", "learned", 0)
    rows = RowChanges(np.array([1]), np.full((1, 8), version, np.float32))
    return VersionRecord(row, version == 1, {3: rows}, {3: np.ones(16, np.float32)})


@pytest.fixture
def leases_of(redis_client, card) -> Callable[[str], Leases]:
    return lambda worker: Leases(redis_client, card.names, worker, ttl_ms=600_000)


@pytest.fixture
def backend_of(redis_client, card) -> Callable[[Lease], LeasedBackend]:
    return lambda lease: LeasedBackend(redis_client, card.names, lease, seal=Seal(), shards=8)


@pytest.fixture
def end_lease(redis_client, card) -> Callable[[int], None]:
    """Its time is up, as for a worker that was stopped for longer."""
    return lambda shard: redis_client.call("PEXPIRE", card.names.lease(shard), 0)


def test_a_shard_has_one_holder_until_its_time_is_up(leases_of, end_lease) -> None:
    first, second = leases_of("first"), leases_of("second")
    lease = first.take(3)
    assert lease == Lease(3, "first", 1)
    assert second.take(3) is None
    assert second.take(4) == Lease(4, "second", 1), "another shard is free"
    assert first.holders(5) == [None, None, None, "first", "second"]
    first.renew(lease)
    end_lease(3)
    assert second.take(3) == Lease(3, "second", 2)
    for late in (first.renew, first.release):
        with pytest.raises(Fenced):
            late(lease)
    assert first.holders(4)[3] == "second"


def test_a_lease_ends_by_itself(redis_client, card) -> None:
    leases = Leases(redis_client, card.names, "first", ttl_ms=1)
    lease = leases.take(0)
    waiting = Leases(redis_client, card.names, "second")
    while (taken := waiting.take(0)) is None:
        pass
    assert taken.epoch == lease.epoch + 1


def test_a_released_shard_is_free_and_the_number_goes_on(leases_of) -> None:
    first, second = leases_of("first"), leases_of("second")
    first.release(first.take(0))
    assert second.take(0) == Lease(0, "second", 2)


def test_taking_twice_makes_the_first_lease_late(leases_of, backend_of) -> None:
    leases = leases_of("first")
    before, after = leases.take(0), leases.take(0)
    with pytest.raises(Fenced):
        backend_of(before).commit([record(1)])
    backend_of(after).commit([record(1)])


def test_workers_see_each_other_and_forget_who_is_gone(leases_of, redis_client, card) -> None:
    first, second = leases_of("first"), leases_of("second")
    assert [first.sign_in(), second.sign_in(), first.sign_in()] == [1, 2, 2]
    second.sign_out()
    assert first.sign_in() == 1
    redis_client.call("ZADD", card.names.workers, 1, "died long ago")
    assert first.sign_in() == 1


@pytest.fixture
def held(leases_of, backend_of, end_lease) -> Iterator[LeasedBackend]:
    """A worker's backend, with one version committed."""
    backend = backend_of(leases_of("first").take(0))
    backend.commit([record(1)])
    return backend


@pytest.mark.parametrize("somebody_took_it", [False, True])
def test_a_worker_that_wakes_past_its_lease_commits_nothing(
    held, leases_of, end_lease, redis_client, card, somebody_took_it
) -> None:
    entry = redis_client.call("XADD", card.names.stats(0), "*", "window", b"unlearned")
    end_lease(0)
    if somebody_took_it:
        leases_of("second").take(0)
    held.expect(Receipt([entry], {}))
    before = held.audit_trail(None, 10)
    with pytest.raises(Fenced):
        held.commit([record(2)])
    with pytest.raises(Fenced):
        held.consume()
    with pytest.raises(Fenced):
        held.set_frozen("*", True, 0.0)
    assert [head.version for head in held.heads()] == [1]
    assert redis_client.call("XLEN", card.names.stats(0)) == 1
    assert held.audit_trail(None, 10) == before


def test_a_lease_that_ends_in_the_middle_of_a_commit_stops_it(
    held, leases_of, end_lease, monkeypatch
) -> None:
    begin = Transaction.begin

    def lose_lease_first(transaction: Transaction) -> None:
        monkeypatch.setattr(Transaction, "begin", begin)
        end_lease(0)
        assert leases_of("second").take(0)
        begin(transaction)

    monkeypatch.setattr(Transaction, "begin", lose_lease_first)
    with pytest.raises(Fenced):
        held.commit([record(2)])
    assert [head.version for head in held.heads()] == [1]


def test_a_worker_whose_head_was_moved_by_an_administrator_must_start_again(
    held, redis_client, card, monkeypatch
) -> None:
    begin, admin = Transaction.begin, RedisBackend(redis_client, card.names)

    def move_first(transaction: Transaction) -> None:
        monkeypatch.setattr(Transaction, "begin", begin)
        admin.commit([record(2)])
        begin(transaction)

    monkeypatch.setattr(Transaction, "begin", move_first)
    with pytest.raises(VersionConflict, match="version 2 of tenant:default is already stored"):
        held.commit([record(2)])
    held.commit([record(3)])
    assert held.verify_audit() == 3


def test_a_version_must_follow_from_the_latest(held) -> None:
    with pytest.raises(VersionConflict, match="tenant:default is at version 1, not 2"):
        held.commit([record(3)])
    held.delete_scopes([TENANT], 0.0)
    with pytest.raises(VersionConflict, match="deleted"):
        held.commit([record(2)])


def test_a_restart_that_lost_the_new_lease_does_not_let_the_old_holder_write(
    redis_server, held, leases_of, end_lease
) -> None:
    with redis_server.older_disk():
        end_lease(0)
        second = leases_of("second").take(0)
        assert second.epoch == 2
    end_lease(0)
    third = leases_of("third").take(0)
    assert third.epoch == second.epoch, "the number came back, but not the holder"
    for late in (held, LeasedBackend(held._client, held._names, second, seal=Seal(), shards=8)):
        with pytest.raises(Fenced):
            late.commit([record(2)])


def test_without_redis_a_lease_says_so(redis_server, leases_of) -> None:
    leases = leases_of("first")
    lease = leases.take(0)
    redis_server.stop()
    for act in (lambda: leases.take(1), lambda: leases.renew(lease), leases.sign_in):
        with pytest.raises(StoreUnavailable):
            act()
