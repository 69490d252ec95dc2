"""The two streams of a model: statistics on their way to who learns them, and what every commit changed."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any
from uuid import UUID

from keystore.backends.base import VersionRecord
from keystore.backends.redis_client import RedisClient, Reply, Word
from keystore.backends.redis_journal import Journal, Position
from keystore.backends.redis_names import RedisNames
from keystore.backends.redis_records import Codec
from keystore.backends.redis_seal import Seal
from keystore.backends.stats_blob import SentWindow, Shapes, pack_window, unpack_window
from keystore.errors import FellBehind, KeyStoreError, StoreCorrupted, StoreRegressed
from keystore.records import ScopeId


@dataclass(frozen=True, slots=True, eq=False)
class StatsEntry:
    """One entry of a shard's stream. `window` is None when its bytes were refused, for the reason in `refusal`."""

    entry_id: bytes
    window: SentWindow | None
    refusal: str = ""


class StatsStream:
    """What the replicas have to teach, by shard, in the order it came. Every method raises StoreUnavailable."""

    def __init__(self, client: RedisClient, names: RedisNames, seal: Seal) -> None:
        self._client, self._names, self._seal = client, names, seal

    def entry(self, shard: int, window: SentWindow) -> bytes:
        """The bytes to `send`: once made, the same until they have arrived."""
        return self._seal.close(pack_window(window), self._names.stats(shard))

    def send(self, shard: int, entry: bytes) -> None:
        """Append an entry of a known producer. After StoreUnavailable the same bytes go through `Producers.send_again`,
        before any later ones of the producer: the watermark tells duplicates apart.
        """
        self._client.call("XADD", self._names.stats(shard), "*", "window", entry)

    def pending(self, shard: int) -> int:
        """Entries that nobody has learned yet."""
        return int(self._client.call("XLEN", self._names.stats(shard)))

    def read(
        self, shard: int, after: bytes, shapes: Shapes, *, bonding: bool, count: int = 64, block_ms: int = 0
    ) -> Sequence[StatsEntry]:
        """Entries after one of them, b"0" for the first; waits up to `block_ms` for some, which is less than the
        client's timeout.
        """
        name = self._names.stats(shard)
        found = _read(self._client, name, after, count, block_ms)
        return [self._open(name, entry_id, fields, shapes, bonding=bonding) for entry_id, fields in found]

    def watermarks(self, shard: int) -> Mapping[UUID, int]:
        """The highest sequence that is part of the store, of every producer that is known."""
        found = self._client.call("HGETALL", self._names.watermarks(shard))
        return {UUID(hex=producer.decode()): int(sequence) for producer, sequence in found.items()}

    def _open(
        self, name: str, entry_id: bytes, fields: Mapping[bytes, bytes], shapes: Shapes, *, bonding: bool
    ) -> StatsEntry:
        try:
            body = self._seal.open(fields.get(b"window", b""), name)
            return StatsEntry(entry_id, unpack_window(body, shapes, bonding=bonding))
        except (StoreCorrupted, ValueError) as error:
            return StatsEntry(entry_id, None, str(error))


@dataclass(frozen=True, slots=True, eq=False)
class Delta:
    """What one commit changed. A pool event, a deletion and a changed frozen set are to be read from the backend."""

    position: Position  # after the commit
    kind: str  # "versions" (none, for a canary's verdict), "pool", "deleted" or "frozen"
    at: float  # unix seconds, the writer's clock
    versions: Sequence[tuple[ScopeId, int]]
    records: Mapping[tuple[ScopeId, int], VersionRecord]  # of these versions, but for those thinned meanwhile
    deleted: Sequence[ScopeId]


class DeltaStream:
    """The commits of one model, without a gap. Every method raises StoreUnavailable."""

    def __init__(self, client: RedisClient, names: RedisNames, seal: Seal) -> None:
        self._client, self._names = client, names
        self._codec, self._journal = Codec(names, seal), Journal(client, names)

    def position(self) -> Position:
        """Where the store stands; heads that are read afterwards are at least as new."""
        return self._journal.position()

    def read(self, after: Position, *, block_ms: int = 0, count: int = 256) -> Sequence[Delta]:
        """The commits that follow a position; waits up to `block_ms` for one, which is less than the client's timeout.

        Raises FellBehind when they were trimmed, StoreRegressed when the store has lost the position or has another
        history, StoreCorrupted when an entry or a version is not what it should be.
        """
        found = _read(self._client, self._names.delta, f"{after.sequence}-0", count, block_ms)
        if not found:
            self._check_stands(after)
            return []
        deltas: list[Delta] = []
        for entry_id, fields in found:
            sequence = int(entry_id.partition(b"-")[0])
            if sequence != after.sequence + 1:
                self._check_stands(after)
                raise FellBehind(f"the commits from {after.sequence + 1} to {sequence - 1} are gone")
            if fields[b"before"].decode() != after.audit_hash:
                raise StoreRegressed(f"commit {sequence} does not follow from what was read before it")
            after = Position(sequence, fields[b"after"].decode())
            deltas.append(self._delta(after, fields[b"told"]))
        return deltas

    def _check_stands(self, after: Position) -> None:
        stands = self.position()
        lost = stands.sequence < after.sequence
        if lost or (stands.sequence == after.sequence and stands.audit_hash != after.audit_hash):
            raise StoreRegressed(
                f"the store stands at commit {stands.sequence}; {after.sequence} was read before"
            )

    def _delta(self, position: Position, line: bytes) -> Delta:
        try:
            told: dict[str, Any] = json.loads(line)  # Any: of JSON
            versions = [(ScopeId.parse(scope), int(number)) for scope, number in told.get("versions", ())]
            deleted = [ScopeId.parse(scope) for scope in told.get("scopes", ())]
            kind, at = str(told["kind"]), float(told["at"])
        except (KeyStoreError, ValueError, KeyError, TypeError) as error:
            raise StoreCorrupted(f"commit {position.sequence} in {self._names.delta}: {error}") from error
        return Delta(position, kind, at, versions, self._records(versions), deleted)

    def _records(
        self, versions: Sequence[tuple[ScopeId, int]]
    ) -> Mapping[tuple[ScopeId, int], VersionRecord]:
        names = self._names.rows, self._names.changes, self._names.usage
        parts = self._client.batch(
            [("HGET", name(scope), version) for scope, version in versions for name in names]
        )
        records: dict[tuple[ScopeId, int], VersionRecord] = {}
        for number, (scope, version) in enumerate(versions):
            row, changes, usage = parts[3 * number : 3 * number + 3]
            if None not in (row, changes, usage):
                records[scope, version] = self._codec.version(scope, version, row, changes, usage)
        return records


def _read(
    client: RedisClient, name: str, after: Word, count: int, block_ms: int
) -> Sequence[tuple[bytes, Mapping[bytes, bytes]]]:
    waiting: tuple[Word, ...] = ("BLOCK", block_ms) if block_ms else ()
    reply: Reply = client.call("XREAD", "COUNT", count, *waiting, "STREAMS", name, after)
    return reply[0][1] if reply else []
