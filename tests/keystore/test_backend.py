"""What every backend must do: each test runs on both, and what they keep of one history is compared."""

import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import apsw
import numpy as np
import pytest

from keystore.backends.base import Backend, CanaryNote, RowChanges, VersionRecord, VersionRow
from keystore.backends.blobs import event_checksum, pack_changes, pack_settling, pack_usage
from keystore.backends.embedded import EmbeddedBackend
from keystore.backends.redis import RedisBackend
from keystore.errors import KeyVersionUnavailable, ModelMismatch, OutOfBounds, StoreCorrupted, VersionConflict
from keystore.records import GravityConfig, ScopeId
from keystore.statistics import RoutingStats, TokenTrace, TokenUtility
from keystore.store import KeyStore

TENANT, OTHER = ScopeId("tenant", "default"), ScopeId("tenant", "other")
SESSION = ScopeId("session", "default", "abc")


@pytest.fixture
def backend(open_backend) -> Iterator[Backend]:
    backend = open_backend()
    yield backend
    backend.close()


@pytest.fixture
def reopen(open_backend, store_on) -> Iterator[Callable[..., KeyStore]]:
    """Closes what it opened before and opens the store again."""
    opened: list[KeyStore] = []

    def reopen(*settings: object, **options: object) -> KeyStore:
        if opened:
            opened.pop().close()
        opened.append(store_on(open_backend(), *settings, **options))
        return opened[-1]

    yield reopen
    for store in opened:
        store.close()


def record(
    scope: ScopeId, version: int, *, parent: int | None = None, is_checkpoint: bool = False
) -> VersionRecord:
    row = VersionRow(
        scope, version, version - 1 if parent is None else parent, 1e6 + version / 3, 32 * version, 0.5, 0.1,
        f"{version:064x}", f"learned, it is said, “{version}”", 0,
    )  # fmt: skip
    rows = RowChanges(np.array([version % 16]), np.full((1, 8), version / 7, np.float32))
    usage = {3: np.full(16, version, np.float32), 5: np.ones(16, np.float32)}
    return VersionRecord(row, is_checkpoint, {3: rows}, usage)


def settling_window(seed: int) -> RoutingStats:
    """Tokens for which experts 16 and 17 would have been of use."""
    rng = np.random.default_rng(seed)
    traces: dict[int, TokenTrace] = {}
    for layer in (3, 5):
        ids, queries = rng.integers(0, 16, (32, 2)), rng.standard_normal((32, 8), dtype=np.float32)
        helped = TokenUtility(np.array([16, 17]), rng.standard_normal((32, 2), dtype=np.float32))
        traces[layer] = TokenTrace(ids, queries, 18, utility=helped)
    return RoutingStats.from_tokens(TENANT, traces)


def everything(backend: Backend) -> dict[str, object]:
    """All that a backend keeps, comparable."""
    heads = sorted(backend.heads(), key=lambda head: str(head.scope))
    rows = {head.scope: backend.versions(head.scope) for head in heads}
    return {
        "heads": heads,
        "rows": rows,
        "content": {
            (row.scope, row.version): (list(map(pack_changes, stored.changes)), pack_usage(stored.usage))
            for each in rows.values()
            for row in each
            for stored in [backend.load(row.scope, row.version)]
        },
        "settling": {head.scope: pack_settling(backend.settling(head.scope)) for head in heads},
        "floor": backend.session_floor(),
        "frozen": backend.frozen(),
        "passed": {scope: backend.passed_version(scope) for scope in (TENANT, OTHER, SESSION)},
        "pool": [(event.name, event_checksum(event)) for event in backend.pool_events()],
        "audit": backend.audit_trail(None, 10_000),
        "audit of the tenant": backend.audit_trail(TENANT, 3),
        "audit length": backend.verify_audit(),
    }


def test_one_history_leaves_the_same_in_every_backend(
    path, redis_client, card, store_on, window, clock
) -> None:
    kept: list[dict[str, object]] = []
    keys = {layer: np.random.default_rng(1).standard_normal((2, 8), dtype=np.float32) for layer in (3, 5)}
    for backend in (EmbeddedBackend(path), RedisBackend(redis_client, card.names, card=card)):
        clock.now_s = 1_000_000.0
        gravity = GravityConfig(settling_warmup_tokens=32)
        store = store_on(backend, gravity, clock=clock, session_ttl_s=100, versions_on_disk=5)

        def learn(*windows: RoutingStats, store: KeyStore = store) -> None:
            for stats in windows:
                clock.now_s += 1
                assert store.submit(stats)
                assert len(store.consolidate_once()) == 1

        learn(*(window(TENANT, seed) for seed in range(20)))
        learn(window(SESSION, 20), window(SESSION, 21))
        store.freeze(OTHER)
        store.freeze()
        store.unfreeze()
        backend.note_canary(
            CanaryNote(TENANT, 18, passed=True, event={"event": "canary", "scope": str(TENANT)})
        )
        backend.note_canary(
            CanaryNote(TENANT, 19, passed=False, event={"event": "canary", "scope": "global"})
        )
        store.rollback(TENANT, 17)
        store.experts.add("extra", TENANT, keys, "cafe")
        learn(*map(settling_window, range(100, 103)))
        before = everything(backend)
        assert backend.settling(TENANT), "or settling states are not compared"
        store.experts.promote("extra")
        store.experts.retire("extra")
        clock.now_s += 1000
        assert store.learning.expire_sessions(clock.now_s) == [SESSION]
        learn(window(SESSION, 22, num_experts=18))
        assert store.view(SESSION).version > 22
        kept += [before, everything(backend)]
        store.close()
    for embedded, redis in ((kept[0], kept[2]), (kept[1], kept[3])):
        for what, found in embedded.items():
            assert redis[what] == found, what


def test_nothing_is_kept_of_a_commit_that_conflicts(backend) -> None:
    backend.commit([record(TENANT, 1, is_checkpoint=True)])
    before = everything(backend)
    note = CanaryNote(OTHER, 1, passed=True, event={"event": "canary"})
    with pytest.raises(VersionConflict, match="version 1 of tenant:default is already stored"):
        backend.commit([record(OTHER, 1, is_checkpoint=True), record(TENANT, 1)], canary=note)
    assert everything(backend) == before


def test_several_versions_of_a_scope_fit_into_one_commit(backend) -> None:
    first = record(SESSION, 8, parent=7, is_checkpoint=True)
    backend.commit([first, record(SESSION, 9), record(TENANT, 1, is_checkpoint=True)])
    head = next(head for head in backend.heads() if head.scope == SESSION)
    assert (head.first_version, head.forked_from, head.version) == (8, 7, 9)
    assert head.created_at == 1e6 + 3, "to the last bit"
    assert [pack_changes(each) for each in backend.load(SESSION, 9).changes] == [
        pack_changes(record(SESSION, version).changes) for version in (8, 9)
    ]
    assert len(backend.load(SESSION, 8).changes) == 1


def test_versions_that_are_not_there_are_unavailable(backend) -> None:
    backend.commit([record(TENANT, 1, is_checkpoint=True)])
    for scope, version in ((TENANT, 0), (TENANT, 2), (OTHER, 1)):
        with pytest.raises(KeyVersionUnavailable):
            backend.load(scope, version)


def test_writers_at_once_lose_nothing(backend) -> None:
    scopes = [ScopeId("tenant", name) for name in "abcd"]
    failures: list[BaseException] = []

    def write(scope: ScopeId) -> None:
        try:
            for version in range(1, 11):
                backend.commit([record(scope, version, is_checkpoint=version == 1)])
        except BaseException as error:
            failures.append(error)
            raise

    threads = [threading.Thread(target=write, args=(scope,)) for scope in scopes]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failures == []
    assert {head.scope: head.version for head in backend.heads()} == dict.fromkeys(scopes, 10)
    assert backend.verify_audit() == 40
    assert len(backend.audit_trail(scopes[2], 100)) == 10


def test_keys_of_another_model_are_never_adopted(reopen, teach) -> None:
    teach(reopen())
    with pytest.raises(ModelMismatch, match="'tiny', not of 'other'"):
        reopen(model_id="other")


def test_other_anchors_under_the_same_name_are_another_model(reopen, teach) -> None:
    store = reopen()
    teach(store)
    anchors = {layer: rows + 1 for layer, rows in store.view(TENANT, 0).keys.items()}
    with pytest.raises(ModelMismatch, match="anchors"):
        reopen(anchors=anchors)


def test_versions_outside_a_smaller_radius_are_not_adopted(reopen, teach) -> None:
    teach(reopen(GravityConfig(plasticity_rate=1.0)))
    store = reopen(GravityConfig(trust_radius=0.001))
    with pytest.raises(OutOfBounds, match="tenant:default version 1 layer 3"):
        store.view(TENANT)


def test_a_restart_goes_on_at_the_last_version_with_identical_keys(reopen, teach) -> None:
    store = reopen()
    for seed in range(20):
        teach(store, seed)
    before = [store.view(TENANT, version).checksum for version in range(21)]
    store = reopen()
    assert [store.view(TENANT, version).checksum for version in range(21)] == before
    teach(store, 20)
    assert store.view(TENANT).version == store.verify_audit() == 21


def test_thinning_keeps_newest_versions_and_checkpoints_loadable(reopen, teach) -> None:
    store = reopen(versions_on_disk=10, versions_in_memory=1)
    checksums = {}
    for seed in range(70):
        teach(store, seed)
        checksums[seed + 1] = store.view(TENANT).checksum
    store = reopen()
    kept = [row.version for row in store.versions(TENANT)]
    assert kept == [*range(70, 47, -1), 32, 16, 1]
    for version in kept:
        assert store.view(TENANT, version).checksum == checksums[version]
    with pytest.raises(KeyVersionUnavailable):
        store.view(TENANT, 20)
    assert store.verify_audit() == 70


def damage(kind: str, blob: bytes) -> bytes:
    flipped = blob[:-2] + bytes([blob[-2] ^ 1]) + blob[-1:]
    return {"flip": flipped, "cut": blob[:-3], "grow": blob + b"x", "empty": b""}[kind]


@pytest.fixture
def edit_version(backend_kind, request, path: Path, card) -> Callable[[str, Callable[[bytes], bytes]], None]:
    """Changes the bytes of the only version's "changes" or "usage" behind the store's back."""

    def embedded(column: str, change: Callable[[bytes], bytes]) -> None:
        connection = apsw.Connection(str(path))
        blob = connection.execute(f"SELECT {column} FROM versions").get
        connection.execute(f"UPDATE versions SET {column} = ?", (change(blob),))
        connection.close()

    def redis(column: str, change: Callable[[bytes], bytes]) -> None:
        client = request.getfixturevalue("redis_client")
        name = getattr(card.names, column)(TENANT)
        client.call("HSET", name, 1, change(client.call("HGET", name, 1)))

    return {"embedded": embedded, "redis": redis}[backend_kind]


@pytest.mark.parametrize("column", ["changes", "usage"])
@pytest.mark.parametrize("kind", ["flip", "cut", "grow", "empty"])
def test_a_corrupted_blob_names_its_scope_and_version(reopen, teach, edit_version, column, kind) -> None:
    teach(reopen())
    edit_version(column, lambda blob: damage(kind, blob))
    store = reopen()
    with pytest.raises(StoreCorrupted, match="tenant:default version 1"):
        store.view(TENANT)
    assert store.reset(TENANT) == 2, "a reset needs nothing of the damaged version"
    assert store.view(TENANT).checksum == store.view(TENANT, 0).checksum
