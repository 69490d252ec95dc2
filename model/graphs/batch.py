"""What a recorded call reads and fills. R rows, H hidden, K experts per token."""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from model.graphs.blocks import GraphVariant

COLUMNS = ("token", "position", "first_block", "key_slot", "variant")  # of the inputs


@dataclass(frozen=True, slots=True)
class Batch:
    """One call's tensors, at fixed addresses, and the shape that it is recorded for."""

    inputs: Tensor  # (R, len(COLUMNS)) int64
    length: int  # positions that rows may have behind them, themselves included
    variants: Mapping[int, GraphVariant]  # by the number that their rows have in the inputs
    alike: bool  # all rows are of one variant or of none
    hidden: Tensor  # (R, H) float32, before the final norm
    expert_ids: Tensor  # (R, columns): K of each layer with blocks, one variant after another

    @classmethod
    def over(
        cls,
        inputs: Tensor,
        length: int,
        variants: Mapping[int, GraphVariant],
        hidden_size: int,
        *,
        alike: bool,
    ) -> "Batch":
        """With new memory for what it fills."""
        columns = sum(
            v.variant.blocks[at].config.num_experts_per_tok for v in variants.values() for at in v.layers
        )
        hidden = torch.empty(len(inputs), hidden_size, device=inputs.device)
        expert_ids = torch.empty(len(inputs), columns, dtype=torch.int64, device=inputs.device)
        return cls(inputs, length, variants, alike, hidden, expert_ids)
