"""What the audit chain says of each kind of change: the same words whatever the backend."""

from collections.abc import Mapping

from keystore.backends.base import PoolEvent, VersionRow
from keystore.backends.blobs import event_checksum
from keystore.records import ScopeId


def commit_event(row: VersionRow) -> Mapping[str, object]:
    """A version came to be."""
    return {
        "event": "commit",
        "scope": str(row.scope),
        "version": row.version,
        "parent": row.parent,
        "at": row.created_at,
        "tokens": row.tokens,
        "checksum": row.checksum,
        "reason": row.reason,
    }


def experts_event(event: PoolEvent) -> Mapping[str, object]:
    """The expert pool changed."""
    return {
        "event": f"{event.kind} experts",
        "name": event.name,
        "scope": str(event.scope),
        "generation": event.generation,
        "at": event.at,
        "digest": event.digest,
        "checksum": event_checksum(event),
    }


def delete_event(scope: ScopeId, last_version: int, at: float) -> Mapping[str, object]:
    """A scope was forgotten."""
    return {"event": "delete", "scope": str(scope), "at": at, "last_version": last_version}


def freeze_event(name: str, at: float, *, frozen: bool) -> Mapping[str, object]:
    """A scope was frozen, or unfrozen."""
    return {"event": "freeze" if frozen else "unfreeze", "scope": name, "at": at}
