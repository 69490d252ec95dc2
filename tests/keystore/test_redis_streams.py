"""Statistics on their way to the worker, commits on theirs to the readers; and what strangers may put in between."""

from collections.abc import Callable, Iterator
from contextlib import closing
from uuid import UUID

import pytest

from keystore.backends.blobs import pack_changes, pack_usage
from keystore.backends.redis import RedisBackend
from keystore.backends.redis_client import RedisClient
from keystore.backends.redis_journal import Position
from keystore.backends.redis_lease import Leases
from keystore.backends.redis_leased import LeasedBackend, Receipt
from keystore.backends.redis_model import ModelCard, read_card, read_models
from keystore.backends.redis_names import RedisNames, shard_of
from keystore.backends.redis_seal import Seal
from keystore.backends.redis_streams import DeltaStream, StatsEntry, StatsStream
from keystore.backends.stats_blob import SentWindow, pack_window
from keystore.errors import StoreCorrupted
from keystore.records import ScopeId

TENANT, SESSION = ScopeId("tenant", "default"), ScopeId("session", "default", "abc")
FIRST, SECOND = UUID(int=1), UUID(int=2)
SHAPES = {3: (16, 8), 5: (16, 8)}
SECRET = Seal(b"between replicas and workers")

# What a replica or a worker sends. No scripts, no administration.
COMMANDS = [
    "ping", "hello", "client|setinfo", "client|setname", "time", "watch", "unwatch", "multi", "exec", "discard",
    "get", "set", "mget", "incr", "pexpire", "del", "hget", "hset", "hsetnx", "hmget", "hgetall", "hdel", "hkeys",
    "hlen", "smembers", "sadd", "srem", "zadd", "zrange", "zrevrangebyscore", "zrem", "zremrangebyscore", "zcard",
    "xadd", "xread", "xrange", "xrevrange", "xlen", "xdel",
]  # fmt: skip


@pytest.fixture
def stream_with(redis_client, card) -> Callable[[Seal], StatsStream]:
    return lambda seal: StatsStream(redis_client, card.names, seal)


@pytest.fixture
def stream(stream_with) -> StatsStream:
    return stream_with(SECRET)


def read(stream: StatsStream, shard: int = 0, after: bytes = b"0") -> list[StatsEntry]:
    return list(stream.read(shard, after, SHAPES, bonding=False))


def test_entries_come_in_the_order_they_were_sent_and_are_the_same_bytes_when_sent_again(
    stream, window
) -> None:
    windows = [SentWindow(FIRST, 1, window(seed=1)), SentWindow(SECOND, 1, window(SESSION, 2))]
    for each in (*windows, windows[0]):
        stream.send(0, stream.entry(0, each))
    assert stream.entry(0, windows[0]) == stream.entry(0, windows[0])
    assert stream.pending(0) == 3
    entries = read(stream)
    assert [(e.window.producer, e.window.sequence) for e in entries] == [(FIRST, 1), (SECOND, 1), (FIRST, 1)]
    assert [pack_window(e.window) for e in entries[:2]] == [pack_window(each) for each in windows]
    assert [e.entry_id for e in read(stream, after=entries[0].entry_id)] == [e.entry_id for e in entries[1:]]
    assert read(stream, shard=1) == []
    assert stream.read(1, b"0", SHAPES, bonding=False, block_ms=1) == []


def test_a_receipt_takes_its_entries_out_with_the_commit(stream, window, redis_client, card) -> None:
    lease = Leases(redis_client, card.names, "worker", ttl_ms=600_000).take(0)
    backend = LeasedBackend(redis_client, card.names, lease, seal=SECRET, shards=8)
    for sequence in (1, 2, 3):
        stream.send(0, stream.entry(0, SentWindow(FIRST, sequence, window(seed=sequence))))
    first, second, third = read(stream)
    backend.expect(Receipt([first.entry_id, second.entry_id], {FIRST: 2}))
    assert stream.pending(0) == 3, "nothing happens before the commit"
    backend.consume()
    assert [entry.entry_id for entry in read(stream)] == [third.entry_id]
    assert stream.watermarks(0) == {FIRST: 2}
    assert stream.watermarks(1) == {}
    backend.consume()
    assert stream.pending(0) == 1, "a receipt is good for one commit"
    assert backend.verify_audit() == 0, "no version, no trace in the audit chain"


def test_what_others_put_into_the_stream_is_refused_one_by_one(
    stream, stream_with, window, redis_client, card
):
    sent = SentWindow(FIRST, 1, window())
    stream.send(0, stream.entry(0, sent))
    genuine = stream.entry(0, sent)
    forged = [
        stream_with(Seal(b"another secret")).entry(0, sent),
        stream_with(Seal()).entry(0, sent),
        stream.entry(1, sent),
        genuine[:-1],
        bytes([genuine[0] ^ 1]) + genuine[1:],
        b"",
    ]
    for entry in forged:
        stream.send(0, entry)
    redis_client.call("XADD", card.names.stats(0), "*", "something", "else")
    stream.send(0, genuine)
    entries = read(stream)
    assert [entry.window is not None for entry in entries] == [True] + [False] * 7 + [True]
    assert all("not signed" in entry.refusal for entry in entries[1:-1])


def test_without_a_secret_bytes_that_are_no_statistics_are_refused(stream_with, window) -> None:
    open_stream, sent = stream_with(Seal()), SentWindow(FIRST, 1, window())
    for entry in (SECRET.close(pack_window(sent)), b"\x80\x04\x95pickle", pack_window(sent)):
        open_stream.send(0, entry)
    assert [entry.refusal[:17] for entry in read(open_stream)] == [
        "blob starts with " + "",
        "blob starts with ",
        "",
    ]


def test_versions_signed_with_another_secret_are_corrupted(redis_client, card, store_on, teach) -> None:
    teach(store_on(RedisBackend(redis_client, card.names, seal=SECRET, card=card)))
    stranger = RedisBackend(redis_client, card.names, seal=Seal(b"another secret"), card=card)
    for look in (lambda: stranger.load(TENANT, 1), lambda: stranger.versions(TENANT)):
        with pytest.raises(StoreCorrupted, match="not signed"):
            look()
    with pytest.raises(StoreCorrupted, match="not signed"):
        DeltaStream(redis_client, card.names, Seal(b"another secret")).read(Position())
    row = redis_client.call("HGET", card.names.rows(TENANT), 1)
    redis_client.call("HSET", card.names.rows(TENANT), 2, row)
    backend = RedisBackend(redis_client, card.names, seal=SECRET)
    assert backend.load(TENANT, 1).row.version == 1
    with pytest.raises(StoreCorrupted, match="2: the record is not signed"):
        backend.versions(TENANT)


def test_readers_get_every_commit_once_with_what_it_changed(
    redis_client, card, store_on, teach, clock
) -> None:
    backend = RedisBackend(redis_client, card.names, seal=SECRET, card=card)
    store = store_on(backend, clock=clock, session_ttl_s=100)
    deltas = DeltaStream(redis_client, card.names, SECRET)
    start = deltas.position()
    assert deltas.read(start, block_ms=1) == []
    teach(store, 1)
    teach(store, 2, SESSION)
    (first,) = deltas.read(start, count=1)
    (second,) = deltas.read(first.position)
    store.freeze(TENANT)
    clock.now_s += 1000
    store.learning.expire_sessions(clock.now_s)
    frozen, deleted = deltas.read(second.position)
    assert [delta.kind for delta in (first, second, frozen, deleted)] == [
        "versions",
        "versions",
        "frozen",
        "deleted",
    ]
    assert (first.versions, second.versions) == ([(TENANT, 1)], [(SESSION, 2)])
    assert (frozen.versions, deleted.deleted) == ([], [SESSION])
    assert deltas.read(deleted.position) == []
    assert deleted.position == deltas.position()
    stored, told = backend.load(TENANT, 1), first.records[TENANT, 1]
    assert told.row == stored.row
    assert told.is_checkpoint
    assert [pack_changes(told.changes), pack_usage(told.usage)] == [
        pack_changes(stored.changes[0]),
        pack_usage(stored.usage),
    ]
    (_, again, *_) = deltas.read(start)
    assert again.records == {}, "the session's version is gone meanwhile"


def test_a_model_is_found_by_its_endpoint_and_cannot_be_exchanged(redis_client, card, store_on) -> None:
    assert read_card(redis_client, card.names, SECRET) is None
    store_on(RedisBackend(redis_client, card.names, seal=SECRET, card=card, shards=3))
    assert read_models(redis_client) == {"some": card.names}
    found, shards = read_card(redis_client, card.names, SECRET)
    assert (found.endpoint, found.model_id, found.plastic_layers, shards) == ("some", "tiny", (3, 5), 3)
    assert {layer: rows.tobytes() for layer, rows in found.anchors.items()} == {
        layer: rows.tobytes() for layer, rows in card.anchors.items()
    }
    other = ModelCard("some", "tiny", 4, (3, 5), {**card.anchors, 3: card.anchors[3] + 1})
    assert other.names != card.names
    sealed = SECRET.close(other.pack(), card.names.model, "card")
    redis_client.call("HSET", card.names.model, "card", sealed)
    with pytest.raises(StoreCorrupted, match="checksum"):
        read_card(redis_client, card.names, SECRET)
    redis_client.call("HSET", card.names.model, "card", other.pack())
    with pytest.raises(StoreCorrupted, match="not signed"):
        read_card(redis_client, card.names, SECRET)


def test_the_audit_chain_shows_a_link_that_was_taken_out(redis_client, card, store_on, teach) -> None:
    backend = RedisBackend(redis_client, card.names, card=card)
    store = store_on(backend)
    for seed in range(4):
        teach(store, seed)
    redis_client.call("XDEL", card.names.audit, "3-0")
    with pytest.raises(StoreCorrupted, match="row 4"):
        store.verify_audit()
    redis_client.call("XTRIM", card.names.audit, "MAXLEN", 1)
    assert store.verify_audit() == 4, "a chain may lose its oldest links"


def test_a_session_is_in_the_shard_of_its_tenant_and_names_share_a_hash_tag() -> None:
    tenants = [ScopeId("tenant", f"t{number}") for number in range(200)]
    assert {shard_of(tenant, 8) for tenant in tenants} == set(range(8))
    for tenant in tenants:
        assert shard_of(ScopeId("session", tenant.tenant, "x"), 8) == shard_of(tenant, 8)
    names = RedisNames("0123")
    assert names.rows(SESSION) == "libration:{0123}:rows:session:default/abc"
    assert names.stats(3) == "libration:{0123}:stats:3"


@pytest.fixture
def restricted(redis_server, redis_client) -> Iterator[RedisClient]:
    """A client of a user who may do what is listed and nothing else."""
    allowed = [f"+{command}" for command in COMMANDS]
    redis_client.call("ACL", "SETUSER", "libration", "on", ">pass", "~libration:*", "-@all", *allowed)
    with closing(redis_server.client(username="libration", password="pass")) as client:
        yield client


def test_neither_scripts_nor_administration_are_needed(
    restricted, card, store_on, teach, window, clock
) -> None:
    assert not {"eval", "evalsha", "fcall", "script", "config", "keys", "flushall"} & set(COMMANDS)
    backend = RedisBackend(restricted, card.names, seal=SECRET, card=card)
    store = store_on(backend, clock=clock, session_ttl_s=100, versions_on_disk=1)
    stream = StatsStream(restricted, card.names, SECRET)
    leases = Leases(restricted, card.names, "worker", ttl_ms=600_000)
    leased = LeasedBackend(restricted, card.names, leases.take(0), seal=SECRET, shards=8)
    for seed in range(33):
        teach(store, seed)
    teach(store, 1, SESSION)
    store.rollback(TENANT, 33)
    store.freeze(TENANT)
    store.unfreeze(TENANT)
    clock.now_s += 1000
    assert store.learning.expire_sessions(clock.now_s) == [SESSION]
    stream.send(0, stream.entry(0, SentWindow(FIRST, 1, window())))
    (entry,) = read(stream)
    leased.expect(Receipt([entry.entry_id], {FIRST: 1}))
    leased.consume()
    lease = leases.take(0)
    leases.renew(lease)
    leases.release(lease)
    assert leases.holders(1) == [None]
    leases.sign_in()
    leases.sign_out()
    assert (stream.pending(0), stream.watermarks(0)) == (0, {FIRST: 1})
    assert (
        len(DeltaStream(restricted, card.names, SECRET).read(Position(), count=1000)) == store.verify_audit()
    )
    assert read_card(restricted, read_models(restricted)["some"], SECRET) is not None
    assert (backend.passed_version(TENANT), list(backend.pool_events()), backend.settling(TENANT)) == (
        0,
        [],
        {},
    )
    assert len(store.audit_trail(None, 5)) == 5
