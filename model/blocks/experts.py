"""Grouped dispatch: every selected expert runs once, over just the rows that selected it.

T tokens, K experts per token, E experts, H hidden, F expert width.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

# Float32 products of this many rows (and its multiples) give each row the same bits whatever the other rows
# hold, which single rows and odd counts do not. Activations are alike only while 32 divides rows x width, so
# expert widths are multiples of 8. Both measured: tests/model/test_experts.py.
ROW_MULTIPLE = 4


def pad_rows(rows: Tensor) -> Tensor:
    """Rows filled up with zeros to a multiple of ROW_MULTIPLE."""
    missing = -len(rows) % ROW_MULTIPLE
    return F.pad(rows, (0, 0, 0, missing)) if missing else rows


def padded_linear(rows: Tensor, weight: Tensor) -> Tensor:
    """`F.linear` whose result for a row does not depend on how many other rows there are."""
    return F.linear(pad_rows(rows), weight)[: len(rows)]


def run_expert(rows: Tensor, down_proj: Tensor, up_proj: Tensor) -> Tensor:
    """One expert, `up(silu(down(x)))`: rows (n, H), down_proj (F, H), up_proj (H, F) -> (n, H)."""
    return F.linear(F.silu(F.linear(pad_rows(rows), down_proj)), up_proj)[: len(rows)]


def run_experts(
    rows: Tensor, expert_ids: Tensor, down_projs: Sequence[Tensor], up_projs: Sequence[Tensor]
) -> Tensor:
    """Outputs of the selected experts, per token and selection.

    rows (T, H), expert_ids (T, K), E projections (F, H) and (H, F) -> (T, K, H).
    """
    tokens, per_token = expert_ids.shape
    flat = expert_ids.flatten()
    order = torch.argsort(flat, stable=True)
    counts = torch.bincount(flat, minlength=len(down_projs)).tolist()
    inputs = rows[order // per_token]  # (T * K, H), one expert's rows beside each other
    outputs = [
        run_expert(own_rows, down_projs[expert], up_projs[expert])
        for expert, own_rows in enumerate(inputs.split(counts))
        if len(own_rows)
    ]
    inverse = torch.empty_like(order)
    inverse[order] = torch.arange(len(order), device=order.device)
    return torch.cat(outputs)[inverse].unflatten(0, (tokens, per_token))
