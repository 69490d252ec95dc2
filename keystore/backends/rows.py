"""Single rows of the embedded backend: how each kind is written, with its audit link, and read back."""

from collections.abc import Mapping
from typing import Any

import apsw

from keystore.backends.audit import GENESIS, canonical_json, chain_hash
from keystore.backends.audit_events import commit_event, experts_event
from keystore.backends.base import CanaryNote, PoolEvent, VersionRecord, VersionRow
from keystore.backends.blobs import event_checksum, pack_changes, pack_settling, unpack_changes
from keystore.errors import KeyStoreError, StoreCorrupted, VersionConflict
from keystore.records import ScopeId
from keystore.settling import SettlingState

Row = tuple[Any, ...]  # Any: STRICT tables give each column the type it was declared with

ROW_COLUMNS = (
    "scope, version, parent, created_at, tokens, drift_max, drift_mean, checksum, reason, generation"
)


def insert_version(writer: apsw.Connection, record: VersionRecord, changes: bytes, usage: bytes) -> None:
    """Store one version with its link of the audit chain. Raises VersionConflict."""
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
            "INSERT INTO versions VALUES (NULL, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?)",
            (scope, row.version, *figures, record.is_checkpoint, changes, usage, row.generation),
        )
    except apsw.ConstraintError as error:
        raise VersionConflict(f"version {row.version} of {scope} is already stored") from error
    append_audit(writer, commit_event(row))


def keep_note(writer: apsw.Connection, note: CanaryNote) -> None:
    """Store the canary's verdict on a version in the audit chain."""
    append_audit(writer, note.event)
    if note.passed:
        write_meta(writer, passed_name(note.scope), str(note.version))


def passed_name(scope: ScopeId) -> str:
    """Where the newest version of a scope that passed the canary is noted."""
    return f"canary passed: {scope}"


def insert_event(writer: apsw.Connection, event: PoolEvent) -> None:
    """Store one change of the expert pool with its link of the audit chain. Raises VersionConflict."""
    checksum = event_checksum(event)
    words = (event.kind, event.name, str(event.scope), event.digest, event.at)
    try:
        writer.execute(
            "INSERT INTO pool_events VALUES (?, ?, ?, ?, ?, ?, ?, ?)",
            (event.generation, *words, pack_changes(event.rows), checksum),
        )
    except apsw.ConstraintError as error:
        raise VersionConflict(
            f"generation {event.generation} of the expert pool is already stored"
        ) from error
    append_audit(writer, experts_event(event))


def keep_settling(writer: apsw.Connection, scope: ScopeId, settling: Mapping[int, SettlingState]) -> None:
    """Replace what a scope knows of its settling experts; nothing to know is no row."""
    writer.execute("DELETE FROM settling WHERE scope = ?", (str(scope),))
    if settling:
        writer.execute("INSERT INTO settling VALUES (?, ?)", (str(scope), pack_settling(settling)))


def append_audit(writer: apsw.Connection, event: Mapping[str, object]) -> None:
    """Add a link to the audit chain."""
    last = writer.execute("SELECT id, hash FROM audit ORDER BY id DESC LIMIT 1").fetchone()
    audit_id, previous = (int(last[0]), str(last[1])) if last else (0, GENESIS)
    text = canonical_json(event)
    writer.execute("INSERT INTO audit VALUES (?, ?, ?)", (audit_id + 1, text, chain_hash(previous, text)))


def read_meta(connection: apsw.Connection, name: str) -> str | None:
    """One of the settings of the file; None when it is not there."""
    row = connection.execute("SELECT value FROM meta WHERE name = ?", (name,)).fetchone()
    return str(row[0]) if row else None


def write_meta(writer: apsw.Connection, name: str, value: str) -> None:
    """Set one of the settings of the file."""
    writer.execute("INSERT OR REPLACE INTO meta VALUES (?, ?)", (name, value))


def version_row(row: Row) -> VersionRow:
    """A row of ROW_COLUMNS as a record."""
    return VersionRow(ScopeId.parse(row[0]), *row[1:])


def pool_event(number: int, checksum: str, *columns: Any) -> PoolEvent:  # Any: see Row
    """A row of pool_events, verified. Raises StoreCorrupted."""
    generation, kind, name, scope, digest, at, rows = columns
    try:
        event = PoolEvent(generation, kind, name, ScopeId.parse(scope), digest, at, unpack_changes(rows))
    except (KeyStoreError, ValueError) as error:
        raise StoreCorrupted(f"event {number} of the expert pool: {error}") from error
    if generation != number or event_checksum(event) != checksum:
        raise StoreCorrupted(f"event {number} of the expert pool does not match its checksum {checksum}")
    return event
