"""Which experts of a variant worked, since the start and lately. Knows no blocks.

T tokens, K experts per token.
"""

import itertools
import threading
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from model.blocks.recent_routing import RecentRouting

if TYPE_CHECKING:
    from model.blocks.base import BlockConfig

MOST_WAITING = 64  # times that something was added before it is counted
Added = tuple[tuple[int, ...], bool, float, NDArray[np.int64]]


class ExpertUsage:
    """Tokens per (phase, layer, expert) since the start. Written by the engine thread, read by anybody.

    What is added waits, and is counted many steps at once or when somebody looks. Layers may have different numbers of
    experts: what a layer does not have stays 0 in `counts`.
    """

    PHASES = ("prefill", "decode")

    def __init__(
        self,
        layers: Sequence[int],
        num_experts: int,
        num_experts_per_tok: int,
        clock: Callable[[], float] = time.monotonic,
    ):
        self.layers = tuple(layers)
        self.num_experts_per_tok = num_experts_per_tok
        self._clock = clock
        self._index = {layer: i for i, layer in enumerate(self.layers)}
        self._counts: NDArray[np.int64] = np.zeros((2, len(self.layers), num_experts), dtype=np.int64)
        self._num_experts = dict.fromkeys(self.layers, num_experts)
        self._recent = {
            layer: RecentRouting(num_experts, num_experts_per_tok, self._now) for layer in self.layers
        }
        self._waiting: deque[Added] = deque()
        self._counting = threading.Lock()

    @classmethod
    def of(cls, config: "BlockConfig") -> "ExpertUsage":
        return cls(config.layers, config.num_experts, config.num_experts_per_tok)

    @property
    def counts(self) -> NDArray[np.int64]:
        """(phases, layers, experts)"""
        self._count()
        return self._counts

    @property
    def recent(self) -> Mapping[int, RecentRouting]:
        """Each layer's newest tokens."""
        self._count()
        return self._recent

    def of_layer(self, layer: int) -> NDArray[np.int64]:
        """A copy of one layer's counts: (phases, experts of the layer)."""
        num_experts = self._num_experts[layer]  # read first: `resize` writes it last
        return self.counts[:, self._index[layer], :num_experts].copy()

    def resize(self, num_experts: Mapping[int, int]) -> None:
        """From now on these layers have so many experts; on the thread that adds. Readers keep whole arrays."""
        known = self.counts
        sizes = {**self._num_experts, **num_experts}
        counts = np.zeros((2, len(self.layers), max(sizes.values())), dtype=np.int64)
        for layer, size in sizes.items():
            kept = min(size, self._num_experts[layer])
            counts[:, self._index[layer], :kept] = known[:, self._index[layer], :kept]
        self._counts = counts
        for layer, size in num_experts.items():
            self._recent[layer].resize(size)
        self._num_experts = sizes

    def add(self, layers: tuple[int, ...], expert_ids: NDArray[np.int64], *, decode: bool) -> None:
        """What the same tokens selected in some layers, (layers, T, K); nobody may write it afterwards."""
        self._waiting.append((layers, decode, self._now(), expert_ids))
        if len(self._waiting) == MOST_WAITING:
            self._count()

    def _now(self) -> float:
        return self._clock()

    def _count(self) -> None:
        """Count what waits, what was added alike in one go."""
        with self._counting:
            waiting = [self._waiting.popleft() for _ in range(len(self._waiting))]
            for (layers, decode), alike in itertools.groupby(waiting, key=lambda added: added[:2]):
                _, _, times, ids = zip(*alike, strict=True)
                at = np.repeat(times, [part.shape[1] for part in ids])
                for layer, expert_ids in zip(layers, np.concatenate(ids, axis=1), strict=True):
                    row = self._counts[int(decode), self._index[layer]]
                    row += np.bincount(expert_ids.ravel(), minlength=len(row))
                    self._recent[layer].add(expert_ids, at)
