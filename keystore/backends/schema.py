"""Tables of the embedded backend, and how a file of an older schema gets there."""

from pathlib import Path

import apsw

from keystore.errors import StoreCorrupted

SCHEMA_VERSION = 2

_POOL_EVENTS = """
CREATE TABLE pool_events (
    generation INTEGER PRIMARY KEY, kind TEXT NOT NULL, name TEXT NOT NULL, scope TEXT NOT NULL,
    digest TEXT NOT NULL, at REAL NOT NULL, rows BLOB NOT NULL, checksum TEXT NOT NULL
) STRICT;
"""
_SETTLING = "CREATE TABLE settling (scope TEXT PRIMARY KEY, state BLOB NOT NULL) STRICT, WITHOUT ROWID;"
_SCHEMA = f"""
CREATE TABLE meta (name TEXT PRIMARY KEY, value TEXT NOT NULL) STRICT, WITHOUT ROWID;
CREATE TABLE scopes (
    scope TEXT PRIMARY KEY, first_version INTEGER NOT NULL, forked_from INTEGER NOT NULL
) STRICT, WITHOUT ROWID;
CREATE TABLE versions (
    id INTEGER PRIMARY KEY, scope TEXT NOT NULL, version INTEGER NOT NULL, parent INTEGER NOT NULL,
    created_at REAL NOT NULL, tokens INTEGER NOT NULL, drift_max REAL NOT NULL, drift_mean REAL NOT NULL,
    checksum TEXT NOT NULL, reason TEXT NOT NULL, is_checkpoint INTEGER NOT NULL,
    changes BLOB NOT NULL, usage BLOB NOT NULL, generation INTEGER NOT NULL DEFAULT 0
) STRICT;
CREATE UNIQUE INDEX one_version_once ON versions (scope, version);
CREATE TABLE frozen (name TEXT PRIMARY KEY) STRICT, WITHOUT ROWID;
CREATE TABLE audit (id INTEGER PRIMARY KEY, event TEXT NOT NULL, hash TEXT NOT NULL) STRICT;
{_POOL_EVENTS}{_SETTLING}"""
_FROM_1_TO_2 = (
    f"ALTER TABLE versions ADD COLUMN generation INTEGER NOT NULL DEFAULT 0;{_POOL_EVENTS}{_SETTLING}"
)


def ensure_schema(writer: apsw.Connection, path: Path) -> None:
    """Within a transaction: make the tables of an empty file, bring schema 1 up to date.

    Raises StoreCorrupted on any other.
    """
    found = writer.pragma("user_version")
    if found == SCHEMA_VERSION:
        return
    is_empty = not writer.execute("SELECT count(*) FROM sqlite_schema").get
    if found == 0 and is_empty:
        writer.execute(_SCHEMA)
    elif found == 1:
        writer.execute(_FROM_1_TO_2)
    else:
        raise StoreCorrupted(f"{path} has schema version {found}; allowed: 1 to {SCHEMA_VERSION}")
    writer.pragma("user_version", SCHEMA_VERSION)
