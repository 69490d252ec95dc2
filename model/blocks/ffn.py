"""A plain residual FFN: the control that routing has to beat. T tokens, H hidden."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from model.blocks.base import (
    BlockConfig,
    BlockSpan,
    ExpertBlock,
    ExpertUsage,
    count_parameters,
    record_routing,
)
from model.blocks.experts import pad_rows
from model.errors import UnsupportedConfig


class FfnBlock(ExpertBlock):
    """`up(silu(down(x)))`: one expert that every token takes."""

    def __init__(self, config: BlockConfig):
        super().__init__(config)
        if config.num_experts != 1:
            raise UnsupportedConfig(f"ffn: num_experts is {config.num_experts}; allowed: 1")
        hidden, width = config.hidden_size, config.expert_size
        self.down_proj = nn.Parameter(torch.randn(width, hidden) * hidden**-0.5)
        self.up_proj = nn.Parameter(torch.zeros(hidden, width))

    def serve(self, hidden: Tensor, layer: int, spans: Sequence[BlockSpan], usage: ExpertUsage) -> Tensor:
        record_routing(usage, layer, torch.zeros(len(hidden), 1, dtype=torch.int64), spans)
        return self._run(self.normed(hidden))

    def forward(self, hidden: Tensor) -> tuple[Tensor, Tensor]:
        return self._run(self.normed(hidden).flatten(0, 1)).view_as(hidden), hidden.new_zeros(())

    def active_parameters(self) -> int:
        return count_parameters(self)

    def _run(self, normed: Tensor) -> Tensor:
        inner = F.silu(F.linear(pad_rows(normed), self.down_proj))
        return F.linear(inner, self.up_proj)[: len(normed)]
