"""How many tokens an API key may teach: a bucket that fills evenly over the hour. Belongs to the event loop."""

import math
import time
from collections.abc import Callable

SECONDS_PER_HOUR = 3600


class LearningBudget:
    """A bucket of `tokens_per_hour` tokens, full at first; `clock` is monotonic, in seconds.

    What is larger than the whole bucket needs a full one and leaves a debt, so that a long prompt teaches too and the
    average still holds.
    """

    def __init__(self, tokens_per_hour: int, clock: Callable[[], float] = time.monotonic):
        self._capacity = self._tokens = float(tokens_per_hour)
        self._clock = clock
        self._filled_at = clock()

    def allows(self, tokens: int) -> bool:
        """Whether so many tokens may be taught now."""
        return self._left() >= min(tokens, self._capacity)

    def spend(self, tokens: int) -> None:
        """Take out what has been taught."""
        self._tokens = self._left() - tokens

    def wait_s(self, tokens: int) -> int:
        """Whole seconds until `allows` holds, at least 1."""
        missing = min(tokens, self._capacity) - self._left()
        return max(1, math.ceil(missing / self._capacity * SECONDS_PER_HOUR))

    def _left(self) -> float:
        now = self._clock()
        filled = self._tokens + (now - self._filled_at) / SECONDS_PER_HOUR * self._capacity
        self._tokens, self._filled_at = min(self._capacity, filled), now
        return self._tokens
