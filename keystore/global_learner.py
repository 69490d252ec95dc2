"""The global scope of a shared store, learned by one of its replicas at a time: workers cannot judge what all would have.

What fails the canary is not stored; what was learned on is judged itself then, if that had never been done. Whoever
holds the shard's lease learns, the others look now and then whether it is free.
"""

import logging
import math
import threading
import time
from collections.abc import Callable, Mapping

from keystore.backends.redis_lease import Lease
from keystore.backends.redis_names import GLOBAL_SHARD
from keystore.canary import CanaryReading, Guard
from keystore.errors import Fenced, StoreUnavailable
from keystore.learner_counters import LearnerCounters
from keystore.learning_side import StoreParts
from keystore.replica_backend import ReplicaBackend
from keystore.session_ends import SessionEnds, SessionLimits
from keystore.shard_learner import ShardLearner
from keystore.shelf import ShelfLimits
from keystore.snapshot import KeySnapshot

LEASE_S = 60.0  # a probe takes seconds, and is not interrupted to renew
BLOCK_MS = 250
LOOK_EVERY_S = 1.0
TIDY_EVERY_S = 30.0

logger = logging.getLogger(__name__)


class GlobalLearner:
    """`judge_published` is for a version that readers have already. A thread of the replica calls `run_until`."""

    def __init__(
        self,
        parts: StoreParts,
        backend: ReplicaBackend,
        judge_published: Callable[[KeySnapshot], None],
    ) -> None:
        self._parts, self._backend, self._judge_published = parts, backend, judge_published
        self._leases = backend.leases(int(1000 * LEASE_S))
        self.counters = LearnerCounters()
        self.failure: Exception | None = (
            None  # until something has been learned since, or somebody else learns
        )

    def run_until(self, stopping: threading.Event) -> None:
        """Learn while this process holds the lease."""
        while not stopping.is_set():
            try:
                lease = self._leases.take(GLOBAL_SHARD)
                if lease is None:
                    self.failure = None
                else:
                    self._learn_until(stopping, lease)
                    self._leases.release(lease)
            except Fenced as error:
                self.counters.count_fenced()
                logger.warning("somebody else learns the global scope: %s", error)
            except StoreUnavailable as error:
                logger.warning("the global scope is not learned: %s", error)
            except Exception as error:
                self.failure = error
                self.counters.count_failure()
                logger.exception("learning the global scope failed")
            stopping.wait(LOOK_EVERY_S)

    def updates(self) -> Mapping[str, int]:
        """Entries by outcome, as a store counts windows that learns by itself."""
        entries = self.counters.entries()
        return {
            "published": entries["learned"],
            "unchanged": 0,
            "rejected": entries["rejected"],
            "guard_rejected": entries["guard_rejected"],
            "failed": self.counters.failures,
        }

    def _learn_until(self, stopping: threading.Event, lease: Lease) -> None:
        learner = self._learner(lease)
        renew_at_s, tidy_at_s = time.monotonic() + LEASE_S / 3, 0.0
        while not stopping.is_set():
            if learner.learn_some(BLOCK_MS):
                self.failure = None
            if time.monotonic() > renew_at_s:
                self._leases.renew(lease)
                renew_at_s = time.monotonic() + LEASE_S / 3
            if time.monotonic() > tidy_at_s:
                self._backend.producers.forget_unknown(GLOBAL_SHARD)
                tidy_at_s = time.monotonic() + TIDY_EVERY_S

    def _learner(self, lease: Lease) -> ShardLearner:
        backend, parts, guard = self._backend, self._parts, self._parts.guard
        no_sessions = SessionEnds(backend.use, GLOBAL_SHARD, backend.shards, SessionLimits(math.inf, None))
        return ShardLearner(
            GLOBAL_SHARD,
            backend.leased(lease),
            backend.stats,
            parts.ledger.anchors,
            parts.learner.gravity,
            backend.card.num_experts_per_tok,
            self.counters,
            ends=no_sessions,
            limits=ShelfLimits(1, 1),
            versions_on_disk=parts.retention.versions_on_disk,
            judge=None if guard is None else lambda version, base: self._judge(guard, version, base),
            clock=parts.clock,
        )

    def _judge(self, guard: Guard, version: KeySnapshot, base: KeySnapshot) -> CanaryReading:
        reading = guard.judge(version, self._parts.ledger.anchors)
        if not reading.passed and base.version not in (0, self._backend.passed_version(base.scope)):
            self._judge_published(base)
        return reading
