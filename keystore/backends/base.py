"""What a store of versions must do, and the records it keeps.

Knows rows and bytes, not gravity or searching.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

from keystore.records import Float32Array, Int64Array, ScopeId

EVERY_SCOPE = "*"  # the frozen name that stands for all of them


@dataclass(frozen=True, slots=True, eq=False)
class RowChanges:
    """Some rows of one layer with their new values."""

    expert_ids: Int64Array  # (R,), rising
    rows: Float32Array  # (R, D)


@dataclass(frozen=True, slots=True)
class VersionRow:
    """Metadata of one version."""

    scope: ScopeId
    version: int
    parent: int
    created_at: float  # unix seconds
    tokens: int  # learned so far
    drift_max: float  # fraction of the trust radius, plastic layers
    drift_mean: float
    checksum: str
    reason: str


@dataclass(frozen=True, slots=True, eq=False)
class VersionRecord:
    """One version to keep. A checkpoint's changes are against the anchors, else against `version - 1`."""

    row: VersionRow
    is_checkpoint: bool
    changes: Mapping[int, RowChanges]
    usage: Mapping[int, Float32Array]


@dataclass(frozen=True, slots=True, eq=False)
class StoredVersion:
    """One version as kept: apply `changes` to the anchors in order."""

    row: VersionRow
    changes: Sequence[Mapping[int, RowChanges]]
    usage: Mapping[int, Float32Array]


@dataclass(frozen=True, slots=True)
class ScopeHead:
    """Where a scope with versions of its own stands."""

    scope: ScopeId
    first_version: int
    forked_from: int  # version of the parent scope, 0 for the anchors
    version: int  # latest
    created_at: float  # of the latest version, unix seconds


class Backend(Protocol):
    """Durable home of one model's versions. Every method may be called from any thread."""

    def adopt_model(self, model_id: str, anchors_checksum: str) -> None:
        """Claim an empty store for a model, or check that it is this one's. Raises ModelMismatch."""
        ...

    def heads(self) -> Sequence[ScopeHead]:
        """Every scope that has versions."""
        ...

    def session_floor(self) -> int:
        """Highest version number of any deleted session: a new one starts above it, so numbers never come
        back.
        """
        ...

    def commit(self, records: Sequence[VersionRecord]) -> None:
        """Keep all or none; durable when it returns. Raises VersionConflict when a number is taken."""
        ...

    def load(self, scope: ScopeId, version: int) -> StoredVersion:
        """Raises KeyVersionUnavailable, StoreCorrupted."""
        ...

    def versions(self, scope: ScopeId) -> Sequence[VersionRow]:
        """What is left of a scope's history, newest first."""
        ...

    def thin(self, scope: ScopeId, keep: int) -> None:
        """Drop all but the newest `keep`, what those are rebuilt from, and `keep` older checkpoints."""
        ...

    def delete_scopes(self, scopes: Iterable[ScopeId], at: float) -> None:
        """Forget scopes and raise the session floor over them."""
        ...

    def frozen(self) -> frozenset[str]:
        """Names of frozen scopes."""
        ...

    def set_frozen(self, name: str, frozen: bool, at: float) -> None:
        """Freeze or unfreeze a name, durably."""
        ...

    def verify_audit(self) -> int:
        """Walk the audit chain and return its length. Raises StoreCorrupted."""
        ...

    def close(self) -> None:
        """Release files and locks."""
        ...
