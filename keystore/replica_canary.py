"""Tenants' versions on the canary, when several replicas have them: one judges, beside serving and learning.

A version that fails sends the scope back to the newest that passed, whatever was learned on it meanwhile. Only a
change by hand that came after it stands.
"""

import logging
import threading
from collections.abc import Callable
from uuid import uuid4

from keystore.canary import Guard, log_failed, note_of
from keystore.consolidation import find_or_anchors
from keystore.errors import StoreUnavailable
from keystore.learning_side import StoreParts
from keystore.records import ScopeId
from keystore.replica_backend import ReplicaBackend
from keystore.snapshot import KeySnapshot

RETRY_S = 1.0

logger = logging.getLogger(__name__)


class ReplicaCanary:
    """`by_hand` makes a change to the newest versions. A thread of the replica calls `run_until`."""

    def __init__(
        self,
        parts: StoreParts,
        guard: Guard,
        backend: ReplicaBackend,
        by_hand: Callable[[Callable[[], int]], int],
    ) -> None:
        self._parts, self._guard, self._backend, self._by_hand = parts, guard, backend, by_hand
        self._changed = threading.Condition()
        self._waiting: dict[ScopeId, KeySnapshot] = {}
        self._name = uuid4().hex
        self.rollbacks = 0
        parts.news.published.add(self._note)

    def run_until(self, stopping: threading.Event) -> None:
        """Judge whatever the schedule asks for; call `wake` after setting `stopping`."""
        while not stopping.is_set():
            with self._changed:
                if not (self._waiting or stopping.is_set()):
                    self._changed.wait()
            try:
                self.judge_waiting()
            except StoreUnavailable as error:
                logger.warning("versions wait to be judged: %s", error)
                stopping.wait(RETRY_S)
            except Exception:
                logger.exception("the canary failed to run")
                stopping.wait(RETRY_S)

    def wake(self) -> None:
        """End the wait of `run_until` now."""
        with self._changed:
            self._changed.notify_all()

    def judge_waiting(self) -> None:
        """Judge the versions that wait, those that nobody else has claimed. Raises StoreUnavailable; they wait again
        then.
        """
        while self._waiting:
            with self._changed:
                scope, snapshot = next(iter(self._waiting.items()))
            if self._backend.claim_canary(scope, f"{self._name} {snapshot.version}"):
                self.judge(snapshot)
            with self._changed:
                if self._waiting.get(scope) is snapshot:
                    del self._waiting[scope]

    def judge(self, snapshot: KeySnapshot) -> None:
        """Judge a version that readers have; one that fails is taken back. Raises StoreUnavailable."""
        scope, shelf = snapshot.scope, self._parts.ledger.shelf
        reading = self._guard.judge(snapshot, self._parts.ledger.anchors)
        self._backend.note_canary(note_of(reading))
        if reading.passed:
            return
        passed = self._backend.passed_version(scope)
        log_failed(reading, f"going back to version {passed}")
        latest = shelf.latest(scope)
        if latest.version != snapshot.version and not latest.is_learned:
            logger.info("somebody changed the keys meanwhile", extra={"scope": str(scope)})
            return
        reason = f"rollback to {passed}: {reading} at version {snapshot.version}"
        self._by_hand(
            lambda: self._parts.return_to(scope, lambda: find_or_anchors(shelf, scope, passed), reason, None)
        )
        self.rollbacks += 1

    def _note(self, snapshot: KeySnapshot) -> None:
        if self._guard.is_due(snapshot):
            with self._changed:
                self._waiting[snapshot.scope] = snapshot
                self._changed.notify_all()
