"""KeyStore: the versions of every scope, and the one place where they change.

Composes gravity (how), the shelf (what is in memory), the backend (what is durable) and the intake (what
waits). One lock orders everything that changes versions; reading one never takes it. Knows no models, tokens
or HTTP.
"""

import logging
import threading
import time
from collections import Counter
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from keystore.backends.base import EVERY_SCOPE, Backend, VersionRecord, VersionRow
from keystore.counters import StoreCounters
from keystore.errors import InvalidConfig, KeyStoreError, VersionConflict
from keystore.export import read_version, write_version
from keystore.index_builder import IndexBuilder
from keystore.intake import DropReason, Intake, PendingWindow
from keystore.learning import Learner, Progress, create_origin
from keystore.records import Float32Array, GravityConfig, RoutingStats, ScopeId
from keystore.replay import rebuild, record_of
from keystore.shelf import ShelfLimits, VersionShelf
from keystore.snapshot import KeySnapshot

CHECKPOINT_EVERY = 16

logger = logging.getLogger(__name__)


class KeyStore:
    """Thread-safe. Raises InvalidConfig, ModelMismatch on creation.

    `anchors` are copied; only `plastic_layers` ever move. A layer of more than `exact_limit` keys is searched
    through inverted lists. `close` closes `backend` too; a creation that fails leaves it to the caller.
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
        exact_limit: int = 16_384,
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
        self._backend, self._clock = backend, clock
        self._versions_on_disk, self._session_ttl_s = versions_on_disk, session_ttl_s
        self._index_builder = IndexBuilder(exact_limit)
        self._origin = create_origin(model_id, anchors, gravity, plastic_layers, self._index_builder, clock())
        self._learner = Learner(self._origin, gravity, num_experts_per_tok)
        try:
            backend.adopt_model(model_id, self._origin.checksum)
        except BaseException:
            self._index_builder.close()
            raise
        in_memory = ShelfLimits(versions_in_memory, max_sessions)
        self._shelf = VersionShelf(self._origin, backend.heads(), self._load, in_memory, clock)
        self._intake = Intake(queue_size)
        self._frozen = backend.frozen()
        self._session_floor = backend.session_floor()
        self._writing = threading.RLock()
        self._subscribers: dict[object, Callable[[KeySnapshot], None]] = {}
        self._updates: Counter[str] = Counter({"published": 0, "unchanged": 0, "rejected": 0, "failed": 0})
        self._subscriber_failures = 0
        self._last_update_s = self._lag_s = 0.0
        self.last_error: BaseException | None = None

    @property
    def degraded(self) -> bool:
        """True from a failed consolidation until the next that succeeds."""
        return self.last_error is not None

    def view(self, scope: ScopeId, version: int | None = None) -> KeySnapshot:
        """The latest version of a scope, or a given one; 0 is the anchors. Holding the result pins it.

        A session without a version of its own has its tenant's. Raises KeyVersionUnavailable, StoreCorrupted,
        OutOfBounds.
        """
        return self._shelf.latest(scope) if version is None else self._shelf.find(scope, version)

    def submit(self, stats: RoutingStats) -> bool:
        """Queue one window; never blocks. False when dropped and counted: queue full, frozen, not finite.

        Raises InvalidStatistics when layers or shapes are not this store's: a bug of the caller.
        """
        if self.is_frozen(stats.scope):
            self._intake.count_dropped("frozen")
            return False
        self._learner.check_fits(stats)
        if not stats.is_finite:
            self._intake.count_dropped("non_finite")
            return False
        return self._intake.put(stats)

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
        """
        with self._writing:
            windows = self._intake.take_all()
            if not windows:
                return []
            started_s = time.monotonic()
            try:
                published = self._learn(windows)
            except Exception:
                self._intake.give_back(windows)
                raise
            finished_s = time.monotonic()
            self._last_update_s, self._lag_s = finished_s - started_s, finished_s - windows[0].submitted_at_s
            self.last_error = None
            self._after_publishing(published)
            return published

    def note_failure(self, error: BaseException) -> None:
        """Record a failed consolidation: counted, and the store is degraded until one succeeds."""
        self._updates["failed"] += 1
        self.last_error = error

    def rollback(self, scope: ScopeId, to_version: int, *, if_version: int | None = None) -> int:
        """Publish the content of an old version, usage included, as a new one; returns its number.

        Windows that wait for this scope are dropped. Raises KeyVersionUnavailable, VersionConflict.
        """
        reason = f"rollback to {to_version}"
        return self._publish_content(scope, lambda: self._shelf.find(scope, to_version), reason, if_version)

    def reset(self, scope: ScopeId, *, if_version: int | None = None) -> int:
        """Publish the anchors as a new version of the scope; returns its number. Raises VersionConflict."""
        reason = "reset to the anchors"
        return self._publish_content(scope, lambda: self._shelf.find(scope, 0), reason, if_version)

    def snapshot(self, scope: ScopeId, version: int | None, path: Path) -> KeySnapshot:
        """Write a version (None: the latest) to a new safetensors file; returns what was written.

        Raises KeyVersionUnavailable, SnapshotExists; a missing folder or a full disk passes through as OSError.
        """
        view = self.view(scope, version)
        write_version(path, view, self._origin, self.gravity)
        return view

    def restore(self, scope: ScopeId, path: Path, *, if_version: int | None = None) -> int:
        """Publish the content of a snapshot file, usage included, as a new version; returns its number.

        Windows that wait for this scope are dropped. Raises InvalidSnapshot, ModelMismatch, VersionConflict;
        FileNotFoundError passes through.
        """
        content = read_version(path, self._origin, self.gravity)
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
            expired = self._shelf.idle_sessions(now - self._session_ttl_s)
            if expired:
                self._backend.delete_scopes(expired, now)
                self._session_floor = self._backend.session_floor()
                for scope in expired:
                    self._shelf.forget(scope)
            return expired

    def subscribe(self, callback: Callable[[KeySnapshot], None]) -> Callable[[], None]:
        """Call back with every new version after it is published, in order, on the thread that published it.

        Returns the function that ends it. A callback that raises is logged and counted, and the rest go on.
        """
        token = object()
        with self._writing:
            self._subscribers = {**self._subscribers, token: callback}

        def unsubscribe() -> None:
            with self._writing:
                self._subscribers = {key: each for key, each in self._subscribers.items() if key is not token}

        return unsubscribe

    def counters(self) -> StoreCounters:
        """A reading of every counter; never waits for a consolidation."""
        waiting, oldest_s = self._intake.waiting()
        return StoreCounters(
            updates=dict(self._updates),
            dropped=self._intake.dropped(),
            subscriber_failures=self._subscriber_failures,
            last_update_s=self._last_update_s,
            lag_s=self._lag_s,
            waiting_windows=waiting,
            oldest_waiting_s=oldest_s,
            live_sessions=self._shelf.live_sessions(),
            index_recall=self._index_builder.recall(),
            index_builds=self._index_builder.builds(),
        )

    def verify_audit(self) -> int:
        """Walk the audit chain and return its length. Raises StoreCorrupted."""
        return self._backend.verify_audit()

    def close(self) -> None:
        """Close the backend after what is being committed; waiting windows are lost (the worker flushes)."""
        self._index_builder.close()
        with self._writing:
            self._backend.close()

    def _load(self, scope: ScopeId, version: int) -> KeySnapshot:
        return rebuild(self._backend.load(scope, version), self._origin, self.gravity.trust_radius)

    def _learn(self, windows: Sequence[PendingWindow]) -> list[KeySnapshot]:
        scopes: dict[ScopeId, Progress] = {}
        records: list[VersionRecord] = []
        published: list[KeySnapshot] = []
        outcomes: Counter[str] = Counter()
        for stats in (window.stats for window in windows):
            if self.is_frozen(stats.scope):
                outcomes["frozen"] += 1
                continue
            try:
                before = scopes.get(stats.scope) or self._progress(stats.scope)
                version = self._next_version(stats.scope, before.snapshot)
                after = self._learner.advance(before, stats, version, self._clock())
            except (KeyStoreError, ArithmeticError, ValueError):
                logger.exception("window rejected", extra={"scope": str(stats.scope), "tokens": stats.tokens})
                outcomes["rejected"] += 1
                continue
            scopes[stats.scope] = after
            outcomes["unchanged" if after.snapshot is before.snapshot else "published"] += 1
            if after.snapshot is not before.snapshot:
                records.append(self._record(after.snapshot, before.snapshot))
                published.append(after.snapshot)
        if records:
            self._backend.commit(records)
        for snapshot in published:
            self._shelf.publish(snapshot)
        for scope, progress in scopes.items():
            self._shelf.carry(scope, progress.usage, progress.tokens)
        self._intake.count_dropped("frozen", outcomes.pop("frozen", 0))
        self._updates.update(outcomes)
        return published

    def _progress(self, scope: ScopeId) -> Progress:
        history = self._shelf.history(scope)
        if history is not None:
            return Progress(history.latest, history.usage, history.tokens)
        snapshot = self._shelf.latest(scope)
        return Progress(snapshot, snapshot.usage, snapshot.tokens)

    def _next_version(self, scope: ScopeId, base: KeySnapshot) -> int:
        forks = base.scope != scope
        return max(base.version, self._session_floor if forks else 0) + 1

    def _record(self, snapshot: KeySnapshot, base: KeySnapshot) -> VersionRecord:
        starts = base.version == 0 or base.scope != snapshot.scope
        is_checkpoint = starts or snapshot.version % CHECKPOINT_EVERY == 0
        return record_of(snapshot, base, self._origin, self.gravity.trust_radius, is_checkpoint=is_checkpoint)

    def _publish_content(
        self, scope: ScopeId, target: Callable[[], KeySnapshot], reason: str, if_version: int | None
    ) -> int:
        """Keys, usage and tokens of `target` as the scope's next version."""
        with self._writing:
            head = self._shelf.head(scope)
            current = head.version if head else self._shelf.latest(scope).version
            if if_version is not None and if_version != current:
                raise VersionConflict(f"{scope} is at version {current}, not {if_version}")
            floor = self._session_floor if head is None and scope.kind == "session" else 0
            snapshot = replace(
                target(),
                scope=scope,
                version=max(current, floor) + 1,
                parent=current,
                reason=reason,
                created_at=self._clock(),
            )
            radius = self.gravity.trust_radius
            self._backend.commit(
                [record_of(snapshot, self._origin, self._origin, radius, is_checkpoint=True)]
            )
            self._intake.discard(scope)
            self._shelf.publish(snapshot)
            self._after_publishing([snapshot])
            return snapshot.version

    def _set_frozen(self, scope: ScopeId | None, *, frozen: bool) -> None:
        with self._writing:
            self._backend.set_frozen(EVERY_SCOPE if scope is None else str(scope), frozen, self._clock())
            self._frozen = self._backend.frozen()

    def _after_publishing(self, published: Sequence[KeySnapshot]) -> None:
        for snapshot in published:
            for callback in self._subscribers.values():
                try:
                    callback(snapshot)
                except Exception:
                    self._subscriber_failures += 1
                    logger.exception("subscriber failed", extra={"scope": str(snapshot.scope)})
        for scope in {each.scope for each in published if each.version % CHECKPOINT_EVERY == 0}:
            self._backend.thin(scope, self._versions_on_disk)
