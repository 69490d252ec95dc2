"""Versions in one SQLite file through apsw: WAL, synchronous=FULL, one writer, a separate reader.

A commit is one transaction: rows, usage, version and audit link are all there or none is. Does not know
gravity, nor what a blob's rows are applied to.
"""

import fcntl
import os
import threading
from collections.abc import Generator, Iterable, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import apsw

from keystore.backends.audit import GENESIS, canonical_json, chain_hash, verify_chain
from keystore.backends.base import ScopeHead, StoredVersion, VersionRecord, VersionRow
from keystore.backends.blobs import pack_changes, pack_usage, unpack_changes, unpack_usage
from keystore.errors import KeyVersionUnavailable, ModelMismatch, StoreCorrupted, StoreLocked, VersionConflict
from keystore.records import ScopeId

SCHEMA_VERSION = 1
BUSY_TIMEOUT_MS = 5_000

_SCHEMA = """
CREATE TABLE meta (name TEXT PRIMARY KEY, value TEXT NOT NULL) STRICT, WITHOUT ROWID;
CREATE TABLE scopes (
    scope TEXT PRIMARY KEY, first_version INTEGER NOT NULL, forked_from INTEGER NOT NULL
) STRICT, WITHOUT ROWID;
CREATE TABLE versions (
    id INTEGER PRIMARY KEY, scope TEXT NOT NULL, version INTEGER NOT NULL, parent INTEGER NOT NULL,
    created_at REAL NOT NULL, tokens INTEGER NOT NULL, drift_max REAL NOT NULL, drift_mean REAL NOT NULL,
    checksum TEXT NOT NULL, reason TEXT NOT NULL, is_checkpoint INTEGER NOT NULL,
    changes BLOB NOT NULL, usage BLOB NOT NULL
) STRICT;
CREATE UNIQUE INDEX one_version_once ON versions (scope, version);
CREATE TABLE frozen (name TEXT PRIMARY KEY) STRICT, WITHOUT ROWID;
CREATE TABLE audit (id INTEGER PRIMARY KEY, event TEXT NOT NULL, hash TEXT NOT NULL) STRICT;
"""
Row = tuple[Any, ...]  # Any: STRICT tables give each column the type it was declared with

_ROW_COLUMNS = "scope, version, parent, created_at, tokens, drift_max, drift_mean, checksum, reason"


class EmbeddedBackend:
    """A Backend in one file.

    Raises StoreLocked when another process has it, StoreCorrupted on another schema.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        _make_folder(path.parent)
        self._lock_fd = _lock(path.with_name(path.name + ".lock"))
        try:
            os.close(os.open(path, os.O_CREAT | os.O_RDWR, 0o600))  # learned keys derive from prompts
            self._writer, self._reader = _connect(path), _connect(path)
            self._writing, self._reading = threading.Lock(), threading.Lock()
            self._ensure_schema()
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
                stored = _meta(writer, name)
                if stored is None:
                    _set_meta(writer, name, given)
                elif stored != given:
                    raise ModelMismatch(
                        f"{self.path} holds keys of {name} {stored!r}, not of {given!r}; allowed: one model"
                    )

    def heads(self) -> Sequence[ScopeHead]:
        """Every scope that has versions."""
        rows = self._read(
            "SELECT s.scope, s.first_version, s.forked_from, v.version, v.created_at FROM scopes s"
            " JOIN versions v ON v.scope = s.scope"
            " AND v.version = (SELECT max(version) FROM versions WHERE scope = s.scope)"
        )
        return [ScopeHead(ScopeId.parse(scope), *rest) for scope, *rest in rows]

    def session_floor(self) -> int:
        """Highest version number of any deleted session."""
        with self._reading:
            return int(_meta(self._reader, "session_floor") or 0)

    def commit(self, records: Sequence[VersionRecord]) -> None:
        """Keep all or none; durable when it returns. Raises VersionConflict when a number is taken."""
        packed = [(record, pack_changes(record.changes), pack_usage(record.usage)) for record in records]
        with self._transaction() as writer:
            for record, changes, usage in packed:
                _insert_version(writer, record, changes, usage)

    def load(self, scope: ScopeId, version: int) -> StoredVersion:
        """The nearest checkpoint at or below `version` and what follows.

        Raises KeyVersionUnavailable, StoreCorrupted.
        """
        rows = self._read(
            f"SELECT {_ROW_COLUMNS}, changes, usage FROM versions"  # noqa: S608 - constant columns
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
            return StoredVersion(_version_row(rows[-1][:-2]), changes, unpack_usage(rows[-1][-1]))
        except ValueError as error:
            raise StoreCorrupted(f"{scope} version {version}: {error}") from error

    def versions(self, scope: ScopeId) -> Sequence[VersionRow]:
        """What is left of a scope's history, newest first."""
        newest_first = "FROM versions WHERE scope = ? ORDER BY version DESC"
        query = f"SELECT {_ROW_COLUMNS} {newest_first}"
        return [_version_row(row) for row in self._read(query, (str(scope),))]

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
                floor = max(int(_meta(writer, "session_floor") or 0), int(last))
                _set_meta(writer, "session_floor", str(floor))
                writer.execute("DELETE FROM versions WHERE scope = ?", (str(scope),))
                writer.execute("DELETE FROM scopes WHERE scope = ?", (str(scope),))
                _append_audit(
                    writer, {"event": "delete", "scope": str(scope), "at": at, "last_version": last}
                )

    def frozen(self) -> frozenset[str]:
        """Names of frozen scopes."""
        return frozenset(row[0] for row in self._read("SELECT name FROM frozen"))

    def set_frozen(self, name: str, frozen: bool, at: float) -> None:
        """Freeze or unfreeze a name, durably."""
        change = "INSERT OR IGNORE INTO frozen VALUES (?)" if frozen else "DELETE FROM frozen WHERE name = ?"
        with self._transaction() as writer:
            writer.execute(change, (name,))
            _append_audit(writer, {"event": "freeze" if frozen else "unfreeze", "scope": name, "at": at})

    def verify_audit(self) -> int:
        """Walk the audit chain and return its length. Raises StoreCorrupted."""
        with self._reading:
            return verify_chain(self._reader.execute("SELECT id, event, hash FROM audit ORDER BY id"))

    def _ensure_schema(self) -> None:
        with self._transaction() as writer:
            found = writer.pragma("user_version")
            if found == 0 and not writer.execute("SELECT count(*) FROM sqlite_schema").get:
                writer.execute(_SCHEMA)
                writer.pragma("user_version", SCHEMA_VERSION)
            elif found != SCHEMA_VERSION:
                raise StoreCorrupted(f"{self.path} has schema version {found}; allowed: {SCHEMA_VERSION}")

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


def _make_folder(path: Path) -> None:
    """Make a folder and those above it; each is in its parent durably before anything is put into it."""
    if path.is_dir():
        return
    _make_folder(path.parent)
    path.mkdir(exist_ok=True)
    parent = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(parent)
    finally:
        os.close(parent)


def _lock(path: Path) -> int:
    lock_fd = os.open(path, os.O_CREAT | os.O_RDWR, 0o600)
    try:
        fcntl.flock(lock_fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        holder = os.read(lock_fd, 32).decode("ascii", "replace").strip()
        os.close(lock_fd)
        raise StoreLocked(
            f"{path} is held by process {holder or 'unknown'}; allowed: one process a file"
        ) from error
    os.ftruncate(lock_fd, 0)
    os.write(lock_fd, f"{os.getpid()}\n".encode("ascii"))
    return lock_fd


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


def _insert_version(writer: apsw.Connection, record: VersionRecord, changes: bytes, usage: bytes) -> None:
    row = record.row
    scope = str(row.scope)
    writer.execute("INSERT OR IGNORE INTO scopes VALUES (?, ?, ?)", (scope, row.version, row.parent))
    figures = (
        row.parent,
        row.created_at,
        row.tokens,
        row.drift_max,
        row.drift_mean,
        row.checksum,
        row.reason,
    )
    try:
        writer.execute(
            "INSERT INTO versions VALUES (NULL, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?)",
            (scope, row.version, *figures, record.is_checkpoint, changes, usage),
        )
    except apsw.ConstraintError as error:
        raise VersionConflict(f"version {row.version} of {scope} is already stored") from error
    event = {
        "event": "commit",
        "scope": scope,
        "version": row.version,
        "parent": row.parent,
        "at": row.created_at,
    }
    _append_audit(writer, event | {"tokens": row.tokens, "checksum": row.checksum, "reason": row.reason})


def _append_audit(writer: apsw.Connection, event: Mapping[str, object]) -> None:
    last = writer.execute("SELECT id, hash FROM audit ORDER BY id DESC LIMIT 1").fetchone()
    audit_id, previous = (int(last[0]), str(last[1])) if last else (0, GENESIS)
    text = canonical_json(event)
    writer.execute("INSERT INTO audit VALUES (?, ?, ?)", (audit_id + 1, text, chain_hash(previous, text)))


def _meta(connection: apsw.Connection, name: str) -> str | None:
    row = connection.execute("SELECT value FROM meta WHERE name = ?", (name,)).fetchone()
    return str(row[0]) if row else None


def _set_meta(writer: apsw.Connection, name: str, value: str) -> None:
    writer.execute("INSERT OR REPLACE INTO meta VALUES (?, ?)", (name, value))


def _version_row(row: Row) -> VersionRow:
    return VersionRow(ScopeId.parse(row[0]), *row[1:])
