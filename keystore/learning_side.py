"""Who learns what a store is taught: this process (LocalLearning), or workers elsewhere (keystore.replica)."""

import threading
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Protocol, TypeVar

from keystore.backends.base import Backend
from keystore.canary import Guard
from keystore.consolidation import Consolidation
from keystore.counters import LearningCounters, ReplicationCounters
from keystore.freezing import FrozenScopes
from keystore.intake import DropReason, Intake
from keystore.learning import Learner
from keystore.ledger import Ledger
from keystore.records import ScopeId, SessionEviction
from keystore.settling_watch import SettlingWatch
from keystore.snapshot import KeySnapshot
from keystore.statistics import RoutingStats
from keystore.subscribers import StoreNews

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Retention:
    """What is kept, and for how long."""

    versions_on_disk: int
    session_ttl_s: float
    session_eviction: SessionEviction


@dataclass(frozen=True, slots=True, eq=False)
class StoreParts:
    """The parts of a store that learning changes. `writing` orders everything that changes versions."""

    ledger: Ledger
    backend: Backend
    learner: Learner
    guard: Guard | None
    frozen: FrozenScopes
    news: StoreNews
    retention: Retention
    clock: Callable[[], float]
    writing: threading.RLock
    publish: Callable[[Sequence[KeySnapshot]], None]  # tells of versions that were committed; under `writing`
    return_to: Callable[  # see KeyStore.rollback
        [ScopeId, Callable[[], KeySnapshot], str, int | None], int
    ]


class LearningSide(Protocol):
    """Takes windows; what becomes of them appears as versions of the store."""

    @property
    def last_error(self) -> BaseException | None:
        """What failed and has not been made good since."""
        ...

    @property
    def settling(self) -> SettlingWatch:
        """How experts that look for an address have moved."""
        ...

    def submit(self, stats: RoutingStats, done: Callable[[], None] | None) -> bool:
        """Take a finite window that fits the store and whose scope learns; False when dropped and counted."""
        ...

    def count_dropped(self, reason: DropReason) -> None:
        """Count a window that never became statistics."""
        ...

    def discard(self, scope: ScopeId) -> None:
        """Drop the scope's waiting windows: somebody has just replaced its keys."""
        ...

    def consolidate_once(self) -> list[KeySnapshot]:
        """Learn every waiting window; the new versions."""
        ...

    def by_hand(self, change: Callable[[], T]) -> T:
        """Make a change that a person asked for, which may find that the versions at hand are not the newest."""
        ...

    def turn(self) -> None:
        """Go on with the ledger's new generation of the expert pool; called under the store's lock."""
        ...

    def counters(self) -> LearningCounters:
        """A reading of every counter."""
        ...

    def replication(self) -> ReplicationCounters | None:
        """How far this store follows others; None when there are no others."""
        ...

    def closing(self) -> AbstractContextManager[object]:
        """Entered when nothing is being learned; nothing will be after that."""
        ...


class LocalLearning:
    """Consolidates in this process, on whatever thread calls `consolidate_once`. Thread-safe."""

    def __init__(self, parts: StoreParts, queue_size: int) -> None:
        self._parts = parts
        self._intake = Intake(queue_size)
        self._consolidation = Consolidation(
            parts.ledger,
            parts.learner,
            self._intake,
            parts.backend,
            parts.guard,
            parts.clock,
            writing=parts.writing,
            is_frozen=parts.frozen.has,
            publish=parts.publish,
            return_to=parts.return_to,
        )

    @property
    def last_error(self) -> BaseException | None:
        """What failed since the last consolidation that succeeded."""
        return self._consolidation.last_error

    @property
    def settling(self) -> SettlingWatch:
        """How experts that look for an address have moved."""
        return self._consolidation.settling

    def submit(self, stats: RoutingStats, done: Callable[[], None] | None) -> bool:
        """Queue a window; never blocks. False when dropped and counted: the queue is full."""
        return self._intake.put(stats, done)

    def count_dropped(self, reason: DropReason) -> None:
        """Count a window that never became statistics."""
        self._intake.count_dropped(reason)

    def discard(self, scope: ScopeId) -> None:
        """Drop the scope's waiting windows."""
        self._intake.discard(scope)

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
        if self._parts.retention.session_eviction == "discard":
            with self._parts.writing:
                self._forget(self._parts.ledger.discard_excess_sessions(self._parts.clock()))
        return published

    def note_failure(self, error: BaseException) -> None:
        """Record a failed consolidation: counted, and the store is degraded until one succeeds."""
        self._consolidation.updates["failed"] += 1
        self._consolidation.last_error = error

    def expire_sessions(self, now: float) -> list[ScopeId]:
        """Delete, durably, sessions that nobody viewed or taught for `session_ttl_s` before `now` (unix
        seconds).
        """
        with self._parts.writing:
            unused_since = now - self._parts.retention.session_ttl_s
            expired = self._parts.ledger.expire_sessions(unused_since, now)
            self._forget(expired)
            return expired

    def by_hand(self, change: Callable[[], T]) -> T:
        """Make the change: nobody else makes versions."""
        return change()

    def turn(self) -> None:
        """Go on with the ledger's new generation of the expert pool."""
        self._consolidation.use_pool(self._parts.ledger.pool)

    def counters(self) -> LearningCounters:
        """A reading of every counter; never waits for a consolidation."""
        waiting, oldest_s = self._intake.waiting()
        learning = self._consolidation
        return LearningCounters(
            updates=dict(learning.updates),
            canary_rollbacks=learning.canary_rollbacks,
            dropped=self._intake.dropped(),
            last_update_s=learning.last_update_s,
            lag_s=learning.lag_s,
            waiting_windows=waiting,
            oldest_waiting_s=oldest_s,
        )

    def replication(self) -> None:
        """Nobody else has these keys."""
        return

    def closing(self) -> AbstractContextManager[object]:
        """Entered when no consolidation runs; waiting windows are lost (the worker flushes)."""
        return self._consolidation.running

    def _forget(self, deleted: Sequence[ScopeId]) -> None:
        for scope in deleted:
            self._intake.discard(scope)
        self._parts.news.deleted.notify(deleted)
