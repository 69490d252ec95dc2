"""Versions in Redis, for several replicas and workers: every change is one WATCH/MULTI, without scripts.

Durable when the server writes its log before it answers (`appendfsync always`), on one primary. Does not know gravity,
nor what a blob's rows are applied to.
"""

from collections.abc import Iterable, Mapping, Sequence

from keystore.backends.audit import verify_chain
from keystore.backends.audit_events import commit_event, delete_event, experts_event, freeze_event
from keystore.backends.base import (
    CanaryNote,
    PoolEvent,
    ScopeHead,
    StoredVersion,
    VersionRecord,
    VersionRow,
)
from keystore.backends.redis_audit import audit_rows, audit_trail
from keystore.backends.redis_client import RedisClient, Reply
from keystore.backends.redis_heads import heads_after, pack_head, unpack_head
from keystore.backends.redis_journal import Change, Journal
from keystore.backends.redis_lease import Lease
from keystore.backends.redis_model import ModelCard, claim_model, write_card
from keystore.backends.redis_names import RedisNames
from keystore.backends.redis_records import Codec, Command
from keystore.backends.redis_seal import Seal
from keystore.errors import (
    KeyVersionUnavailable,
    StoreCorrupted,
    VersionConflict,
)
from keystore.records import ScopeId
from keystore.settling import SettlingState


class RedisBackend:
    """A Backend in Redis. Every method raises StoreUnavailable; after a failed write read the heads before going on.

    `card` tells workers about the model when it is adopted. Closing leaves `client` open.
    """

    def __init__(
        self,
        client: RedisClient,
        names: RedisNames,
        *,
        seal: Seal | None = None,
        card: ModelCard | None = None,
        shards: int = 8,
        lease: Lease | None = None,
    ) -> None:
        self._client, self._names, self._card, self._shards = client, names, card, shards
        self._seal = seal or Seal()
        self._codec = Codec(names, self._seal)
        self._journal = Journal(client, names, lease)

    def adopt_model(self, model_id: str, anchors_checksum: str) -> None:
        """Claim an empty store for a model, or check that it is this one's; then workers can find it.

        Raises ModelMismatch, and InvalidConfig when the store has another number of shards.
        """
        claim_model(self._client, self._names, model_id, anchors_checksum, self._shards)
        if self._card is not None:
            write_card(self._client, self._names, self._card, self._seal)

    def heads(self) -> Sequence[ScopeHead]:
        """Every scope that has versions."""
        found = self._client.call("HGETALL", self._names.heads)
        return [unpack_head(scope, line) for scope, line in found.items()]

    def session_floor(self) -> int:
        """Highest version number of any deleted session."""
        return int(self._client.call("GET", self._names.session_floor) or 0)

    def commit(
        self,
        records: Sequence[VersionRecord],
        canary: CanaryNote | None = None,
        pool_event: PoolEvent | None = None,
    ) -> None:
        """Keep all or none; durable when it returns.

        Raises VersionConflict when a record does not follow from its scope's latest version, Fenced.
        """
        self._commit(records, canary, pool_event)

    def note_canary(self, note: CanaryNote) -> None:
        """Keep a note about a version that is stored already, or that will never be."""
        self._commit([], note, None)

    def passed_version(self, scope: ScopeId) -> int:
        """The version of the newest note that says passed; 0 when there is none."""
        return int(self._client.call("HGET", self._names.passed, str(scope)) or 0)

    def pool_events(self) -> Sequence[PoolEvent]:
        """Every change of the expert pool, in order. Raises StoreCorrupted."""
        found = {int(number): blob for number, blob in self._client.call("HGETALL", self._names.pool).items()}
        if sorted(found) != list(range(1, len(found) + 1)):
            raise StoreCorrupted(f"{self._names.pool} has events {sorted(found)}; allowed: 1, 2, ...")
        return [self._codec.event(number, found[number]) for number in sorted(found)]

    def settling(self, scope: ScopeId) -> Mapping[int, SettlingState]:
        """What a scope knows of the addresses of its settling experts, by layer. Raises StoreCorrupted."""
        return self._codec.settling(scope, self._client.call("HGET", self._names.settling, str(scope)))

    def load(self, scope: ScopeId, version: int) -> StoredVersion:
        """The nearest checkpoint at or below `version` and what follows.

        Raises KeyVersionUnavailable, StoreCorrupted.
        """
        names = self._names
        nearest = ("ZREVRANGEBYSCORE", names.checkpoints(scope), version, "-inf", "LIMIT", 0, 1)
        first = next(map(int, self._client.call(*nearest)), version)
        numbers = range(first, version + 1)
        rows, changes, usage = self._client.batch(
            [
                ("HMGET", names.rows(scope), version),
                ("HMGET", names.changes(scope), *numbers),
                ("HMGET", names.usage(scope), version),
            ],
            atomic=True,
        )
        if rows[0] is None:
            raise KeyVersionUnavailable(f"version {version} of {scope} is not kept; see its list of versions")
        if None in changes or usage[0] is None:
            raise StoreCorrupted(
                f"{scope} version {version}: a version between it and its checkpoint is missing"
            )
        last = self._codec.version(scope, version, rows[0], changes[-1], usage[0])
        earlier = [self._codec.changes(scope, version, blob) for blob in changes[:-1]]
        return StoredVersion(last.row, [*earlier, last.changes], last.usage)

    def versions(self, scope: ScopeId) -> Sequence[VersionRow]:
        """What is left of a scope's history, newest first."""
        found = {
            int(number): row for number, row in self._client.call("HGETALL", self._names.rows(scope)).items()
        }
        return [self._codec.row(scope, number, found[number])[0] for number in sorted(found, reverse=True)]

    def thin(self, scope: ScopeId, keep: int) -> None:
        """Drop all but the newest `keep`, what those are rebuilt from, and `keep` older checkpoints."""
        names = self._names
        kept, lasting = self._client.batch(
            [("HKEYS", names.rows(scope)), ("ZRANGE", names.checkpoints(scope), 0, -1)], atomic=True
        )
        checkpoints, newest = [*map(int, lasting)], sorted(map(int, kept))[-keep:]
        base = max((number for number in checkpoints if number <= newest[0]), default=0) if newest else 0
        older = [number for number in checkpoints if number < base][-keep:]
        dropped = [number for number in map(int, kept) if number < base and number not in older]
        if dropped:
            fields = [("HDEL", name(scope), *dropped) for name in (names.rows, names.changes, names.usage)]
            self._client.batch([*fields, ("ZREM", names.checkpoints(scope), *dropped)], atomic=True)

    def delete_scopes(self, scopes: Iterable[ScopeId], at: float) -> None:
        """Forget scopes and raise the session floor over them."""
        names, gone = self._names, list(scopes)

        def write(change: Change) -> None:
            heads = self._heads_of(change, gone)
            floor = int(change.read("GET", names.session_floor) or 0)
            last = {scope: heads[scope].version if scope in heads else 0 for scope in gone}
            change.begin()
            change.write("SET", names.session_floor, max(floor, *last.values()))
            for scope in gone:
                of_scope = (names.rows, names.changes, names.usage, names.checkpoints)
                change.write("DEL", *(name(scope) for name in of_scope))
                change.write("HDEL", names.heads, str(scope))
                change.write("HDEL", names.settling, str(scope))
                change.audit(delete_event(scope, last[scope], at))

        if gone:
            self._journal.change("deleted", {"scopes": [str(scope) for scope in gone]}, write)

    def frozen(self) -> frozenset[str]:
        """Names of frozen scopes."""
        return frozenset(name.decode() for name in self._client.call("SMEMBERS", self._names.frozen))

    def set_frozen(self, name: str, frozen: bool, at: float) -> None:
        """Freeze or unfreeze a name, durably."""

        def write(change: Change) -> None:
            change.begin()
            change.write("SADD" if frozen else "SREM", self._names.frozen, name)
            change.audit(freeze_event(name, at, frozen=frozen))

        self._journal.change("frozen", {"name": name}, write)

    def audit_trail(self, scope: ScopeId | None, limit: int) -> Sequence[Mapping[str, object]]:
        """The newest events, of everybody or those that name a scope or all scopes, newest first."""
        return audit_trail(self._client, self._names, scope, limit)

    def verify_audit(self) -> int:
        """Walk what is left of the audit chain and return its length with what was trimmed. Raises StoreCorrupted."""
        return verify_chain(audit_rows(self._client, self._names), from_start=False)

    def close(self) -> None:
        """Nothing: the client is its owner's."""

    def _commit(
        self,
        records: Sequence[VersionRecord],
        canary: CanaryNote | None,
        pool_event: PoolEvent | None,
        receipt: Sequence[Command] = (),
    ) -> None:
        scopes = list(dict.fromkeys(record.row.scope for record in records))
        kept = [command for record in records for command in self._codec.keep_version(record)]

        def write(change: Change) -> None:
            heads = heads_after(self._heads_of(change, scopes), records)
            if (
                pool_event is not None
                and int(change.read("HLEN", self._names.pool)) != pool_event.generation - 1
            ):
                raise VersionConflict(
                    f"generation {pool_event.generation} of the expert pool does not follow, or is already stored"
                )
            change.begin()
            for command in (*kept, *receipt):
                change.write(*command)
            if pool_event is not None:
                change.write(*self._codec.keep_event(pool_event))
                change.audit(experts_event(pool_event))
            for scope, head in heads.items():
                change.write("HSET", self._names.heads, str(scope), pack_head(head))
            for record in records:
                change.audit(commit_event(record.row))
            if canary is not None:
                change.audit(canary.event)
                if canary.passed:
                    change.write("HSET", self._names.passed, str(canary.scope), canary.version)

        versions = [(str(record.row.scope), record.row.version) for record in records]
        kind = "pool" if pool_event is not None else "versions"
        self._journal.change(kind, {"versions": versions}, write)

    def _heads_of(self, change: Change, scopes: Sequence[ScopeId]) -> Mapping[ScopeId, ScopeHead]:
        if not scopes:
            return {}
        names = [str(scope) for scope in scopes]
        lines: list[Reply] = change.read("HMGET", self._names.heads, *names)
        found = zip(scopes, names, lines, strict=True)
        return {scope: unpack_head(name.encode(), line) for scope, name, line in found if line is not None}
