"""The bounded queue of windows waiting to be learned. Never blocks a producer; what it refuses it counts."""

import threading
import time
from collections import Counter, deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, get_args

from keystore.records import ScopeId
from keystore.statistics import RoutingStats

DropReason = Literal[
    "queue_full", "non_finite", "frozen", "superseded", "credit_behind", "credit_failed", "unclear"
]


@dataclass(frozen=True, slots=True)
class PendingWindow:
    """One window and when it came."""

    stats: RoutingStats
    submitted_at_s: float  # monotonic
    done: Callable[[], None] | None = None  # called once it has been learned, or never will be


class Intake:
    """Thread-safe queue of at most `capacity` windows."""

    def __init__(self, capacity: int) -> None:
        self._capacity = capacity
        self._windows: deque[PendingWindow] = deque()
        self._changed = threading.Condition()
        self._dropped: Counter[str] = Counter(dict.fromkeys(get_args(DropReason), 0))

    def put(self, stats: RoutingStats, done: Callable[[], None] | None = None) -> bool:
        """Append a window; False and counted when the queue is full."""
        with self._changed:
            if len(self._windows) >= self._capacity:
                self._dropped["queue_full"] += 1
                return False
            self._windows.append(PendingWindow(stats, time.monotonic(), done))
            self._changed.notify_all()
            return True

    def count_dropped(self, reason: DropReason, windows: int = 1) -> None:
        """Count windows that never got in, or were taken out unlearned."""
        with self._changed:
            self._dropped[reason] += windows

    def take_all(self, of: Callable[[ScopeId], bool]) -> list[PendingWindow]:
        """Everything waiting of the scopes asked for, oldest first."""
        with self._changed:
            taken = [window for window in self._windows if of(window.stats.scope)]
            self._windows = deque(window for window in self._windows if not of(window.stats.scope))
            return taken

    def give_back(self, windows: Sequence[PendingWindow]) -> None:
        """Put windows back in front, past the capacity if need be: they were accepted once."""
        with self._changed:
            self._windows.extendleft(reversed(windows))

    def discard(self, scope: ScopeId) -> None:
        """Drop a scope's waiting windows: they were learned on keys that a rollback has just replaced."""
        superseded = self.take_all(lambda of: of == scope)
        self.count_dropped("superseded", len(superseded))
        tell_done(superseded)

    def wait(self, timeout_s: float) -> bool:
        """Sleep until a window waits, `wake` is called or the time is up; True when a window waits."""
        with self._changed:
            if not self._windows:
                self._changed.wait(timeout_s)
            return bool(self._windows)

    def wake(self) -> None:
        """End every `wait` now."""
        with self._changed:
            self._changed.notify_all()

    def dropped(self) -> Mapping[str, int]:
        """Windows not learned, by reason."""
        with self._changed:
            return dict(self._dropped)

    def waiting(self) -> tuple[int, float]:
        """Number of windows and the age of the oldest in seconds."""
        with self._changed:
            oldest = self._windows[0].submitted_at_s if self._windows else None
            return len(self._windows), 0.0 if oldest is None else time.monotonic() - oldest


def tell_done(windows: Sequence[PendingWindow]) -> None:
    """Tell whoever waits for them that these windows are through."""
    for window in windows:
        if window.done is not None:
            window.done()
