"""ConsolidationWorker: the thread that learns. A failure is logged, counted and retried; it never ends the
thread.
"""

import logging
import threading
from collections.abc import Callable

from keystore.learning_side import LocalLearning
from keystore.snapshot import KeySnapshot
from keystore.store import KeyStore

FIRST_RETRY_S = 0.1
LAST_RETRY_S = 30.0
FLUSH_ATTEMPTS = 3

logger = logging.getLogger(__name__)


class ConsolidationWorker:
    """Consolidates `store` whenever a window waits and expires sessions every `expiry_interval_s`."""

    def __init__(
        self, store: KeyStore, clock: Callable[[], float], *, expiry_interval_s: float = 60.0
    ) -> None:
        assert isinstance(store.learning, LocalLearning), store.learning
        self._learning, self._clock, self._expiry_interval_s = store.learning, clock, expiry_interval_s
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self.run_forever, name="consolidation")
        self._retry_s = 0.0
        self._expired_at = clock()

    def start(self) -> None:
        """Run in a thread of its own until `stop`."""
        self._thread.start()

    def stop(self, *, flush: bool = True) -> None:
        """End the thread; with `flush` learn what still waits, trying a few times. Safe to call twice."""
        self._stopping.set()
        self._learning.wake()
        if self._thread.is_alive():
            self._thread.join()
        attempts = FLUSH_ATTEMPTS if flush else 0
        while attempts and self._learning.counters().waiting_windows:
            self.run_once()
            attempts -= 1

    def run_once(self) -> list[KeySnapshot]:
        """One consolidation and, when due, one expiry; the new versions, none after a failure."""
        try:
            published = self._learning.consolidate_once()
            self._expire_when_due()
        except Exception as error:
            self._retry_s = min(max(FIRST_RETRY_S, 2 * self._retry_s), LAST_RETRY_S)
            self._learning.note_failure(error)
            waiting = self._learning.counters().waiting_windows
            logger.exception(
                "consolidation failed", extra={"waiting_windows": waiting, "retry_s": self._retry_s}
            )
            return []
        self._retry_s = 0.0
        return published

    def run_forever(self) -> None:
        """Consolidate on the calling thread until `stop`."""
        while not self._stopping.is_set():
            if self._retry_s:
                self._stopping.wait(self._retry_s)
            else:
                self._learning.wait_for_windows(self._expiry_interval_s)
            if not self._stopping.is_set():
                self.run_once()

    def _expire_when_due(self) -> None:
        now = self._clock()
        if now - self._expired_at >= self._expiry_interval_s:
            self._expired_at = now
            self._learning.expire_sessions(now)
