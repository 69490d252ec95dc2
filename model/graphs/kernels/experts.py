"""The selected experts of each row, read where they lie: no copies, and nothing of experts that nobody selected.

R rows, E experts, K experts per token, F expert width, H hidden. A row's experts are read anew even where another row
has the same ones; all of a layer's experts fit into a large GPU's cache.
"""

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

NUMBERS = 8192  # of a matrix that a program has in its registers
OUTPUTS = 64  # of a program of the last matrix


def add_selected(
    hidden: Tensor,
    norm: tuple[Tensor, float],
    inner: Sequence[Tensor],
    last: Tensor,
    expert_ids: Tensor,
    gates: Tensor,
    own: Tensor,
) -> None:
    """Add to the rows of hidden (R, H) float32 that are `own` (R) bool what their experts make of their RMS norm.

    `norm`: weight (H) and epsilon. `inner`: one matrix (E, F, H), through silu, or two, silu of the first times the
    second; last (E, H, F); expert_ids and gates (R, K).
    """
    (rows, size), per_row, width = hidden.shape, expert_ids.shape[1], last.shape[2]
    wide = triton.next_power_of_2(size)
    block = min(max(1, NUMBERS // wide // len(inner)), triton.next_power_of_2(width))
    activations = torch.empty(rows * per_row, width, dtype=torch.float32, device=hidden.device)
    shared = {"SIZE": size, "WIDTH": width, "PER_ROW": per_row, "num_warps": 4}
    _activate[(rows * per_row, triton.cdiv(width, block))](
        *(hidden, hidden.stride(0), *norm, inner[0], inner[-1], expert_ids, expert_ids.stride(0), own),
        activations,
        **shared,
        GATED=len(inner) == 2,
        WIDE=wide,
        BLOCK=block,
    )
    _add[(rows, triton.cdiv(size, OUTPUTS))](
        *(hidden, hidden.stride(0), last, expert_ids, expert_ids.stride(0), gates, own, activations),
        **shared,
        BLOCK=OUTPUTS,
        DEPTH=min(triton.next_power_of_2(width), NUMBERS // OUTPUTS // 2),
    )


@triton.jit
def _activate(
    hidden,
    hidden_stride,
    norm,
    eps,
    first,
    second,
    expert_ids,
    id_stride,
    own,
    activations,
    SIZE: tl.constexpr,
    WIDTH: tl.constexpr,
    PER_ROW: tl.constexpr,
    GATED: tl.constexpr,
    WIDE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """A program for BLOCK activations of one expert of a row. WIDE is a power of two and not below SIZE."""
    pair = tl.program_id(0)
    row = pair // PER_ROW
    if tl.load(own + row):
        at = tl.arange(0, WIDE)
        inside = at < SIZE
        place = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
        there = place < WIDTH
        expert = tl.load(expert_ids + row * id_stride + pair % PER_ROW)
        address = (expert * WIDTH + place)[:, None] * SIZE + at[None, :]
        tile = there[:, None] & inside[None, :]
        matrix = tl.load(first + address, mask=tile, other=0.0).to(tl.float32)
        normed = tl.load(hidden + row * hidden_stride + at, mask=inside, other=0.0)
        normed *= tl.rsqrt(tl.sum(normed * normed, 0) / SIZE + eps)
        normed *= tl.load(norm + at, mask=inside, other=0.0)
        result = tl.sum(matrix * normed[None, :], 1)
        result = result / (1 + tl.exp(-result))
        if GATED:
            matrix = tl.load(second + address, mask=tile, other=0.0).to(tl.float32)
            result *= tl.sum(matrix * normed[None, :], 1)
        tl.store(activations + pair * WIDTH + place, result, mask=there)


@triton.jit
def _add(
    hidden,
    hidden_stride,
    last,
    expert_ids,
    id_stride,
    gates,
    own,
    activations,
    SIZE: tl.constexpr,
    WIDTH: tl.constexpr,
    PER_ROW: tl.constexpr,
    BLOCK: tl.constexpr,
    DEPTH: tl.constexpr,
):
    """A program for BLOCK numbers of a row."""
    row = tl.program_id(0)
    if tl.load(own + row):
        place = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
        there = place < SIZE
        target = hidden + row * hidden_stride + place
        result = tl.load(target, mask=there, other=0.0)
        for number in tl.static_range(PER_ROW):
            expert = tl.load(expert_ids + row * id_stride + number)
            gate = tl.load(gates + row * PER_ROW + number)
            for start in range(0, WIDTH, DEPTH):
                at = start + tl.arange(0, DEPTH)
                inside = at < WIDTH
                active = tl.load(activations + (row * PER_ROW + number) * WIDTH + at, mask=inside, other=0.0)
                address = last + (expert * SIZE + place)[:, None] * WIDTH + at[None, :]
                matrix = tl.load(address, mask=there[:, None] & inside[None, :], other=0.0).to(tl.float32)
                result += gate * tl.sum(matrix * active[None, :], 1)
        tl.store(target, result, mask=there)
