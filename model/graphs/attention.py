"""Attention of one row of every sequence over a pool of keys and values, in shapes that depend on no position.

R rows, P positions that are looked at (the same for all rows; what lies behind a row's own weighs nothing), B = P /
POSITION_BLOCK blocks, Q query heads, G key/value heads, D head_dim.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from model.kv_cache import POSITION_BLOCK


@dataclass(frozen=True, slots=True)
class Places:
    """Where in the pool the rows write and read."""

    written: Tensor  # (R,) positions of the pool
    blocks: Tensor  # (R, B)
    mask: Tensor  # (R, 1, 1, P), added to scores

    @classmethod
    def of(cls, positions: Tensor, first_blocks: Tensor, length: int, dtype: torch.dtype) -> "Places":
        """positions (R) in their sequences, each sequence's first block (R); `length` is P.

        All blocks behind a row's own are block 0, which stays in the processor's cache.
        """
        device = positions.device
        numbers = torch.arange(length // POSITION_BLOCK, device=device)
        own = numbers <= (positions // POSITION_BLOCK).unsqueeze(1)
        blocks = (first_blocks.unsqueeze(1) + numbers) * own
        behind = torch.arange(length, device=device) > positions.unsqueeze(1)
        mask = torch.zeros(behind.shape, dtype=dtype, device=device).masked_fill(behind, float("-inf"))
        return cls(first_blocks * POSITION_BLOCK + positions, blocks, mask[:, None, None])


def attend_pooled(
    query: Tensor, key: Tensor, value: Tensor, keys: Tensor, values: Tensor, places: Places
) -> Tensor:
    """query (R, Q, D), key and value (R, G, D); one layer's pool (blocks, POSITION_BLOCK, G, D) takes the latter in.

    Returns (R, Q * D).
    """
    rows, kv_heads, _ = key.shape
    blocks = places.blocks.flatten()

    def of_rows(pool: Tensor, new: Tensor) -> Tensor:
        """The pool's positions of each row, (R, G, P, D)."""
        pool.flatten(0, 1).index_copy_(0, places.written, new)
        return pool.index_select(0, blocks).unflatten(0, (rows, -1)).flatten(1, 2).transpose(1, 2)

    # The query heads that share a key/value head become rows of one attention, as in model.attention.
    result = F.scaled_dot_product_attention(
        query.unflatten(1, (kv_heads, -1)), of_rows(keys, key), of_rows(values, value), attn_mask=places.mask
    )  # (R, G, Q / G, D)
    return result.flatten(1)
