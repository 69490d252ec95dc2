"""Records as they lie in Redis: JSON for what is small, the blobs of the embedded file for arrays, all of it sealed."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from keystore.backends.base import PoolEvent, RowChanges, VersionRecord, VersionRow
from keystore.backends.blobs import (
    event_checksum,
    pack_changes,
    pack_settling,
    pack_usage,
    unpack_changes,
    unpack_settling,
    unpack_usage,
)
from keystore.backends.redis_client import Word
from keystore.backends.redis_names import RedisNames
from keystore.backends.redis_seal import Seal
from keystore.backends.rows import pool_event
from keystore.errors import StoreCorrupted
from keystore.records import ScopeId
from keystore.settling import SettlingState

Command = tuple[Word, ...]


@dataclass(frozen=True, slots=True)
class Codec:
    """How the records of one model are written and read. Whatever reads raises StoreCorrupted."""

    names: RedisNames
    seal: Seal

    def keep_version(self, record: VersionRecord) -> Sequence[Command]:
        """The commands that store a version, without its head."""
        names, row = self.names, record.row
        scope, version = row.scope, row.version
        drift = float(row.drift_max), float(row.drift_mean)
        words = [row.parent, float(row.created_at), row.tokens, *drift]
        line = json.dumps([*words, row.checksum, row.reason, row.generation, record.is_checkpoint])
        sealed = self.seal.close(line.encode(), names.rows(scope), version)
        commands: list[Command] = [
            ("HSET", names.rows(scope), version, sealed),
            ("HSET", names.changes(scope), version, pack_changes(record.changes)),
            ("HSET", names.usage(scope), version, pack_usage(record.usage)),
        ]
        if record.is_checkpoint:
            commands.append(("ZADD", names.checkpoints(scope), version, version))
        if record.settling:
            place = names.settling, scope
            sealed = self.seal.close(pack_settling(record.settling), *place)
            commands.append(("HSET", names.settling, str(scope), sealed))
        elif record.settling is not None:
            commands.append(("HDEL", names.settling, str(scope)))
        return commands

    def row(self, scope: ScopeId, version: int, sealed: bytes) -> tuple[VersionRow, bool]:
        """Metadata of a version, and whether it is a checkpoint."""
        line = self.seal.open(sealed, self.names.rows(scope), version)
        *figures, is_checkpoint = parse_columns(line, f"{scope} version {version}", _ROW)
        return VersionRow(scope, version, *figures), is_checkpoint

    def version(
        self, scope: ScopeId, version: int, sealed: bytes, changes: bytes, usage: bytes
    ) -> VersionRecord:
        """One version as it was committed, but for the settling states."""
        row, is_checkpoint = self.row(scope, version, sealed)
        rows = self.changes(scope, version, changes)
        try:
            return VersionRecord(row, is_checkpoint, rows, unpack_usage(usage))
        except ValueError as error:
            raise StoreCorrupted(f"{scope} version {version}: {error}") from error

    def changes(self, scope: ScopeId, version: int, blob: bytes) -> Mapping[int, RowChanges]:
        """The changed rows of a version."""
        try:
            return unpack_changes(blob)
        except ValueError as error:
            raise StoreCorrupted(f"{scope} version {version}: {error}") from error

    def settling(self, scope: ScopeId, sealed: bytes | None) -> Mapping[int, SettlingState]:
        """What a scope knows of its settling experts."""
        if sealed is None:
            return {}
        try:
            return unpack_settling(self.seal.open(sealed, self.names.settling, scope))
        except ValueError as error:
            raise StoreCorrupted(f"what {scope} knows of settling experts: {error}") from error

    def keep_event(self, event: PoolEvent) -> Command:
        """The command that stores a change of the expert pool."""
        words = event.kind, event.name, str(event.scope), event.digest, float(event.at)
        line = json.dumps([event_checksum(event), event.generation, *words]).encode()
        sealed = self.seal.close(line + b"\n" + pack_changes(event.rows), self.names.pool, event.generation)
        return "HSET", self.names.pool, event.generation, sealed

    def event(self, number: int, sealed: bytes) -> PoolEvent:
        """One change of the expert pool, verified."""
        line, _, rows = self.seal.open(sealed, self.names.pool, number).partition(b"\n")
        return pool_event(number, *parse_columns(line, f"event {number} of the expert pool", _EVENT), rows)


_ROW = (int, float, int, float, float, str, str, int, bool)  # VersionRow from `parent` on, is_checkpoint
_EVENT = (str, int, str, str, str, str, float)  # checksum, then PoolEvent without its rows


def parse_columns(line: bytes, what: str, columns: tuple[type, ...]) -> list[Any]:  # Any: as `columns` says
    """The values of a JSON list, each of its column's type. Raises StoreCorrupted, naming `what`."""
    try:
        found = json.loads(line)
    except ValueError as error:
        raise StoreCorrupted(f"{what}: {error}") from error
    if not isinstance(found, list) or tuple(type(value) for value in found) != columns:
        raise StoreCorrupted(f"{what} is not {', '.join(column.__name__ for column in columns)}")
    return found
