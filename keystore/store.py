"""KeyStore: the versions of every scope, and the one place where they change.

Composes gravity (how), the shelf (what is in memory), the backend (what is durable) and the intake (what
waits). One lock orders everything that changes versions; reading one never takes it. Knows no models, tokens
or HTTP.
"""

import threading
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from keystore.backends.base import EVERY_SCOPE, Backend, PoolEvent, VersionRow
from keystore.canary import CanaryReading, Guard, log_failed, note_of
from keystore.consolidation import Consolidation
from keystore.counters import StoreCounters
from keystore.errors import (
    CanaryFailed,
    InvalidConfig,
    VersionConflict,
    WrongGroupState,
)
from keystore.export import read_version, write_version
from keystore.index_builder import IndexBuilder
from keystore.intake import DropReason, Intake
from keystore.learning import Learner, create_origin
from keystore.ledger import Ledger
from keystore.pool import ExpertGroup
from keystore.records import Float32Array, GravityConfig, Int64Array, ScopeId, SessionEviction
from keystore.settling_watch import LayerSettling
from keystore.shelf import ShelfLimits
from keystore.snapshot import KeySnapshot
from keystore.statistics import RoutingStats
from keystore.subscribers import Subscribers


class KeyStore:
    """Thread-safe. Raises InvalidConfig, ModelMismatch on creation.

    `anchors` are copied; only `plastic_layers` ever move. A layer of more than `exact_limit` keys is searched
    through inverted lists. Above `max_sessions` the session used longest ago leaves memory and, with
    `session_eviction` "discard", the disk. With a `guard`, the global scope publishes nothing that fails the canary, and
    tenants that fail it are rolled back. `close` closes `backend` too; a creation that fails leaves it to the
    caller.
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
    ) -> None:
        if not set(plastic_layers) <= anchors.keys():
            raise InvalidConfig("plastic_layers", sorted(plastic_layers), f"some of {sorted(anchors)}")
        limits = {
            "queue_size": queue_size,
            "versions_in_memory": versions_in_memory,
            "versions_on_disk": versions_on_disk,
            "max_sessions": max_sessions,
            "num_experts_per_tok": num_experts_per_tok,
            "session_ttl_s": session_ttl_s,
            "exact_limit": exact_limit,
        }
        for name, value in limits.items():
            if not value > 0:
                raise InvalidConfig(name, value, "more than 0")
        self.gravity = gravity
        self._backend, self._clock, self._guard = backend, clock, guard
        self._versions_on_disk, self._session_ttl_s = versions_on_disk, session_ttl_s
        self._session_eviction: SessionEviction = session_eviction
        self._index_builder = IndexBuilder(exact_limit)
        origin = create_origin(model_id, anchors, gravity, plastic_layers, self._index_builder, clock())
        in_memory = ShelfLimits(versions_in_memory, max_sessions)
        try:
            backend.adopt_model(model_id, origin.checksum)
            self._ledger = Ledger(origin, gravity, backend, in_memory, clock)
        except BaseException:
            self._index_builder.close()
            raise
        self._shelf = self._ledger.shelf
        self._intake = Intake(queue_size)
        self._frozen = backend.frozen()
        self._writing = threading.RLock()
        self._subscribers = Subscribers[KeySnapshot]()
        self._deleted = Subscribers[ScopeId]()
        self._replaced = Subscribers[ScopeId]()
        self._admin_rollbacks = 0
        self._consolidation = Consolidation(
            self._ledger,
            Learner(self._ledger.pool, gravity, num_experts_per_tok),
            self._intake,
            backend,
            guard,
            clock,
            writing=self._writing,
            is_frozen=self.is_frozen,
            publish=self._after_publishing,
            return_to=self._publish_content,
        )

    @property
    def degraded(self) -> bool:
        """True from a failed consolidation until the next that succeeds."""
        return self.last_error is not None

    @property
    def last_error(self) -> BaseException | None:
        """What failed since the last consolidation that succeeded."""
        return self._consolidation.last_error

    def view(self, scope: ScopeId, version: int | None = None) -> KeySnapshot:
        """The latest version of a scope, or a given one; 0 is the anchors. Holding the result pins it.

        A session without a version of its own has its tenant's. Raises KeyVersionUnavailable, StoreCorrupted,
        OutOfBounds.
        """
        return self._shelf.latest(scope) if version is None else self._shelf.find(scope, version)

    def submit(self, stats: RoutingStats, done: Callable[[], None] | None = None) -> bool:
        """Queue one window; never blocks. False when dropped and counted: queue full, frozen, not finite.

        `done` is called, on the thread that learns, when a queued window has been learned and published, or
        rejected or dropped after all. Raises InvalidStatistics when layers or shapes are not this store's: a bug of the caller.
        """
        if self.is_frozen(stats.scope):
            self._intake.count_dropped("frozen")
            return False
        self._consolidation.check_fits(stats)
        if not stats.is_finite:
            self._intake.count_dropped("non_finite")
            return False
        return self._intake.put(stats, done)

    def count_dropped(self, reason: DropReason) -> None:
        """Count a window that never became statistics, as after NonFiniteStatistics."""
        self._intake.count_dropped(reason)

    def wait_for_windows(self, timeout_s: float) -> bool:
        """Sleep until a window waits, `wake` is called or time is up; True when a window waits."""
        return self._intake.wait(timeout_s)

    def wake(self) -> None:
        """End every `wait_for_windows` now."""
        self._intake.wake()

    def consolidate_once(self) -> list[KeySnapshot]:
        """Learn every waiting window in order, commit durably in one transaction, publish, notify.

        Returns the new versions. When the commit fails the windows wait again and the error passes through.
        With a guard, the windows of the global scope become one version, which is published if it passes the
        canary, and tenants whose turn it is are judged after publishing.
        """
        published = self._consolidation.run_once()
        if self._session_eviction == "discard":
            with self._writing:
                self._forget(self._ledger.discard_excess_sessions(self._clock()))
        return published

    def note_failure(self, error: BaseException) -> None:
        """Record a failed consolidation: counted, and the store is degraded until one succeeds."""
        self._consolidation.updates["failed"] += 1
        self._consolidation.last_error = error

    def rollback(self, scope: ScopeId, to_version: int, *, if_version: int | None = None) -> int:
        """Publish the content of an old version, usage included, as a new one; returns its number.

        Windows that wait for this scope are dropped. Raises KeyVersionUnavailable, VersionConflict.
        """
        reason = f"rollback to {to_version}"
        version = self._publish_content(
            scope, lambda: self._shelf.find(scope, to_version), reason, if_version
        )
        self._admin_rollbacks += 1
        return version

    def reset(self, scope: ScopeId, *, if_version: int | None = None) -> int:
        """Publish the anchors as a new version of the scope; returns its number. Raises VersionConflict."""
        reason = "reset to the anchors"
        return self._publish_content(scope, lambda: self._shelf.find(scope, 0), reason, if_version)

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
        return self._publish_content(scope, lambda: content, reason, if_version)

    def freeze(self, scope: ScopeId | None = None) -> None:
        """Stop learning of one scope (a tenant's sessions included) or of all, durably."""
        self._set_frozen(scope, frozen=True)

    def unfreeze(self, scope: ScopeId | None = None) -> None:
        """Undo a `freeze` of the same scope."""
        self._set_frozen(scope, frozen=False)

    def is_frozen(self, scope: ScopeId | None = None) -> bool:
        """Whether a scope learns nothing, by itself, by its tenant or because everything is frozen."""
        frozen = self._frozen
        if EVERY_SCOPE in frozen or scope is None:
            return EVERY_SCOPE in frozen
        return str(scope) in frozen or (scope.parent is not None and str(scope.parent) in frozen)

    def add_experts(
        self, name: str, scope: ScopeId, keys: Mapping[int, Float32Array], digest: str
    ) -> ExpertGroup:
        """Append experts with initial `keys` (n, D) by plastic layer, durably, to settle in `scope`.

        Nobody else sees them, and while they settle nothing else moves there. Their ids never come back. Raises
        InvalidExperts, ExpertGroupExists.
        """
        with self._writing:
            return self._change_pool(self._ledger.pool.add(name, scope, keys, digest, self._clock()))

    def promote_experts(self, name: str) -> ExpertGroup:
        """Make where a group has settled its anchors, which everybody sees and nobody leaves by more than the
        trust radius.

        With a guard these are judged first, as they are now, while learning goes on. Raises UnknownExpertGroup,
        WrongGroupState, CanaryFailed, and VersionConflict when the expert pool changes meanwhile.
        """
        with self._writing:
            pool, anchors = self._ledger.pool, self._ledger.anchors
            settled = self.view(pool.group(name).scope).keys
            event = pool.promote(name, settled, self._clock())
            if self._guard is None:
                return self._change_pool(event)
            following = self._ledger.generations.after(event).anchors
        reading = self._guard.judge_anchors(following, anchors)
        self._backend.note_canary(note_of(reading))
        if not reading.passed:
            log_failed(reading, f"experts {name} are not promoted")
            raise CanaryFailed(f"experts {name}: {reading}; allowed: {self._guard.config.allowed}")
        with self._writing:
            if self._ledger.pool is not pool:
                raise VersionConflict(f"the expert pool changed while the promotion of {name} was judged")
            return self._change_pool(event)

    def retire_experts(self, name: str) -> ExpertGroup:
        """Hide a group from everybody; requests that hold an older version go on.

        Raises UnknownExpertGroup, WrongGroupState.
        """
        with self._writing:
            return self._change_pool(self._ledger.pool.retire(name, self._clock()))

    def expert_groups(self) -> list[ExpertGroup]:
        """Every group there ever was, in the order they were added."""
        return list(self._ledger.pool.groups.values())

    def settling_ids(self, scope: ScopeId) -> Mapping[int, Int64Array]:
        """Rising ids of the experts that look for their address in a scope, by layer; layers without any left out."""
        pool = self._ledger.pool
        ids = {layer: pool.settles_in(scope, layer) for layer in pool.plastic_layers}
        return {layer: each for layer, each in ids.items() if len(each)}

    def settling(self, name: str) -> Mapping[int, LayerSettling]:
        """How a settling group moves, by layer. Raises UnknownExpertGroup, WrongGroupState."""
        pool = self._ledger.pool
        group = pool.group(name)
        if group.state != "settling":
            raise WrongGroupState(f"expert group {name!r} is {group.state}; only a settling one moves freely")
        return self._consolidation.settling.read(pool, group, self._ledger.progress(group.scope))

    def versions(self, scope: ScopeId) -> Sequence[VersionRow]:
        """Metadata of the scope's own kept versions, newest first; version 0 is not among them."""
        return self._backend.versions(scope)

    def scopes(self) -> list[ScopeId]:
        """Every scope with versions of its own, by name."""
        return [head.scope for head in self._shelf.heads()]

    def expire_sessions(self, now: float) -> list[ScopeId]:
        """Delete, durably, sessions that nobody viewed or taught for `session_ttl_s` before `now` (unix
        seconds).
        """
        with self._writing:
            expired = self._ledger.expire_sessions(now - self._session_ttl_s, now)
            self._forget(expired)
            return expired

    def subscribe(self, callback: Callable[[KeySnapshot], None]) -> Callable[[], None]:
        """Call back with every new version after it is published, in order, on the thread that published it.

        Returns the function that ends it. A callback that raises is logged and counted, and the rest go on.
        """
        return self._subscribers.add(callback)

    def subscribe_deleted(self, callback: Callable[[ScopeId], None]) -> Callable[[], None]:
        """The same for every session that is deleted: expired, or discarded above `max_sessions`."""
        return self._deleted.add(callback)

    def subscribe_replaced(self, callback: Callable[[ScopeId], None]) -> Callable[[], None]:
        """The same for every scope whose keys were replaced, not learned: by rollback, reset, restore or the guard.

        What was being gathered to teach it was about the keys that it had.
        """
        return self._replaced.add(callback)

    def counters(self) -> StoreCounters:
        """A reading of every counter; never waits for a consolidation."""
        waiting, oldest_s = self._intake.waiting()
        learning = self._consolidation
        return StoreCounters(
            updates=dict(learning.updates),
            rollbacks={"admin": self._admin_rollbacks, "canary": learning.canary_rollbacks},
            dropped=self._intake.dropped(),
            subscriber_failures=sum(
                each.failures for each in (self._subscribers, self._deleted, self._replaced)
            ),
            last_update_s=learning.last_update_s,
            lag_s=learning.lag_s,
            waiting_windows=waiting,
            oldest_waiting_s=oldest_s,
            live_sessions=self._shelf.live_sessions(),
            index_recall=self._index_builder.recall(),
            index_builds=self._index_builder.builds(),
        )

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
        with self._consolidation.running, self._writing:
            self._backend.close()

    def _publish_content(
        self, scope: ScopeId, target: Callable[[], KeySnapshot], reason: str, if_version: int | None
    ) -> int:
        """Keys, usage and tokens of `target` as the scope's next version."""
        with self._writing:
            snapshot = self._ledger.publish_content(scope, target, reason, if_version)
            self._replaced.notify([scope])  # first: a window handed in meanwhile is discarded below
            self._intake.discard(scope)
            self._after_publishing([snapshot])
            return snapshot.version

    def _change_pool(self, event: PoolEvent) -> ExpertGroup:
        published = self._ledger.change_pool(event)
        self._consolidation.use_pool(self._ledger.pool)
        self._after_publishing(published)
        return self._ledger.pool.groups[event.name]

    def _forget(self, deleted: Sequence[ScopeId]) -> None:
        for scope in deleted:
            self._intake.discard(scope)
        self._deleted.notify(deleted)

    def _set_frozen(self, scope: ScopeId | None, *, frozen: bool) -> None:
        with self._writing:
            self._backend.set_frozen(EVERY_SCOPE if scope is None else str(scope), frozen, self._clock())
            self._frozen = self._backend.frozen()

    def _after_publishing(self, published: Sequence[KeySnapshot]) -> None:
        self._subscribers.notify(published)
        self._ledger.thin(published, self._versions_on_disk)
