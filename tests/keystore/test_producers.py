"""Who may send an entry again, and whose numbers may be forgotten: nothing is learned twice, whoever slept how long."""

import time
from collections.abc import Callable
from uuid import UUID

import pytest
from cluster import SEAL, SHARDS

from keystore.backends.redis_client import RedisClient, Transaction
from keystore.backends.redis_lease import Leases
from keystore.backends.redis_leased import LeasedBackend, Receipt
from keystore.backends.redis_names import shard_of
from keystore.backends.redis_producers import LEFT_MS, SILENT_MS, Producers
from keystore.backends.redis_streams import StatsStream
from keystore.backends.stats_blob import SentWindow
from keystore.errors import StoreUnavailable
from keystore.records import ScopeId

TENANT = ScopeId("tenant", "default")
FIRST, SECOND, THIRD = UUID(int=1), UUID(int=2), UUID(int=3)


def wait_until(condition: Callable[[], object], timeout_s: float = 30.0) -> None:
    deadline_s = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline_s, "it did not happen in time"
        time.sleep(0.005)


@pytest.fixture
def producers(redis_client, card) -> Producers:
    return Producers(redis_client, card.names)


@pytest.fixture
def stream(redis_client, card) -> StatsStream:
    return StatsStream(redis_client, card.names, SEAL)


@pytest.fixture
def be_silent(redis_client, card) -> Callable[[UUID], None]:
    """The producer has been silent for a month, or has left an hour ago."""
    return lambda producer: redis_client.call("PEXPIRE", card.names.producer(producer), 0)


@pytest.fixture
def learned(redis_client, card, stream, window, producers) -> LeasedBackend:
    """A worker's backend that has taken in entry 7 of the first producer and entry 9 of the second, both known."""
    lease = Leases(redis_client, card.names, "worker", ttl_ms=600_000).take(0)
    backend = LeasedBackend(redis_client, card.names, lease, seal=SEAL, shards=8)
    for producer, sequence in ((FIRST, 7), (SECOND, 9)):
        producers.introduce(producer)
        stream.send(0, stream.entry(0, SentWindow(producer, sequence, window())))
    take_in(backend, stream)
    return backend


def take_in(backend: LeasedBackend, stream: StatsStream) -> None:
    entries = stream.read(0, b"0", {3: (16, 8), 5: (16, 8)}, bonding=False)
    marks = {entry.window.producer: entry.window.sequence for entry in entries}
    backend.expect(Receipt([entry.entry_id for entry in entries], marks))
    backend.consume()


def ttl_ms(client: RedisClient, name: str) -> int:
    return int(client.call("PTTL", name))


def test_the_watermark_of_who_is_unknown_is_forgotten_and_nobody_elses(
    learned, producers, stream, be_silent
) -> None:
    assert producers.forget_unknown(0) == 0
    be_silent(FIRST)
    assert producers.forget_unknown(1) == 0, "nothing was learned there"
    assert stream.watermarks(0) == {FIRST: 7, SECOND: 9}
    assert producers.forget_unknown(0) == 1
    assert stream.watermarks(0) == {SECOND: 9}


def test_while_entries_wait_every_watermark_stays(learned, producers, stream, be_silent, window) -> None:
    stream.send(0, stream.entry(0, SentWindow(FIRST, 7, window())))  # the second of two copies
    be_silent(FIRST)
    assert producers.forget_unknown(0) == 0
    assert stream.watermarks(0) == {FIRST: 7, SECOND: 9}
    take_in(learned, stream)
    assert producers.forget_unknown(0) == 1


def test_an_entry_that_comes_while_the_watermarks_are_looked_at_keeps_them(
    learned, producers, stream, be_silent, window, monkeypatch
) -> None:
    be_silent(FIRST)
    begin = Transaction.begin

    def send_first(transaction: Transaction) -> None:
        monkeypatch.setattr(Transaction, "begin", begin)
        stream.send(0, stream.entry(0, SentWindow(FIRST, 7, window())))
        begin(transaction)

    monkeypatch.setattr(Transaction, "begin", send_first)
    assert producers.forget_unknown(0) == 0
    assert stream.watermarks(0) == {FIRST: 7, SECOND: 9}


def test_only_who_is_known_sends_again(learned, producers, stream, be_silent) -> None:
    assert producers.send_again(FIRST, 0, b"entry")
    assert stream.pending(0) == 1
    be_silent(FIRST)
    producers.renew(FIRST)
    assert not producers.send_again(FIRST, 0, b"entry"), "who is unknown stays so"
    assert not producers.send_again(THIRD, 0, b"entry")
    assert stream.pending(0) == 1


def test_who_becomes_unknown_while_sending_again_sends_nothing(
    learned, producers, stream, be_silent, monkeypatch
) -> None:
    begin = Transaction.begin

    def become_unknown_first(transaction: Transaction) -> None:
        monkeypatch.setattr(Transaction, "begin", begin)
        be_silent(FIRST)
        begin(transaction)

    monkeypatch.setattr(Transaction, "begin", become_unknown_first)
    assert not producers.send_again(FIRST, 0, b"entry")
    assert stream.pending(0) == 0


def test_a_sign_of_life_while_sending_again_does_not_disturb(learned, producers, stream, monkeypatch) -> None:
    begin = Transaction.begin

    def renew_first(transaction: Transaction) -> None:
        monkeypatch.setattr(Transaction, "begin", begin)
        producers.renew(FIRST)
        begin(transaction)

    monkeypatch.setattr(Transaction, "begin", renew_first)
    assert producers.send_again(FIRST, 0, b"entry")
    assert stream.pending(0) == 1


def test_a_window_that_may_have_been_learned_before_a_long_silence_is_dropped_and_the_rest_is_learned(
    cluster, window, redis_client, card
) -> None:
    store, shard = cluster.replica(start=False), shard_of(TENANT, SHARDS)
    outbox = store.learning._outbox
    send = outbox._stream.send

    def send_and_lose_the_answer(shard: int, entry: bytes) -> None:
        outbox._stream.send = send
        send(shard, entry)
        raise StoreUnavailable("the answer is lost")

    outbox._stream.send = send_and_lose_the_answer
    assert store.submit(window(seed=1))
    with pytest.raises(StoreUnavailable):
        outbox.send_waiting()
    assert store.counters().waiting_windows == 1
    assert cluster.learner(shard).learn_some() == 1
    before = outbox.sender.producer
    redis_client.call("PEXPIRE", card.names.producer(before), 0)  # as if a month had passed
    assert Producers(redis_client, card.names).forget_unknown(shard) == 1

    assert store.submit(window(seed=2))
    assert outbox.send_waiting()
    assert store.counters().dropped["unclear"] == 1
    assert outbox.sender.producer != before
    learner = cluster.learner(shard)
    assert learner.learn_some() == 1
    assert learner.counters.entries()["learned"] == 1
    store.learning._follower.catch_up()
    assert store.view(TENANT).tokens == 2 * 32, "and not three times"
    assert store.counters().waiting_windows == 0


def test_a_replica_stays_known_while_it_runs_and_leaves_when_it_ends(
    cluster, window, redis_client, card
) -> None:
    store = cluster.replica(session_ttl_s=0.4)  # on which it depends how often it says something
    mark = card.names.producer(store.learning._outbox.sender.producer)
    assert ttl_ms(redis_client, mark) == -2, "nothing has been sent"
    store.submit(window())
    wait_until(lambda: store.counters().waiting_windows == 0)
    redis_client.call("PEXPIRE", mark, LEFT_MS)
    wait_until(lambda: LEFT_MS < ttl_ms(redis_client, mark) <= SILENT_MS)
    store.learning.stop()
    assert 0 < ttl_ms(redis_client, mark) <= LEFT_MS


def test_a_replica_that_is_not_sure_of_everything_does_not_leave(cluster, window, redis_client, card) -> None:
    store = cluster.replica(start=False)
    outbox = store.learning._outbox
    send, lost = outbox._stream.send, StoreUnavailable("the answer is lost")

    def send_and_lose_the_answer(shard: int, entry: bytes) -> None:
        send(shard, entry)
        raise lost

    outbox._stream.send = send_and_lose_the_answer
    store.submit(window())
    store.learning.stop()  # which tries to send
    assert ttl_ms(redis_client, card.names.producer(outbox.sender.producer)) > LEFT_MS
    assert store.counters().waiting_windows == 1


def test_workers_forget_who_is_gone_for_long(cluster, window, redis_client, card) -> None:
    gone, here = cluster.replica(), cluster.replica()
    cluster.worker(session_ttl_s=1.0)  # which looks twice as often
    stream, shard = StatsStream(redis_client, card.names, SEAL), shard_of(TENANT, SHARDS)
    for number, store in enumerate((gone, here), start=1):
        store.submit(window(seed=number))
        wait_until(lambda tokens=32 * number: here.view(TENANT).tokens == tokens)
    producers = [store.learning._outbox.sender.producer for store in (gone, here)]
    assert stream.watermarks(shard) == dict.fromkeys(producers, 1)
    gone.learning.stop()
    redis_client.call("PEXPIRE", card.names.producer(producers[0]), 0)
    wait_until(lambda: stream.watermarks(shard) == {producers[1]: 1})
    here.submit(window(seed=3))
    wait_until(lambda: here.view(TENANT).tokens == 3 * 32)
