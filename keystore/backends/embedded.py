"""Versions in one SQLite file through apsw: WAL, synchronous=FULL, one writer, a separate reader.

A commit is one transaction: rows, usage, version and audit link are all there or none is. Does not know
gravity, nor what a blob's rows are applied to.
"""

import json
import os
import threading
from collections.abc import Generator, Iterable, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

import apsw

from keystore.backends.audit import verify_chain
from keystore.backends.audit_events import delete_event, freeze_event
from keystore.backends.base import (
    EVERY_SCOPE,
    CanaryNote,
    PoolEvent,
    ScopeHead,
    StoredVersion,
    VersionRecord,
    VersionRow,
)
from keystore.backends.blobs import (
    pack_changes,
    pack_usage,
    unpack_changes,
    unpack_settling,
    unpack_usage,
)
from keystore.backends.data_file import lock, make_folder
from keystore.backends.rows import (
    ROW_COLUMNS,
    Row,
    append_audit,
    insert_event,
    insert_version,
    keep_note,
    keep_settling,
    passed_name,
    pool_event,
    read_meta,
    version_row,
    write_meta,
)
from keystore.backends.schema import ensure_schema
from keystore.errors import (
    KeyVersionUnavailable,
    ModelMismatch,
    StoreCorrupted,
)
from keystore.records import ScopeId
from keystore.settling import SettlingState

BUSY_TIMEOUT_MS = 5_000


class EmbeddedBackend:
    """A Backend in one file.

    Raises StoreLocked when another process has it, StoreCorrupted on another schema.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        make_folder(path.parent)
        self._lock_fd = lock(path.with_name(path.name + ".lock"))
        try:
            os.close(os.open(path, os.O_CREAT | os.O_RDWR, 0o600))  # learned keys derive from prompts
            self._writer, self._reader = _connect(path), _connect(path)
            self._writing, self._reading = threading.Lock(), threading.Lock()
            with self._transaction() as writer:
                ensure_schema(writer, path)
        except BaseException:
            os.close(self._lock_fd)
            raise

    def close(self) -> None:
        """Checkpoint the log, close both connections and release the lock file."""
        with self._writing, self._reading:
            self._reader.close()
            self._writer.close()
            if self._lock_fd >= 0:
                os.close(self._lock_fd)
                self._lock_fd = -1

    def adopt_model(self, model_id: str, anchors_checksum: str) -> None:
        """Claim an empty file for a model or check that it is this one's. Raises ModelMismatch."""
        offered = {"model_id": model_id, "anchors": anchors_checksum}
        with self._transaction() as writer:
            for name, given in offered.items():
                stored = read_meta(writer, name)
                if stored is None:
                    write_meta(writer, name, given)
                elif stored != given:
                    raise ModelMismatch(
                        f"{self.path} holds keys of {name} {stored!r}, not of {given!r}; allowed: one model"
                    )

    def heads(self) -> Sequence[ScopeHead]:
        """Every scope that has versions."""
        rows = self._read(
            "SELECT s.scope, s.first_version, s.forked_from, v.version, v.created_at, v.generation"
            " FROM scopes s"
            " JOIN versions v ON v.scope = s.scope"
            " AND v.version = (SELECT max(version) FROM versions WHERE scope = s.scope)"
        )
        return [ScopeHead(ScopeId.parse(scope), *rest) for scope, *rest in rows]

    def session_floor(self) -> int:
        """Highest version number of any deleted session."""
        with self._reading:
            return int(read_meta(self._reader, "session_floor") or 0)

    def commit(
        self,
        records: Sequence[VersionRecord],
        canary: CanaryNote | None = None,
        pool_event: PoolEvent | None = None,
    ) -> None:
        """Keep all or none; durable when it returns. Raises VersionConflict when a number is taken."""
        packed = [(record, pack_changes(record.changes), pack_usage(record.usage)) for record in records]
        with self._transaction() as writer:
            if pool_event is not None:
                insert_event(writer, pool_event)
            for record, changes, usage in packed:
                insert_version(writer, record, changes, usage)
                if record.settling is not None:
                    keep_settling(writer, record.row.scope, record.settling)
            if canary is not None:
                keep_note(writer, canary)

    def settling(self, scope: ScopeId) -> Mapping[int, SettlingState]:
        """What a scope knows of the addresses of its settling experts, by layer. Raises StoreCorrupted."""
        rows = self._read("SELECT state FROM settling WHERE scope = ?", (str(scope),))
        try:
            return unpack_settling(rows[0][0]) if rows else {}
        except ValueError as error:
            raise StoreCorrupted(f"what {scope} knows of settling experts: {error}") from error

    def note_canary(self, note: CanaryNote) -> None:
        """Keep a note about a version that is stored already, or that will never be."""
        with self._transaction() as writer:
            keep_note(writer, note)

    def passed_version(self, scope: ScopeId) -> int:
        """The version of the newest note that says passed; 0 when there is none."""
        with self._reading:
            return int(read_meta(self._reader, passed_name(scope)) or 0)

    def pool_events(self) -> Sequence[PoolEvent]:
        """Every change of the expert pool, in order. Raises StoreCorrupted."""
        rows = self._read(
            "SELECT checksum, generation, kind, name, scope, digest, at, rows FROM pool_events"
            " ORDER BY generation"
        )
        return [pool_event(number, *row) for number, row in enumerate(rows, start=1)]

    def load(self, scope: ScopeId, version: int) -> StoredVersion:
        """The nearest checkpoint at or below `version` and what follows.

        Raises KeyVersionUnavailable, StoreCorrupted.
        """
        rows = self._read(
            f"SELECT {ROW_COLUMNS}, changes, usage FROM versions"  # noqa: S608 - constant columns
            " WHERE scope = ?1 AND version <= ?2 AND version >="
            " (SELECT max(version) FROM versions WHERE scope = ?1 AND version <= ?2 AND is_checkpoint)"
            " ORDER BY version",
            (str(scope), version),
        )
        if not rows or rows[-1][1] != version:
            raise KeyVersionUnavailable(f"version {version} of {scope} is not kept; see its list of versions")
        if rows[-1][1] - rows[0][1] != len(rows) - 1:
            raise StoreCorrupted(
                f"{scope} version {version}: a version between it and its checkpoint is missing"
            )
        try:
            changes = [unpack_changes(row[-2]) for row in rows]
            return StoredVersion(version_row(rows[-1][:-2]), changes, unpack_usage(rows[-1][-1]))
        except ValueError as error:
            raise StoreCorrupted(f"{scope} version {version}: {error}") from error

    def versions(self, scope: ScopeId) -> Sequence[VersionRow]:
        """What is left of a scope's history, newest first."""
        newest_first = "FROM versions WHERE scope = ? ORDER BY version DESC"
        query = f"SELECT {ROW_COLUMNS} {newest_first}"
        return [version_row(row) for row in self._read(query, (str(scope),))]

    def thin(self, scope: ScopeId, keep: int) -> None:
        """Drop all but the newest `keep`, what those are rebuilt from, and `keep` older checkpoints."""
        with self._transaction() as writer:
            writer.execute(
                "WITH newest AS (SELECT version FROM versions WHERE scope = ?1"
                "          ORDER BY version DESC LIMIT ?2),"
                " base AS (SELECT max(version) AS version FROM versions WHERE scope = ?1 AND is_checkpoint"
                "          AND version <= (SELECT min(version) FROM newest)),"
                " older AS (SELECT version FROM versions WHERE scope = ?1 AND is_checkpoint"
                "          AND version < (SELECT version FROM base) ORDER BY version DESC LIMIT ?2)"
                " DELETE FROM versions WHERE scope = ?1 AND version < (SELECT version FROM base)"
                " AND version NOT IN (SELECT version FROM older)",
                (str(scope), keep),
            )

    def delete_scopes(self, scopes: Iterable[ScopeId], at: float) -> None:
        """Forget scopes and raise the session floor over them."""
        with self._transaction() as writer:
            for scope in scopes:
                last = (
                    writer.execute("SELECT max(version) FROM versions WHERE scope = ?", (str(scope),)).get
                    or 0
                )
                floor = max(int(read_meta(writer, "session_floor") or 0), int(last))
                write_meta(writer, "session_floor", str(floor))
                writer.execute("DELETE FROM versions WHERE scope = ?", (str(scope),))
                writer.execute("DELETE FROM scopes WHERE scope = ?", (str(scope),))
                writer.execute("DELETE FROM settling WHERE scope = ?", (str(scope),))
                append_audit(writer, delete_event(scope, int(last), at))

    def frozen(self) -> frozenset[str]:
        """Names of frozen scopes."""
        return frozenset(row[0] for row in self._read("SELECT name FROM frozen"))

    def set_frozen(self, name: str, frozen: bool, at: float) -> None:
        """Freeze or unfreeze a name, durably."""
        change = "INSERT OR IGNORE INTO frozen VALUES (?)" if frozen else "DELETE FROM frozen WHERE name = ?"
        with self._transaction() as writer:
            writer.execute(change, (name,))
            append_audit(writer, freeze_event(name, at, frozen=frozen))

    def audit_trail(self, scope: ScopeId | None, limit: int) -> Sequence[Mapping[str, object]]:
        """The newest events, of everybody or those that name a scope or all scopes, newest first."""
        rows = self._read(
            "SELECT id, hash, event FROM audit"
            " WHERE ?1 = '' OR json_extract(event, '$.scope') IN (?1, ?2) ORDER BY id DESC LIMIT ?3",
            ("" if scope is None else str(scope), EVERY_SCOPE, limit),
        )
        return [{"id": row_id, "hash": link, **json.loads(event)} for row_id, link, event in rows]

    def verify_audit(self) -> int:
        """Walk the audit chain and return its length. Raises StoreCorrupted."""
        with self._reading:
            return verify_chain(self._reader.execute("SELECT id, event, hash FROM audit ORDER BY id"))

    def _read(self, query: str, bindings: tuple[str | int, ...] = ()) -> list[Row]:
        with self._reading:
            return self._reader.execute(query, bindings).fetchall()

    @contextmanager
    def _transaction(self) -> Generator[apsw.Connection]:
        with self._writing:
            self._writer.execute("BEGIN IMMEDIATE")
            try:
                yield self._writer
                self._writer.execute("COMMIT")
            except BaseException:
                if self._writer.in_transaction:
                    self._writer.execute("ROLLBACK")
                raise


def _connect(path: Path) -> apsw.Connection:
    connection = apsw.Connection(str(path))
    try:
        connection.set_busy_timeout(BUSY_TIMEOUT_MS)
        connection.pragma("journal_mode", "wal")
        connection.pragma("synchronous", "full")
    except apsw.NotADBError as error:
        connection.close()
        raise StoreCorrupted(f"{path} is not a key store: {error}") from error
    return connection
