"""Waiting windows become versions: learned in order, judged where a guard says so, committed, published.

One consolidation at a time. Decides when and for whom; the law is the learner's, storing is the ledger's.
"""

import logging
import threading
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import replace

from keystore.backends.base import Backend, VersionRecord
from keystore.canary import CanaryReading, Guard, log_failed, newest_due, note_of
from keystore.errors import KeyStoreError, KeyVersionUnavailable, VersionConflict
from keystore.intake import Intake, PendingWindow, tell_done
from keystore.learning import Learner, Progress
from keystore.ledger import Ledger
from keystore.pool import ExpertPool
from keystore.records import ScopeId
from keystore.settling_watch import SettlingWatch
from keystore.shelf import VersionShelf
from keystore.snapshot import LEARNED, KeySnapshot
from keystore.statistics import RoutingStats

OUTCOMES = ("published", "unchanged", "rejected", "guard_rejected", "failed")

logger = logging.getLogger(__name__)


class Consolidation:
    """`writing` is the store's lock; `publish` tells of versions that were committed, under it; `is_frozen` says
    who learns nothing; `return_to` publishes older content of a scope if it is still at a version.
    """

    def __init__(
        self,
        ledger: Ledger,
        learner: Learner,
        intake: Intake,
        backend: Backend,
        guard: Guard | None,
        clock: Callable[[], float],
        *,
        writing: threading.RLock,
        is_frozen: Callable[[ScopeId], bool],
        publish: Callable[[Sequence[KeySnapshot]], None],
        return_to: Callable[[ScopeId, Callable[[], KeySnapshot], str, int | None], int],
    ) -> None:
        self._ledger, self._learner, self._intake, self._backend = ledger, learner, intake, backend
        self._shelf, self._guard, self._clock, self._writing = ledger.shelf, guard, clock, writing
        self._is_frozen, self._publish, self._return_to = is_frozen, publish, return_to
        self.running = threading.Lock()  # held through the seconds that a probe takes; before `writing`
        self.settling = SettlingWatch()
        self.updates: Counter[str] = Counter(dict.fromkeys(OUTCOMES, 0))
        self.canary_rollbacks = 0
        self.last_update_s = self.lag_s = 0.0
        self.last_error: BaseException | None = None

    def run_once(self) -> list[KeySnapshot]:
        """Learn everything that waits; the new versions. A failed commit passes through, and the windows wait
        again.
        """
        with self.running:
            published = self._consolidate(self._learn, lambda scope: not self._is_guarded(scope))
            for snapshot in newest_due(self._guard, published):
                self._judge_published(snapshot)
            return [*published, *self._consolidate(self._learn_guarded, self._is_guarded)]

    def check_fits(self, stats: RoutingStats) -> None:
        """Raises InvalidStatistics when layers, shapes or bonding are not this store's."""
        self._learner.check_fits(stats)

    def use_pool(self, pool: ExpertPool) -> None:
        """Go on with another generation of the expert pool; called under the store's lock."""
        self._learner = replace(self._learner, pool=pool)

    def _is_guarded(self, scope: ScopeId) -> bool:
        """Whether nothing of the scope is published unjudged."""
        return self._guard is not None and scope.kind == "global"

    def _consolidate(
        self,
        learn: Callable[[Sequence[PendingWindow]], list[KeySnapshot]],
        of: Callable[[ScopeId], bool],
    ) -> list[KeySnapshot]:
        windows = self._intake.take_all(of)
        if not windows:
            return []
        started_s = time.monotonic()
        try:
            published = learn(windows)
        except Exception:
            self._intake.give_back(windows)
            raise
        finished_s = time.monotonic()
        self.last_update_s, self.lag_s = finished_s - started_s, finished_s - windows[0].submitted_at_s
        self.last_error = None
        tell_done(windows)
        return published

    def _learn(self, windows: Sequence[PendingWindow]) -> list[KeySnapshot]:
        with self._writing:
            published = self._commit_windows(windows)
            self._publish(published)
            return published

    def _commit_windows(self, windows: Sequence[PendingWindow]) -> list[KeySnapshot]:
        scopes: dict[ScopeId, Progress] = {}
        records: list[VersionRecord] = []
        published: list[KeySnapshot] = []
        outcomes: Counter[str] = Counter()
        for stats in (window.stats for window in windows):
            if self._is_frozen(stats.scope):
                outcomes["frozen"] += 1
                continue
            before = scopes.get(stats.scope) or self._progress(stats.scope)
            if before is None:
                outcomes["rejected"] += 1
                continue
            after, outcome = self._advance(
                before, stats, self._ledger.next_version(stats.scope, before.snapshot)
            )
            outcomes[outcome] += 1
            if outcome == "rejected":
                continue
            scopes[stats.scope] = after
            self.settling.note(self._ledger.pool, stats, before, after)
            if after.snapshot is not before.snapshot:
                records.append(self._record(after, before.snapshot))
                published.append(after.snapshot)
        self._ledger.commit(records, published)
        for scope, progress in scopes.items():
            self._shelf.carry(scope, progress.usage, progress.tokens, progress.settling)
        self._intake.count_dropped("frozen", outcomes.pop("frozen", 0))
        self.updates.update(outcomes)
        return published

    def _progress(self, scope: ScopeId) -> Progress | None:
        """Where a scope's learning goes on; None, and logged, when its latest version cannot be read."""
        try:
            return self._ledger.progress(scope)
        except KeyStoreError:
            logger.exception("latest version cannot be read", extra={"scope": str(scope)})
            return None

    def _advance(self, before: Progress, stats: RoutingStats, version: int) -> tuple[Progress, str]:
        """What one window makes of `before`, and the word for it; `before` itself when it is rejected."""
        try:
            after = self._learner.advance(before, stats, version, self._clock())
        except (KeyStoreError, ArithmeticError, ValueError):
            logger.exception("window rejected", extra={"scope": str(stats.scope), "tokens": stats.tokens})
            return before, "rejected"
        return after, "unchanged" if after.snapshot is before.snapshot else "published"

    def _learn_guarded(self, windows: Sequence[PendingWindow]) -> list[KeySnapshot]:
        """All windows of the global scope as one version, published if it passes. Judged without the lock."""
        scope = windows[0].stats.scope
        if self._is_frozen(scope):
            self._intake.count_dropped("frozen", len(windows))
            return []
        with self._writing:
            before = after = self._ledger.progress(scope)
        version, outcomes = before.snapshot.version + 1, Counter[str]()
        for window in windows:
            after, outcome = self._advance(after, window.stats, version)
            outcomes[outcome] += 1
        reading = None
        if after.snapshot is not before.snapshot:
            assert self._guard is not None
            reading = self._guard.judge(after.snapshot, self._ledger.anchors)
            if not reading.passed:
                self._keep_back(reading, before.snapshot, len(windows))
                return []
        with self._writing:
            if not self._ledger.is_latest(before.snapshot) or self._is_frozen(scope):
                self._intake.count_dropped("superseded", len(windows))
                return []
            published = [] if reading is None else [self._commit_judged(before, after, reading)]
            self._shelf.carry(scope, after.usage, after.tokens, after.settling)
            self.updates.update(outcomes)
            self.settling.note(self._ledger.pool, windows[-1].stats, before, after)
            self._publish(published)
            return published

    def _commit_judged(self, before: Progress, after: Progress, reading: CanaryReading) -> KeySnapshot:
        reason = f"{LEARNED} {after.tokens - before.tokens} tokens; {reading}"
        snapshot = replace(after.snapshot, parent=before.snapshot.version, reason=reason)
        judged = replace(after, snapshot=snapshot)
        self._ledger.commit([self._record(judged, before.snapshot)], [snapshot], note_of(reading))
        return snapshot

    def _keep_back(self, reading: CanaryReading, latest: KeySnapshot, windows: int) -> None:
        """Note a version that is not published. If its own start was never judged, judge that too."""
        self.updates["guard_rejected"] += windows
        self._backend.note_canary(note_of(reading))
        log_failed(reading, f"{windows} windows are not published")
        if latest.version not in (0, self._backend.passed_version(latest.scope)):
            self._judge_published(latest)

    def _judge_published(self, snapshot: KeySnapshot) -> None:
        """Judge a version that is being served; the scope goes back to the newest that passed if it fails."""
        assert self._guard is not None
        scope, latest = snapshot.scope, self._shelf.latest(snapshot.scope).version
        reading = self._guard.judge(snapshot, self._ledger.anchors)
        self._backend.note_canary(note_of(reading))
        if reading.passed:
            return
        passed = self._backend.passed_version(scope)
        log_failed(reading, f"going back to version {passed}")
        reason = f"rollback to {passed}: {reading} at version {snapshot.version}"
        try:
            self._return_to(scope, lambda: find_or_anchors(self._shelf, scope, passed), reason, latest)
        except VersionConflict:
            logger.info("somebody changed the keys meanwhile", extra={"scope": str(scope)})
            return
        self.canary_rollbacks += 1

    def _record(self, after: Progress, base: KeySnapshot) -> VersionRecord:
        due = self._guard is not None and self._guard.is_due(after.snapshot)  # if it passes it must last
        return replace(self._ledger.record(after.snapshot, base, lasting=due), settling=after.settling)


def find_or_anchors(shelf: VersionShelf, scope: ScopeId, version: int) -> KeySnapshot:
    """A version of the scope, or the anchors when it is no longer kept."""
    try:
        return shelf.find(scope, version)
    except KeyVersionUnavailable:
        return shelf.find(scope, 0)
