"""The experts of each row: the K best scores and their gates.

R rows, E experts, K experts per token, S slots of key versions, D key size.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

NUMBERS = 8192  # of keys that a program has in its registers


def choose(
    given: Tensor, expert_ids: Tensor, keys: tuple[Tensor, Tensor, Tensor] | None, *, renormalize: bool = True
) -> Tensor:
    """Fills expert_ids (R, K) int64 and returns their gates (R, K) float32, the largest first.

    Without `keys` what is given are scores (R, E). Otherwise they are queries (R, D), scored by the keys (S, E, D) of the
    row's slot (R), to which (S, E) is added: `keys` are these three, the slots last. Gates are the softmax over the
    chosen ones or, unless `renormalize`, over all.
    """
    rows, per_row = expert_ids.shape
    gates = torch.empty(rows, per_row, dtype=torch.float32, device=given.device)
    table, shown, slots = keys or (given, given, expert_ids)
    experts = given.shape[1] if keys is None else table.shape[1]
    wide = triton.next_power_of_2(experts)
    size = given.shape[1]
    _choose[(rows,)](
        *(given, given.stride(0), table, shown, slots, slots.stride(0)),
        *(expert_ids, expert_ids.stride(0), gates),
        EXPERTS=experts,
        WIDE=wide,
        SIZE=size,
        DEPTH=max(1, min(triton.next_power_of_2(size), NUMBERS // wide)),
        PER_ROW=per_row,
        PLACES=triton.next_power_of_2(per_row),
        KEYS=keys is not None,
        RENORMALIZE=renormalize,
        num_warps=4,
    )
    return gates


@triton.jit
def _choose(
    given,
    given_stride,
    table,
    shown,
    slots,
    slot_stride,
    expert_ids,
    id_stride,
    gates,
    EXPERTS: tl.constexpr,
    WIDE: tl.constexpr,
    SIZE: tl.constexpr,
    DEPTH: tl.constexpr,
    PER_ROW: tl.constexpr,
    PLACES: tl.constexpr,
    KEYS: tl.constexpr,
    RENORMALIZE: tl.constexpr,
):
    """A program for one row. WIDE, DEPTH and PLACES are powers of two; WIDE is not below EXPERTS, PLACES not below PER_ROW."""
    row = tl.program_id(0)
    expert = tl.arange(0, WIDE)
    there = expert < EXPERTS
    if KEYS:
        slot = tl.load(slots + row * slot_stride)
        scores = tl.load(shown + slot * EXPERTS + expert, mask=there, other=float("-inf"))
        for start in range(0, SIZE, DEPTH):
            at = start + tl.arange(0, DEPTH)
            inside = at < SIZE
            query = tl.load(given + row * given_stride + at, mask=inside, other=0.0)
            address = table + (slot * EXPERTS + expert)[:, None] * SIZE + at[None, :]
            keys = tl.load(address, mask=there[:, None] & inside[None, :], other=0.0)
            scores += tl.sum(keys * query[None, :], 1)
    else:
        scores = tl.load(given + row * given_stride + expert, mask=there, other=float("-inf"))
    largest = tl.max(scores, 0)
    place = tl.arange(0, PLACES)
    chosen = tl.zeros((PLACES,), tl.int64)
    shares = tl.zeros((PLACES,), tl.float32)
    left = scores
    for number in tl.static_range(PER_ROW):
        best, found = tl.max(left, 0, return_indices=True)
        found = tl.minimum(found, EXPERTS - 1)  # among numbers that are none, anything may be found
        chosen = tl.where(place == number, found.to(tl.int64), chosen)
        shares = tl.where(place == number, tl.exp(best - largest), shares)
        left = tl.where(expert == found, float("-inf"), left)
    total = tl.sum(shares, 0) if RENORMALIZE else tl.sum(tl.exp(scores - largest), 0)
    place_in = place < PER_ROW
    tl.store(expert_ids + row * id_stride + place, chosen, mask=place_in)
    tl.store(gates + row * PER_ROW + place, shares / total, mask=place_in)
