"""What became of the statistics that a process has learned from Redis, for metrics."""

import threading
from collections import Counter
from collections.abc import Mapping

ENTRY_OUTCOMES = ("learned", "duplicate", "refused", "rejected", "frozen", "superseded", "guard_rejected")


class LearnerCounters:
    """What a worker has done for one model, on all its shards. Thread-safe."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._entries: Counter[str] = Counter(dict.fromkeys(ENTRY_OUTCOMES, 0))
        self.tokens = self.versions = self.conflicts = self.fenced = self.failures = 0
        self.last_batch_s = 0.0

    def add(self, outcomes: Counter[str], tokens: int, versions: int, batch_s: float) -> None:
        """One commit."""
        with self._lock:
            self._entries.update(outcomes)
            self.tokens, self.versions = self.tokens + tokens, self.versions + versions
            self.last_batch_s = batch_s

    def count_conflict(self) -> None:
        """A commit found that somebody had changed its scopes by hand."""
        with self._lock:
            self.conflicts += 1

    def count_fenced(self) -> None:
        """A commit, or a renewal, came after the lease's end."""
        with self._lock:
            self.fenced += 1

    def count_failure(self) -> None:
        """A batch failed for another reason, and is tried again."""
        with self._lock:
            self.failures += 1

    def entries(self) -> Mapping[str, int]:
        """Entries by what became of them."""
        with self._lock:
            return dict(self._entries)
