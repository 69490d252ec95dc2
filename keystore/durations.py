"""How long operations took, counted by upper bound. Names of metrics are the server's."""

import bisect
import math
import threading
import time
from collections.abc import Generator, Iterable, Mapping
from contextlib import contextmanager
from dataclasses import dataclass

BOUNDS_S = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 10.0)


@dataclass(frozen=True, slots=True)
class DurationCounts:
    """How many took at most so many seconds and more than the bound before; the last bound is infinity."""

    counts: Mapping[float, int]
    sum_s: float


class Durations:
    """Of some operations. Thread-safe."""

    def __init__(self, operations: Iterable[str]) -> None:
        self._lock = threading.Lock()
        self._counts = {operation: [0] * (len(BOUNDS_S) + 1) for operation in operations}
        self._sums_s = dict.fromkeys(self._counts, 0.0)

    @contextmanager
    def measured(self, operation: str) -> Generator[None]:
        """Counts what happens within, also when it fails."""
        started_s = time.monotonic()
        try:
            yield
        finally:
            took_s = time.monotonic() - started_s
            with self._lock:
                self._counts[operation][bisect.bisect_left(BOUNDS_S, took_s)] += 1
                self._sums_s[operation] += took_s

    def reading(self) -> Mapping[str, DurationCounts]:
        """What there was until now, by operation."""
        with self._lock:
            return {
                operation: DurationCounts(
                    dict(zip((*BOUNDS_S, math.inf), counts, strict=True)), self._sums_s[operation]
                )
                for operation, counts in self._counts.items()
            }
