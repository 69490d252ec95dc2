"""What an API key may still do: a bucket that fills evenly. Belongs to the event loop."""

import math
import time
from collections.abc import Callable

MINUTE_S, HOUR_S = 60, 3600


class Budget:
    """A bucket that takes `period_s` seconds to fill, full at first; `clock` is monotonic, in seconds.

    What is larger than the whole bucket needs a full one and leaves a debt, so that a long prompt teaches too and the
    average still holds.
    """

    def __init__(self, capacity: int, period_s: float, clock: Callable[[], float] = time.monotonic):
        self._capacity = self._left_over = float(capacity)
        self._period_s = period_s
        self._clock = clock
        self._filled_at = clock()

    def allows(self, units: int) -> bool:
        """Whether so much may be spent now."""
        return self._left() >= min(units, self._capacity)

    def spend(self, units: int) -> None:
        """Take out what has been used."""
        self._left_over = self._left() - units

    def give_back(self, units: int) -> None:
        """Put in again what was taken out and not used."""
        self._left_over = self._left() + units

    def wait_s(self, units: int) -> int:
        """Whole seconds until `allows` holds, at least 1."""
        missing = min(units, self._capacity) - self._left()
        return max(1, math.ceil(missing / self._capacity * self._period_s))

    def _left(self) -> float:
        now = self._clock()
        filled = self._left_over + (now - self._filled_at) / self._period_s * self._capacity
        self._left_over, self._filled_at = min(self._capacity, filled), now
        return self._left_over
