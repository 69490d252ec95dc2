"""Attention of one row of every sequence: rotation, writing into the pool and reading from it, in one kernel.

R rows, Q query heads, G key/value heads, D head_dim, S splits of the positions.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from model.config import ModelConfig
from model.kv_cache import POSITION_BLOCK

PROGRAMS = 264  # that are wanted: two for each processor of a large GPU
SHORTEST_SPLIT = 512  # positions
SMALLEST_DOT = 16  # rows, columns and depth of a tensor core's product
LOG2_E = 1.4426950408889634


def attend(
    qkv: Tensor,
    rope: tuple[Tensor, Tensor],
    positions: Tensor,
    first_blocks: Tensor,
    keys: Tensor,
    values: Tensor,
    length: int,
    config: ModelConfig,
) -> Tensor:
    """What `model.graphs.attention.attend_pooled` does, from projections (R, (Q + 2 G) * D) that are not rotated yet.

    `rope`: cos and sin of all positions; positions and first_blocks (R), below `length` the former; one layer's pool
    (blocks, POSITION_BLOCK, G, D). Returns (R, Q * D).
    """
    rows, heads, kv_heads, dim = (
        len(qkv),
        config.num_attention_heads,
        config.num_key_value_heads,
        config.head_dim,
    )
    splits = splits_of(rows * kv_heads, length)
    shape = (rows, heads, splits)
    attended = torch.empty(rows, heads * dim, dtype=qkv.dtype, device=qkv.device)
    parts, largest, totals = attended, attended, attended
    if splits > 1:
        parts = torch.empty(*shape, dim, dtype=torch.float32, device=qkv.device)
        largest, totals = (torch.empty(shape, dtype=torch.float32, device=qkv.device) for _ in range(2))
    wide = max(triton.next_power_of_2(dim), SMALLEST_DOT)
    _attend[(kv_heads, splits, rows)](
        *(qkv, qkv.stride(0), *rope, positions, positions.stride(0), first_blocks, first_blocks.stride(0)),
        *(keys, values, parts, largest, totals, dim**-0.5 * LOG2_E, splits, length // splits),
        HEADS=heads,
        KV_HEADS=kv_heads,
        DIM=dim,
        GROUP=max(triton.next_power_of_2(heads // kv_heads), SMALLEST_DOT),
        HALF=max(triton.next_power_of_2(dim // 2), SMALLEST_DOT),
        WIDE=wide,
        WHOLE=splits == 1,
        BLOCK=POSITION_BLOCK,
        num_warps=4,
        num_stages=3,
    )
    if splits > 1:
        _combine[(rows * heads,)](
            parts, largest, totals, attended, DIM=dim, WIDE=wide, SPLITS=splits, num_warps=4
        )
    return attended


def splits_of(programs: int, length: int) -> int:
    """Into how many parts the positions of each row and key/value head are cut, a power of two as `length` is."""
    splits = 1
    while splits * programs < PROGRAMS and length // splits > SHORTEST_SPLIT:
        splits *= 2
    return splits


@triton.jit(do_not_specialize=["splits", "length"])
def _attend(
    qkv,
    qkv_stride,
    cos,
    sin,
    positions,
    position_stride,
    first_blocks,
    block_stride,
    keys,
    values,
    parts,
    largests,
    totals,
    scale,
    splits,
    length,
    HEADS: tl.constexpr,
    KV_HEADS: tl.constexpr,
    DIM: tl.constexpr,
    GROUP: tl.constexpr,
    HALF: tl.constexpr,
    WIDE: tl.constexpr,
    WHOLE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """A program for the query heads of one key/value head of a row, over `length` of its positions.

    The row's own key and value come from its projections: what lies in the pool at its position is not read. GROUP, HALF
    and WIDE are powers of two, not below the heads that share a key, half a head and a head.
    """
    head = tl.program_id(0)
    split = tl.program_id(1)
    row = tl.program_id(2)
    position = tl.load(positions + row * position_stride).to(tl.int32)
    base = tl.load(first_blocks + row * block_stride).to(tl.int64) * BLOCK
    shared: tl.constexpr = HEADS // KV_HEADS
    member = tl.arange(0, GROUP)
    half = tl.arange(0, HALF)
    wide = tl.arange(0, WIDE)
    half_in, wide_in = half < DIM // 2, wide < DIM
    turn_cos = tl.load(cos + position * (DIM // 2) + half, mask=half_in, other=0.0)
    turn_sin = tl.load(sin + position * (DIM // 2) + half, mask=half_in, other=0.0)

    own_row = qkv + row * qkv_stride
    at = own_row + (head * shared + member)[:, None] * DIM + half[None, :]
    query_in = (member < shared)[:, None] & half_in[None, :]
    first = tl.load(at, mask=query_in, other=0.0).to(tl.float32)
    second = tl.load(at + DIM // 2, mask=query_in, other=0.0).to(tl.float32)
    query_1 = (first * turn_cos[None, :] - second * turn_sin[None, :]).to(qkv.dtype.element_ty)
    query_2 = (second * turn_cos[None, :] + first * turn_sin[None, :]).to(qkv.dtype.element_ty)

    at = own_row + (HEADS + head) * DIM + half
    first = tl.load(at, mask=half_in, other=0.0).to(tl.float32)
    second = tl.load(at + DIM // 2, mask=half_in, other=0.0).to(tl.float32)
    key_1 = (first * turn_cos - second * turn_sin).to(qkv.dtype.element_ty)
    key_2 = (second * turn_cos + first * turn_sin).to(qkv.dtype.element_ty)
    value = tl.load(own_row + (HEADS + KV_HEADS + head) * DIM + wide, mask=wide_in, other=0.0)

    begin = split * length
    own = (position >= begin) & (position < begin + length)
    place = (base + position) * (KV_HEADS * DIM) + head * DIM
    tl.store(keys + place + half, key_1, mask=half_in & own)
    tl.store(keys + place + DIM // 2 + half, key_2, mask=half_in & own)
    tl.store(values + place + wide, value, mask=wide_in & own)

    score = tl.sum(query_1.to(tl.float32) * key_1.to(tl.float32)[None, :], 1)
    score += tl.sum(query_2.to(tl.float32) * key_2.to(tl.float32)[None, :], 1)
    largest = tl.where(own, score * scale, float("-inf"))  # (GROUP)
    total = tl.where(own, 1.0, 0.0) + tl.zeros((GROUP,), tl.float32)
    result = tl.where(own, value.to(tl.float32)[None, :], 0.0) + tl.zeros((GROUP, WIDE), tl.float32)

    end = tl.minimum(begin + length, position)
    for start in range(begin, end, BLOCK):
        read = start + tl.arange(0, BLOCK)
        read_in = read < end
        address = (base + read) * (KV_HEADS * DIM) + head * DIM
        key_in = half_in[:, None] & read_in[None, :]
        key_at = keys + address[None, :] + half[:, None]
        scores = tl.dot(query_1, tl.load(key_at, mask=key_in, other=0.0), input_precision="ieee")
        second_half = tl.load(key_at + DIM // 2, mask=key_in, other=0.0)
        scores = tl.dot(query_2, second_half, scores, input_precision="ieee")  # (GROUP, BLOCK)
        scores = tl.where(read_in[None, :], scores * scale, float("-inf"))
        new = tl.maximum(largest, tl.max(scores, 1))
        weights = tl.exp2(scores - new[:, None])
        shrink = tl.exp2(largest - new)
        total = total * shrink + tl.sum(weights, 1)
        value_at = values + address[:, None] + wide[None, :]
        block = tl.load(value_at, mask=read_in[:, None] & wide_in[None, :], other=0.0)
        result = tl.dot(weights.to(block.dtype), block, result * shrink[:, None], input_precision="ieee")
        largest = new

    query = row * HEADS + head * shared + member
    out_in = (member < shared)[:, None] & wide_in[None, :]
    if WHOLE:
        target = parts + query[:, None] * DIM + wide[None, :]
        tl.store(target, (result / total[:, None]).to(parts.dtype.element_ty), mask=out_in)
    else:
        cell = query * splits + split
        tl.store(parts + cell[:, None] * DIM + wide[None, :], result, mask=out_in)
        tl.store(largests + cell, largest, mask=member < shared)
        tl.store(totals + cell, total, mask=member < shared)


@triton.jit
def _combine(
    parts,
    largests,
    totals,
    out,
    DIM: tl.constexpr,
    WIDE: tl.constexpr,
    SPLITS: tl.constexpr,
):
    """A program for one query head of a row. The split with the row's own position has a weight in any case."""
    query = tl.program_id(0)
    split = tl.arange(0, SPLITS)
    wide = tl.arange(0, WIDE)
    wide_in = wide < DIM
    largest = tl.load(largests + query * SPLITS + split)
    weights = tl.exp2(largest - tl.max(largest, 0))
    at = parts + (query * SPLITS + split)[:, None] * DIM + wide[None, :]
    result = tl.sum(tl.load(at, mask=wide_in[None, :], other=0.0) * weights[:, None], 0)
    result /= tl.sum(tl.load(totals + query * SPLITS + split) * weights, 0)
    tl.store(out + query * DIM + wide, result.to(out.dtype.element_ty), mask=wide_in)
