"""What layers remember of running sequences, reserved whole when a sequence is admitted.

A reservation is one pair of tensors sized for the prompt and everything it may generate, so a running
sequence never waits for memory and is never preempted. Pages are touched only as positions fill up.
"""

from dataclasses import dataclass, field

import torch
from torch import Tensor

from model.config import ModelConfig

POSITION_BLOCK = 64  # reservations are rounded up to this many positions


@dataclass(slots=True, eq=False)
class SequenceCache:
    """What the layers remember of one sequence."""

    keys: Tensor  # (layers, kv_heads, capacity, head_dim)
    values: Tensor  # (layers, kv_heads, capacity, head_dim)
    # Constant-size float32 state of expert blocks with memory, by layer; the block makes it at position 0.
    block_states: dict[int, Tensor] = field(default_factory=dict[int, Tensor])

    @property
    def capacity(self) -> int:
        return self.keys.shape[2]


class CacheBudget:
    """Counts reserved positions against a fixed budget; allocation itself is per sequence."""

    def __init__(self, config: ModelConfig, capacity_tokens: int, dtype: torch.dtype, device: torch.device):
        assert capacity_tokens >= POSITION_BLOCK, capacity_tokens
        self._shape = (config.num_hidden_layers, config.num_key_value_heads)
        self._head_dim = config.head_dim
        self._dtype = dtype
        self._device = device
        self.capacity_tokens = (
            capacity_tokens // POSITION_BLOCK * POSITION_BLOCK
        )  # reservations are whole blocks
        self.reserved_tokens = 0

    @property
    def free_tokens(self) -> int:
        return self.capacity_tokens - self.reserved_tokens

    @staticmethod
    def rounded(tokens: int) -> int:
        return -(-tokens // POSITION_BLOCK) * POSITION_BLOCK

    def fits(self, tokens: int) -> bool:
        return self.rounded(tokens) <= self.free_tokens

    def reserve(self, tokens: int) -> SequenceCache:
        assert self.fits(tokens), (tokens, self.reserved_tokens, self.capacity_tokens)
        capacity = self.rounded(tokens)
        shape = (*self._shape, capacity, self._head_dim)
        cache = SequenceCache(
            torch.empty(shape, dtype=self._dtype, device=self._device),
            torch.empty(shape, dtype=self._dtype, device=self._device),
        )
        self.reserved_tokens += capacity
        return cache

    def release(self, cache: SequenceCache) -> None:
        self.reserved_tokens -= cache.capacity
        assert self.reserved_tokens >= 0, self.reserved_tokens
