"""Where the scopes stand: one line each, and which versions may follow."""

import json
from collections.abc import Mapping, Sequence

from keystore.backends.base import ScopeHead, VersionRecord
from keystore.backends.redis_records import parse_columns
from keystore.errors import KeyStoreError, StoreCorrupted, VersionConflict
from keystore.records import ScopeId

_HEAD = (int, int, int, float, int)  # ScopeHead without its scope


def pack_head(head: ScopeHead) -> str:
    """A head without its scope's name."""
    return json.dumps(
        [head.first_version, head.forked_from, head.version, float(head.created_at), head.generation]
    )


def unpack_head(scope: bytes, line: bytes) -> ScopeHead:
    """Inverse of `pack_head`. Raises StoreCorrupted."""
    columns = parse_columns(line, f"the head of {scope!r}", _HEAD)
    try:
        return ScopeHead(ScopeId.parse(scope.decode()), *columns)
    except (KeyStoreError, UnicodeDecodeError) as error:
        raise StoreCorrupted(f"the head of {scope!r}: {error}") from error


def heads_after(
    heads: Mapping[ScopeId, ScopeHead], records: Sequence[VersionRecord]
) -> Mapping[ScopeId, ScopeHead]:
    """The heads after `records`. Raises VersionConflict when one does not follow from its scope's latest version."""
    after = dict(heads)
    for record in records:
        row, head = record.row, after.get(record.row.scope)
        if head is None and not record.is_checkpoint:
            raise VersionConflict(f"{row.scope} has no version {row.version - 1}: it was deleted meanwhile")
        if head is not None and row.version <= head.version:
            raise VersionConflict(f"version {row.version} of {row.scope} is already stored")
        if head is not None and row.parent != head.version:
            raise VersionConflict(f"{row.scope} is at version {head.version}, not {row.parent}")
        first, forked_from = (head.first_version, head.forked_from) if head else (row.version, row.parent)
        after[row.scope] = ScopeHead(
            row.scope, first, forked_from, row.version, row.created_at, row.generation
        )
    return after
