"""Which experts of a layer worked lately: when each was last selected, and who worked together.

T tokens, K experts per token, E experts. Knows nothing of layers, phases or totals.
"""

import threading
from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

TOKENS_KEPT = 4096  # of a layer; 4 bytes for each expert of each


class RecentRouting:
    """One layer's newest tokens. Written by the engine thread, read by anybody.

    Its memory does not grow with the number of pairs, so that a layer may have any number of experts.
    """

    def __init__(self, num_experts: int, num_experts_per_tok: int, clock: Callable[[], float]):
        self._clock = clock
        self._selected_at: NDArray[np.float64] = np.full(num_experts, np.nan)
        self._rows: NDArray[np.int32] = np.full((TOKENS_KEPT, num_experts_per_tok), -1, dtype=np.int32)
        self._seen = 0  # tokens since the start
        self._lock = threading.Lock()

    def add(self, expert_ids: NDArray[np.int64], at: NDArray[np.float64]) -> None:
        """Tokens in order, (T, K), and when each was routed, (T)."""
        newest = expert_ids[-TOKENS_KEPT:]
        end = self._seen + len(expert_ids)
        first = (end - len(newest)) % TOKENS_KEPT
        with self._lock:
            self._selected_at[expert_ids] = at[:, None]
            if first + len(newest) <= TOKENS_KEPT:
                self._rows[first : first + len(newest)] = newest
            else:
                before_the_end = TOKENS_KEPT - first
                self._rows[first:] = newest[:before_the_end]
                self._rows[: len(newest) - before_the_end] = newest[before_the_end:]
            self._seen = end

    def idle_s(self) -> NDArray[np.float64]:
        """Seconds since each expert was last selected (E,); NaN if it never was."""
        with self._lock:
            return self._clock() - self._selected_at

    def together_with(self, expert: int) -> tuple[int, int, NDArray[np.int64]]:
        """How many tokens are kept, how many of them selected the expert, and how many of those each other one (E,)."""
        with self._lock:
            kept = min(self._seen, TOKENS_KEPT)
            rows = self._rows[:kept]
            shared = rows[(rows == expert).any(axis=1)]
            num_experts = len(self._selected_at)
        counts = np.bincount(shared[shared < num_experts], minlength=num_experts)
        counts[expert] = 0
        return kept, len(shared), counts

    def resize(self, num_experts: int) -> None:
        """From now on there are so many experts."""
        with self._lock:
            known = self._selected_at[:num_experts]
            self._selected_at = np.concatenate([known, np.full(num_experts - len(known), np.nan)])
