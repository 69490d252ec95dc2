"""All sequences' keys and values in one allocation, so that recorded calls find them at fixed addresses.

A sequence has consecutive blocks of POSITION_BLOCK positions, and its cache is a view of them: rows that take another
way through the model read and write the same memory. L layers, N blocks, G key/value heads, D head_dim.
"""

from dataclasses import dataclass, field

import torch

from model.config import ModelConfig
from model.kv_cache import POSITION_BLOCK, CacheBudget, SequenceCache

FIRST_BLOCK = 1  # block 0 is nobody's: rows that fill up a batch write there


@dataclass(slots=True, eq=False)
class PooledCache(SequenceCache):
    """A sequence's part of a pool."""

    first: int = field(kw_only=True)  # block
    pool: "PooledBudget" = field(kw_only=True)


class PooledBudget(CacheBudget):
    """Reserves parts of one pool."""

    def __init__(self, config: ModelConfig, capacity_tokens: int, dtype: torch.dtype, device: torch.device):
        super().__init__(config, capacity_tokens, dtype, device)
        blocks = self.capacity_tokens // POSITION_BLOCK
        heads, head_dim = config.num_key_value_heads, config.head_dim
        shape = (config.num_hidden_layers, FIRST_BLOCK + blocks, POSITION_BLOCK, heads, head_dim)
        self.keys = torch.zeros(shape, dtype=dtype, device=device)  # (L, N, POSITION_BLOCK, G, D)
        self.values = torch.zeros(shape, dtype=dtype, device=device)
        self._holes = {FIRST_BLOCK: blocks}  # first block of a stretch that is free -> its length

    def fits(self, tokens: int) -> bool:
        """Whether there is a stretch without a gap."""
        return max(self._holes.values(), default=0) * POSITION_BLOCK >= self.rounded(tokens)

    def reserve(self, tokens: int) -> PooledCache:
        assert self.fits(tokens), (tokens, self._holes)
        wanted = self.rounded(tokens) // POSITION_BLOCK
        first = min(start for start, length in self._holes.items() if length >= wanted)
        left = self._holes.pop(first) - wanted
        if left:
            self._holes[first + wanted] = left
        self.reserved_tokens += wanted * POSITION_BLOCK
        # Positions behind a row's own are read and weigh nothing, but zero times a former owner's NaN is NaN.
        keys, values = (
            pool[:, first : first + wanted].zero_().flatten(1, 2).transpose(1, 2)
            for pool in (self.keys, self.values)
        )
        return PooledCache(keys, values, first=first, pool=self)

    def release(self, cache: SequenceCache) -> None:
        assert isinstance(cache, PooledCache), cache
        super().release(cache)
        first, length = cache.first, cache.capacity // POSITION_BLOCK
        length += self._holes.pop(first + length, 0)
        before = next((start for start, size in self._holes.items() if start + size == first), None)
        if before is not None:
            first, length = before, length + self._holes.pop(before)
        self._holes[first] = length
