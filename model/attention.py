"""Rotary positions and grouped-query attention, over a cache when serving and over whole rows when training.

R rows of a batch, Q query heads, G key/value heads, D head_dim, L positions in the cache.
"""

from collections.abc import Sequence
from contextlib import nullcontext

import torch
import torch.nn.functional as F
from torch import Tensor

from model.config import ModelConfig
from model.kv_cache import POSITION_BLOCK, SequenceCache
from model.threads import one_thread

# A sequence's rows in a batch: first row, rows, first position, cache, masks (none: a row that is being written).
AttentionSpan = tuple[int, int, int, SequenceCache, Sequence[Tensor]]

SHORT_CONTEXT = 512  # positions up to which one thread attends faster than two that wait for each other


def rope_table(config: ModelConfig, device: torch.device) -> tuple[Tensor, Tensor]:
    """cos and sin of every position, each (max_position_embeddings, head_dim / 2), float32."""
    half = config.head_dim // 2
    inverse = 1.0 / (config.rope_theta ** (torch.arange(half, dtype=torch.float32, device=device) / half))
    if config.rope_divisors:
        inverse = inverse / torch.tensor(config.rope_divisors, dtype=torch.float32, device=device)
    positions = torch.arange(config.max_position_embeddings, dtype=torch.float32, device=device)
    angles = torch.outer(positions, inverse)
    return angles.cos(), angles.sin()


def rotate(heads: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate halves by their positions' angles. heads (R, heads, D); cos, sin (R, 1, D / 2) float32."""
    first, second = heads.float().chunk(2, dim=-1)
    rotated = torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1)
    return rotated.to(heads.dtype)


def causal_mask(start: int, length: int, dtype: torch.dtype, device: torch.device) -> Tensor | None:
    """Additive mask (length, start + length) of a chunk behind `start` cached positions.

    None where no explicit mask is needed: a single row sees everything, a first chunk is plainly causal.
    """
    if length == 1 or start == 0:
        return None
    mask = torch.full((length, start + length), float("-inf"), dtype=dtype, device=device)
    return mask.triu_(start + 1)


def block_masks(start: int, length: int, dtype: torch.dtype, device: torch.device) -> list[Tensor]:
    """Additive masks of a chunk that begins at `start`, cut at multiples of POSITION_BLOCK.

    Each (rows, positions up to the end of their block). A row's bits hang on how many positions its kernel call is
    given, so they are as many wherever its prompt was cut.
    """
    masks: list[Tensor] = []
    end = start + length
    while start < end:
        block_end = (start // POSITION_BLOCK + 1) * POSITION_BLOCK
        rows = min(block_end, end) - start
        mask = torch.full((rows, block_end), float("-inf"), dtype=dtype, device=device)
        masks.append(mask.triu_(start + 1))
        start += rows
    return masks


def attend_cached(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    layer: int,
    spans: Sequence[AttentionSpan],
) -> Tensor:
    """Attention of every sequence's rows over its own cache, which takes in their keys and values first.

    query (R, Q, D), key and value (R, G, D).
    Each sequence is computed by itself, so its result does not depend on its neighbours in the batch.
    Returns (R, Q * D); rows outside every span are zero.
    """
    attended = torch.zeros_like(query)
    small = all(length == 1 and start < SHORT_CONTEXT for _, length, start, _, _ in spans)
    with one_thread() if small else nullcontext():
        for span in spans:
            _attend_one(query, key, value, layer, span, attended)
    return attended.flatten(1)


def _attend_one(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    layer: int,
    span: AttentionSpan,
    attended: Tensor,
) -> None:
    """One sequence's rows: keys and values into its cache, results into its rows of `attended`."""
    row, length, start, cache, masks = span
    _, num_query_heads, head_dim = query.shape
    group = num_query_heads // key.shape[1]
    end = start + length
    layer_keys, layer_values = cache.keys[layer], cache.values[layer]
    if not masks:
        layer_keys.select(1, start).copy_(key[row])
        layer_values.select(1, start).copy_(value[row])
        # The query heads that share a key/value head become rows of one small attention: (1, G, Q/G, D).
        grouped = query[row].view(1, -1, group, head_dim)
        result = F.scaled_dot_product_attention(
            grouped, layer_keys.narrow(1, 0, end).unsqueeze(0), layer_values.narrow(1, 0, end).unsqueeze(0)
        )
        attended[row].copy_(result.reshape(num_query_heads, head_dim))
        return
    rows = slice(row, row + length)
    layer_keys[:, start:end] = key[rows].transpose(0, 1)
    layer_values[:, start:end] = value[rows].transpose(0, 1)
    behind = slice(end, masks[-1].shape[1])  # seen by no row, but zero times what lay there before may be NaN
    layer_keys[:, behind] = 0
    layer_values[:, behind] = 0
    for mask in masks:
        rows = slice(row, row + mask.shape[0])
        result = F.scaled_dot_product_attention(
            query[rows].transpose(0, 1)[None],
            layer_keys[None, :, : mask.shape[1]],
            layer_values[None, :, : mask.shape[1]],
            attn_mask=mask,
            enable_gqa=True,
        )
        attended[rows] = result[0].transpose(0, 1)
        row = rows.stop


def attend_whole(query: Tensor, key: Tensor, value: Tensor, batch_size: int) -> Tensor:
    """Causal attention without a cache over `batch_size` sequences of equal length laid end to end.

    query (B * T, Q, D), key and value (B * T, G, D) -> (B * T, Q * D). Differentiable; for training.
    """
    return attend_piece(query, key, value, batch_size, None)[0]


def attend_piece(
    query: Tensor, key: Tensor, value: Tensor, batch_size: int, past: tuple[Tensor, Tensor] | None
) -> tuple[Tensor, tuple[Tensor, Tensor]]:
    """`attend_whole` behind P positions whose keys and values, (B, G, P, D) each, are `past`.

    Also returns both with the piece's own, (B, G, P + T, D).
    """
    group = query.shape[1] // key.shape[1]
    q, k, v = (t.unflatten(0, (batch_size, -1)).transpose(1, 2) for t in (query, key, value))
    start = 0
    if past is not None:
        start = past[0].shape[2]
        k, v = (torch.cat(pair, dim=2) for pair in zip(past, (k, v), strict=True))
    result = F.scaled_dot_product_attention(
        q,
        k.repeat_interleave(group, 1),
        v.repeat_interleave(group, 1),
        attn_mask=causal_mask(start, q.shape[2], q.dtype, q.device),
        is_causal=start == 0,
    )
    return result.transpose(1, 2).flatten(0, 1).flatten(1), (k, v)
