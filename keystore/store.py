"""KeyStore: the versions of every scope as its users see them.

Composes the ledger (what is durable and what is at hand), a learning side (who turns windows into versions) and
the subscribers. One lock orders everything that changes versions; reading one never takes it. Knows no models,
tokens or HTTP.
"""

import threading
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from keystore.backends.base import Backend, VersionRow
from keystore.canary import CanaryReading, Guard
from keystore.counters import ReplicationCounters, StoreCounters
from keystore.errors import CanaryFailed
from keystore.expert_groups import ExpertGroups
from keystore.export import read_version, write_version
from keystore.freezing import FrozenScopes
from keystore.index_builder import IndexBuilder
from keystore.intake import DropReason
from keystore.learning import Learner, create_origin
from keystore.learning_side import LearningSide, LocalLearning, Retention, StoreParts
from keystore.ledger import Ledger, Stored
from keystore.records import Float32Array, GravityConfig, ScopeId, SessionEviction, check_positive
from keystore.shelf import ShelfLimits
from keystore.snapshot import KeySnapshot
from keystore.statistics import RoutingStats
from keystore.subscribers import StoreNews


class KeyStore:
    """Thread-safe. Raises InvalidConfig, ModelMismatch on creation.

    `anchors` are copied; only `plastic_layers` ever move. A layer of more than `exact_limit` keys is searched
    through inverted lists. Above `max_sessions` the session used longest ago leaves memory and, with
    `session_eviction` "discard", the disk. With a `guard`, the global scope publishes nothing that fails the canary, and
    tenants that fail it are rolled back. Without a `learning_side` the store learns by itself. `close` closes
    `backend` too; a creation that fails leaves it to the caller.
    """

    def __init__(
        self,
        model_id: str,
        anchors: Mapping[int, Float32Array],
        gravity: GravityConfig,
        backend: Backend,
        *,
        num_experts_per_tok: int,
        plastic_layers: Collection[int],
        clock: Callable[[], float] = time.time,
        queue_size: int = 64,
        versions_in_memory: int = 8,
        versions_on_disk: int = 64,
        max_sessions: int = 1024,
        session_ttl_s: float = 86_400.0,
        session_eviction: SessionEviction = "save",
        exact_limit: int = 16_384,
        guard: Guard | None = None,
        learning_side: Callable[[StoreParts], LearningSide] | None = None,
    ) -> None:
        check_positive(
            num_experts_per_tok=num_experts_per_tok, queue_size=queue_size, versions_in_memory=versions_in_memory,
            versions_on_disk=versions_on_disk, max_sessions=max_sessions, session_ttl_s=session_ttl_s,
            exact_limit=exact_limit,
        )  # fmt: skip
        self.gravity = gravity
        self._backend, self._guard = backend, guard
        self._writing, self.news, self._admin_rollbacks = threading.RLock(), StoreNews(), 0
        self._retention = Retention(versions_on_disk, session_ttl_s, session_eviction)
        self._index_builder = IndexBuilder(exact_limit)
        origin = create_origin(model_id, anchors, gravity, plastic_layers, self._index_builder, clock())
        in_memory = ShelfLimits(versions_in_memory, max_sessions)
        try:
            if learning_side is None:
                backend.adopt_model(model_id, origin.checksum)
            stored = Stored() if learning_side else Stored.of(backend)
            self._ledger = Ledger(origin, gravity, backend, stored, in_memory, clock)
            self._frozen = FrozenScopes(stored.frozen, backend, clock)
            parts = StoreParts(
                self._ledger, backend, Learner(self._ledger.pool, gravity, num_experts_per_tok), guard, self._frozen,
                self.news, self._retention, clock, self._writing, self._publish, self._publish_content
            )  # fmt: skip
            self.learning = learning_side(parts) if learning_side else LocalLearning(parts, queue_size)
        except BaseException:
            self._index_builder.close()
            raise
        self._learner = parts.learner
        self.experts = ExpertGroups(parts, self.learning)

    @property
    def degraded(self) -> bool:
        """True from a failure of learning or following until it has been made good."""
        return self.last_error is not None

    @property
    def last_error(self) -> BaseException | None:
        """What failed and has not been made good since."""
        return self.learning.last_error

    def view(self, scope: ScopeId, version: int | None = None) -> KeySnapshot:
        """The latest version of a scope, or a given one; 0 is the anchors. Holding the result pins it.

        A session without a version of its own has its tenant's. Raises KeyVersionUnavailable, StoreCorrupted,
        OutOfBounds, and StoreUnavailable for what is not in memory while a shared store is away.
        """
        return (
            self._ledger.shelf.latest(scope) if version is None else self._ledger.shelf.find(scope, version)
        )

    def submit(self, stats: RoutingStats, done: Callable[[], None] | None = None) -> bool:
        """Hand in one window; never blocks. False when dropped and counted: queue full, frozen, not finite.

        `done` is called, on some other thread, when a window that was taken has been learned and published, or
        rejected or dropped after all. Raises InvalidStatistics when layers or shapes are not this store's: a bug of the caller.
        """
        if self.is_frozen(stats.scope):
            self.learning.count_dropped("frozen")
            return False
        replace(self._learner, pool=self._ledger.pool).check_fits(stats)
        if not stats.is_finite:
            self.learning.count_dropped("non_finite")
            return False
        return self.learning.submit(stats, done)

    def count_dropped(self, reason: DropReason) -> None:
        """Count a window that never became statistics, as after NonFiniteStatistics."""
        self.learning.count_dropped(reason)

    def consolidate_once(self) -> list[KeySnapshot]:
        """Have every waiting window learned; the new versions. What fails passes through, and the windows wait again."""
        return self.learning.consolidate_once()

    def rollback(self, scope: ScopeId, to_version: int, *, if_version: int | None = None) -> int:
        """Publish the content of an old version, usage included, as a new one; returns its number.

        Windows that wait for this scope are dropped. Raises KeyVersionUnavailable, VersionConflict,
        StoreUnavailable.
        """
        reason = f"rollback to {to_version}"
        version = self._replace(scope, lambda: self._ledger.shelf.find(scope, to_version), reason, if_version)
        self._admin_rollbacks += 1
        return version

    def reset(self, scope: ScopeId, *, if_version: int | None = None) -> int:
        """Publish the anchors as a new version of the scope; returns its number. Raises as `rollback` does."""
        reason = "reset to the anchors"
        return self._replace(scope, lambda: self._ledger.shelf.find(scope, 0), reason, if_version)

    def snapshot(self, scope: ScopeId, version: int | None, path: Path) -> KeySnapshot:
        """Write a version (None: the latest) to a new safetensors file; returns what was written.

        Raises KeyVersionUnavailable, SnapshotExists; a missing folder or a full disk passes through as OSError.
        """
        view = self.view(scope, version)
        write_version(path, view, self._ledger.pool_of(view), self.gravity.for_scope(scope))
        return view

    def restore(self, scope: ScopeId, path: Path, *, if_version: int | None = None) -> int:
        """Publish the content of a snapshot file, usage included, as a new version; returns its number.

        Windows that wait for this scope are dropped. Raises InvalidSnapshot, ModelMismatch, CanaryFailed, and
        VersionConflict also when the expert pool changes meanwhile; FileNotFoundError passes through.
        """
        content = read_version(path, scope, self._ledger.generations, self.gravity.for_scope(scope))
        if self._guard is not None and scope.kind == "global":
            reading = self._guard.judge(replace(content, scope=scope), self._ledger.anchors)
            if not reading.passed:
                raise CanaryFailed(f"{path.name}: {reading}; allowed: {self._guard.config.allowed}")
        reason = f"restore of {path.name}, there version {content.version}"
        return self._replace(scope, lambda: content, reason, if_version)

    def freeze(self, scope: ScopeId | None = None) -> None:
        """Stop learning of one scope (a tenant's sessions included) or of all, durably."""
        with self._writing:
            self._frozen.change(scope, frozen=True)

    def unfreeze(self, scope: ScopeId | None = None) -> None:
        """Undo a `freeze` of the same scope."""
        with self._writing:
            self._frozen.change(scope, frozen=False)

    def is_frozen(self, scope: ScopeId | None = None) -> bool:
        """Whether a scope learns nothing, by itself, by its tenant or because everything is frozen."""
        return self._frozen.has(scope)

    def versions(self, scope: ScopeId) -> Sequence[VersionRow]:
        """Metadata of the scope's own kept versions, newest first; version 0 is not among them."""
        return self._backend.versions(scope)

    def scopes(self) -> list[ScopeId]:
        """Every scope with versions of its own, by name."""
        return [head.scope for head in self._ledger.shelf.heads()]

    def counters(self) -> StoreCounters:
        """A reading of every counter; never waits for a consolidation."""
        learning = self.learning.counters()
        return StoreCounters(
            updates=learning.updates,
            rollbacks={"admin": self._admin_rollbacks, "canary": learning.canary_rollbacks},
            dropped=learning.dropped,
            subscriber_failures=self.news.failures,
            last_update_s=learning.last_update_s,
            lag_s=learning.lag_s,
            waiting_windows=learning.waiting_windows,
            oldest_waiting_s=learning.oldest_waiting_s,
            live_sessions=self._ledger.shelf.live_sessions(),
            index_recall=self._index_builder.recall(),
            index_builds=self._index_builder.builds(),
            operations=self._ledger.durations.reading(),
        )

    def replication(self) -> ReplicationCounters | None:
        """How this store keeps up with those that it shares its versions with; None when it has them alone."""
        return self.learning.replication()

    def canary_readings(self) -> Mapping[ScopeId, CanaryReading]:
        """The newest reading of every scope that was judged since the start; empty without a guard."""
        return {} if self._guard is None else self._guard.readings()

    def audit_trail(self, scope: ScopeId | None, limit: int) -> Sequence[Mapping[str, object]]:
        """What happened to a scope (None: to any), newest first: commits, verdicts, freezes, deletions."""
        return self._backend.audit_trail(scope, limit)

    def verify_audit(self) -> int:
        """Walk the audit chain and return its length. Raises StoreCorrupted."""
        return self._backend.verify_audit()

    def close(self) -> None:
        """Close the backend after what is being committed; waiting windows are lost (the worker flushes)."""
        self._index_builder.close()
        with self.learning.closing(), self._writing:
            self._backend.close()

    def _replace(
        self, scope: ScopeId, target: Callable[[], KeySnapshot], reason: str, if_version: int | None
    ) -> int:
        return self.learning.by_hand(lambda: self._publish_content(scope, target, reason, if_version))

    def _publish_content(
        self, scope: ScopeId, target: Callable[[], KeySnapshot], reason: str, if_version: int | None
    ) -> int:
        """Keys, usage and tokens of `target` as the scope's next version."""
        with self._writing:
            snapshot = self._ledger.publish_content(scope, target, reason, if_version)
            self.news.replaced.notify([scope])  # first: a window handed in meanwhile is discarded below
            self.learning.discard(scope)
            self._publish([snapshot])
            return snapshot.version

    def _publish(self, published: Sequence[KeySnapshot]) -> None:
        self.news.published.notify(published)
        self._ledger.thin(published, self._retention.versions_on_disk)
