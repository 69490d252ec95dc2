"""A store that shares its versions with others through Redis: workers learn, this process reads and teaches.

Serving never waits for Redis: versions are followed and statistics sent on threads of their own. While Redis is
away readers keep the newest versions that they have, and windows are merged until it is back.
"""

import logging
import math
import threading
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import TypeVar

from keystore.counters import LearningCounters, ReplicationCounters
from keystore.errors import KeyStoreError, StoreUnavailable, VersionConflict
from keystore.follower import DELAY_BOUNDS_S, Follower
from keystore.global_learner import LEASE_S, GlobalLearner
from keystore.intake import DropReason
from keystore.learning_side import StoreParts
from keystore.outbox import FULL_RETRY_S, Outbox
from keystore.records import ScopeId
from keystore.replica_backend import ReplicaBackend
from keystore.replica_canary import ReplicaCanary
from keystore.settling_watch import SettlingWatch
from keystore.snapshot import KeySnapshot
from keystore.statistics import RoutingStats

BLOCK_MS = 500
BLOCK_MS_WHEN_AWAITED = 20  # statistics that lead to no version are learned without a commit to be read
FIRST_RETRY_S, LAST_RETRY_S = 0.05, 1.0
PATIENCE_S = 10.0  # of a person who asks for everything to be learned
FLUSH_S = 5.0
PENDING_EVERY_S = 2.0
USE_EVERY_S = 30.0
CONFLICTS_SEEN = 8  # by one change by hand, each with somebody else's commit

T = TypeVar("T")

logger = logging.getLogger(__name__)


class Replica:
    """The learning side of a store whose windows are learned elsewhere. Thread-safe.

    Reads what is stored at its creation; when Redis is away then, the store begins with the anchors. With `learn_global`
    it learns the global scope unless another replica does. Raises ModelMismatch, InvalidConfig.
    """

    def __init__(
        self,
        parts: StoreParts,
        backend: ReplicaBackend,
        *,
        outbox_scopes: int,
        session_ttl_s: float,
        learn_global: bool = False,
    ) -> None:
        self._parts, self._backend = parts, backend
        self._outbox = Outbox(backend.stats, backend.producers, backend.shards, outbox_scopes)
        self._follower = Follower(parts, backend, self._outbox)
        self._canary = parts.guard and ReplicaCanary(parts, parts.guard, backend, self.by_hand)
        self._use_every_s = min(USE_EVERY_S, session_ttl_s / 4)
        self.settling = SettlingWatch()
        self._failure: BaseException | None = None
        self._stopping = threading.Event()
        self._threads = [
            threading.Thread(target=self._follow, name="follower"),
            threading.Thread(target=self._outbox.run_until, args=(self._stopping,), name="outbox"),
        ]
        if self._canary is not None:
            judging = threading.Thread(target=self._canary.run_until, args=(self._stopping,), name="canary")
            self._threads.append(judging)
        self._global = GlobalLearner(parts, backend, self._judge) if learn_global else None
        if self._global is not None:
            learning = threading.Thread(target=self._global.run_until, args=(self._stopping,), name="global")
            self._threads.append(learning)
        try:
            self._follower.catch_up()
        except StoreUnavailable as error:
            self._note_failure(error)

    @property
    def last_error(self) -> BaseException | None:
        """Why readers may have old keys, or windows wait; None when they do not."""
        learning = None if self._global is None else self._global.failure
        return self._failure or self._follower.refusal or learning

    def start(self) -> None:
        """Follow and send in threads of their own until `stop`."""
        for thread in self._threads:
            thread.start()

    def stop(self, *, flush: bool = True) -> None:
        """End the threads; with `flush` send what still waits if Redis is there. Safe to call twice."""
        self._stopping.set()
        self._outbox.wake()
        if self._canary is not None:
            self._canary.wake()
        for thread in self._threads:
            if thread.is_alive():
                thread.join()
        if flush:
            self._flush()

    def submit(self, stats: RoutingStats, done: Callable[[], None] | None) -> bool:
        """Take a window for the workers; never blocks. False when dropped and counted: too many scopes wait."""
        return self._outbox.put(stats, done)

    def count_dropped(self, reason: DropReason) -> None:
        """Count a window that never became statistics."""
        self._outbox.count_dropped(reason)

    def discard(self, scope: ScopeId) -> None:
        """Drop the scope's windows that were not sent; workers drop those that were."""
        self._outbox.discard(scope)

    def consolidate_once(self) -> list[KeySnapshot]:
        """Wait until the workers have learned everything that was handed in so far; the versions that came meanwhile.

        Raises StoreUnavailable when that takes too long.
        """
        published: list[KeySnapshot] = []
        end = self._parts.news.published.add(published.append)
        try:
            patience_s = PATIENCE_S if self._global is None else PATIENCE_S + LEASE_S
            self._have_everything_learned(time.monotonic() + patience_s)
        finally:
            end()
        return published

    def by_hand(self, change: Callable[[], T]) -> T:
        """Make a change to the newest versions: read on and try again where somebody else has made newer ones."""
        for _ in range(CONFLICTS_SEEN):
            seen = self._follower.position
            try:
                return change()
            except VersionConflict:
                self._follower.catch_up()
                if self._follower.position == seen:
                    raise
        return change()

    def turn(self) -> None:
        """The expert pool of a shared store never changes."""
        raise AssertionError(self)

    def counters(self) -> LearningCounters:
        """What this process has handed in; what became of it the workers count, but for the global scope."""
        windows, oldest_s = self._outbox.waiting()
        return LearningCounters(
            updates={} if self._global is None else self._global.updates(),
            canary_rollbacks=0 if self._canary is None else self._canary.rollbacks,
            dropped=self._outbox.dropped(),
            last_update_s=0.0,
            lag_s=0.0,
            waiting_windows=windows,
            oldest_waiting_s=oldest_s,
        )

    def replication(self) -> ReplicationCounters:
        """How far this process keeps up."""
        follower, outbox = self._follower, self._outbox
        return ReplicationCounters(
            connected=self._failure is None,
            outbox_scopes=outbox.scopes,
            pending_entries=outbox.pending,
            resent=outbox.sender.resent,
            resyncs=follower.resyncs,
            regressions=follower.regressions,
            refused=follower.refused,
            delay_counts=dict(zip((*DELAY_BOUNDS_S, math.inf), follower.delays.counts, strict=True)),
            delay_sum_s=follower.delays.sum_s,
        )

    def closing(self) -> AbstractContextManager[object]:
        """Nothing is learned here."""
        return nullcontext()

    def _judge(self, snapshot: KeySnapshot) -> None:
        assert self._canary is not None, snapshot
        self._canary.judge(snapshot)

    def _have_everything_learned(self, deadline_s: float) -> None:
        while True:
            self._outbox.send_waiting()
            if not self._outbox.scopes:
                break
            if time.monotonic() > deadline_s:
                raise StoreUnavailable("the workers do not keep up: windows wait to be sent")
            time.sleep(FULL_RETRY_S)
        learned = threading.Semaphore(0)
        for _ in range(self._outbox.when_learned(lambda: learned.release())):
            if not learned.acquire(timeout=max(0.0, deadline_s - time.monotonic())):
                raise StoreUnavailable("no worker has learned what was sent; it waits in Redis")
        if not self._outbox.reachable:
            raise StoreUnavailable("Redis went away before a worker had learned what was sent")

    def _follow(self) -> None:
        retry_s, looked_at_s, used_at = 0.0, 0.0, 0.0
        while not self._stopping.wait(retry_s):
            try:
                self._follower.catch_up(BLOCK_MS_WHEN_AWAITED if self._outbox.somebody_waits else BLOCK_MS)
                if self._outbox.somebody_waits:
                    self._tell_learned()
                if time.monotonic() - looked_at_s > PENDING_EVERY_S:
                    self._outbox.refresh_pending()
                    looked_at_s = time.monotonic()
                if self._parts.clock() - used_at > self._use_every_s:
                    now = self._parts.clock()
                    self._backend.use.note(self._parts.ledger.shelf.used_since(used_at))
                    self._outbox.sender.stay_known()
                    used_at = now
            except KeyStoreError as error:
                retry_s = self._note_failure(error, retry_s)
            except Exception as error:  # the thread goes on; readers keep what they have
                logger.exception("following failed")
                retry_s = self._note_failure(error, retry_s)
            else:
                retry_s, self._failure = 0.0, None

    def _tell_learned(self) -> None:
        done = self._outbox.learned()
        try:
            if done:
                self._follower.catch_up()  # to the versions that it has led to
        finally:
            for each in done:
                each()

    def _note_failure(self, error: Exception, retry_s: float = 0.0) -> float:
        """Returns after how long to try again."""
        if type(error) is not type(self._failure):
            logger.warning("shared keys are not followed: %s", error)
        self._failure = error
        self._backend.away = isinstance(error, StoreUnavailable)
        return min(max(FIRST_RETRY_S, 2 * retry_s), LAST_RETRY_S)

    def _flush(self) -> None:
        deadline_s = time.monotonic() + FLUSH_S
        try:
            while self._outbox.waiting()[0] and time.monotonic() < deadline_s:
                if not self._outbox.send_waiting():
                    time.sleep(FULL_RETRY_S)
            self._outbox.leave()
        except StoreUnavailable as error:
            logger.warning("not sent: %s", error)
        windows, _ = self._outbox.waiting()
        if windows:
            logger.warning("windows are lost", extra={"windows": windows})
