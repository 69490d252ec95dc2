"""What a store of versions must do, and the records it keeps.

Knows rows and bytes, not gravity or searching.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

from keystore.records import Float32Array, Int64Array, ScopeId
from keystore.settling import SettlingState

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
    generation: int  # of the expert pool it was made under


@dataclass(frozen=True, slots=True, eq=False)
class PoolEvent:
    """One change of the expert pool; the first g events make generation g."""

    generation: int  # 1 for the first
    kind: Literal["add", "promote", "retire"]
    name: str  # of the expert group
    scope: ScopeId  # who settles it
    digest: str  # of the expert file
    at: float  # unix seconds
    rows: Mapping[int, RowChanges]  # the group's anchors from now on: given by add and promote


@dataclass(frozen=True, slots=True, eq=False)
class VersionRecord:
    """One version to keep. A checkpoint's changes are against its generation's anchors, else against
    `version - 1`.
    """

    row: VersionRow
    is_checkpoint: bool
    changes: Mapping[int, RowChanges]
    usage: Mapping[int, Float32Array]
    settling: Mapping[int, SettlingState] | None = None  # the scope's from now on; None: as it was


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
    generation: int  # of the expert pool, of the latest version


@dataclass(frozen=True, slots=True)
class CanaryNote:
    """How a version did on the canary, to be kept in the audit trail as `event`."""

    scope: ScopeId
    version: int
    passed: bool
    event: Mapping[str, object]


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

    def commit(
        self,
        records: Sequence[VersionRecord],
        canary: CanaryNote | None = None,
        pool_event: PoolEvent | None = None,
    ) -> None:
        """Keep all or none; durable when it returns.

        Raises VersionConflict when a number is taken, and where others write too, when a version does not follow from
        the scope's latest one.
        """
        ...

    def pool_events(self) -> Sequence[PoolEvent]:
        """Every change of the expert pool, in order. Raises StoreCorrupted."""
        ...

    def settling(self, scope: ScopeId) -> Mapping[int, SettlingState]:
        """What a scope knows of the addresses of its settling experts, by layer. Raises StoreCorrupted."""
        ...

    def note_canary(self, note: CanaryNote) -> None:
        """Keep a note about a version that is stored already, or that will never be."""
        ...

    def passed_version(self, scope: ScopeId) -> int:
        """The version of the newest note that says passed; 0 when there is none."""
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

    def audit_trail(self, scope: ScopeId | None, limit: int) -> Sequence[Mapping[str, object]]:
        """The newest events, of everybody or those that name a scope or all scopes, newest first; each with its
        `id` and `hash` in the chain.
        """
        ...

    def verify_audit(self) -> int:
        """Walk the audit chain and return its length. Raises StoreCorrupted."""
        ...

    def close(self) -> None:
        """Release files and locks."""
        ...
