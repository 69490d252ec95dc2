"""New experts beside those of trained `some` blocks: only they learn, on one kind of text.

The router stays as it is: the query projection and the keys of the experts that are there. The new experts' own
keys learn too, or nothing would be routed to them while they train; whether they are kept is the caller's choice.
B windows, T tokens of each, H hidden, E experts, n new ones, D key size.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from model.blocks.experts import EXPERT_FORMS, dispatch, padded_linear
from model.blocks.some import SomeBlock
from model.training.data import WindowSet
from model.training.evaluate import window_losses
from model.training.loop import TrainingConfig, fit
from model.training.upper import BlockPass
from model.transformer import Transformer


class WidenedBlock(nn.Module):
    """A frozen block and `count` new experts that its tokens may choose as well."""

    def __init__(self, block: SomeBlock, count: int):
        super().__init__()
        config = block.config
        self.block = block.requires_grad_(requires_grad=False)
        self.experts = EXPERT_FORMS[config.expert_form](count, config.hidden_size, config.expert_size)
        directions = torch.randn(count, config.key_size)
        norm = block.anchors.norm(dim=1).mean().cpu()
        self.keys = nn.Parameter(directions / directions.norm(dim=1, keepdim=True) * norm)
        self.to(block.anchors.device)

    def forward(self, hidden: Tensor) -> tuple[Tensor, Tensor]:
        """(B, T, H) -> contribution (B, T, H) and no auxiliary loss: the router is not trained."""
        block = self.block
        rows = block.normed(hidden).flatten(0, 1)
        queries = rows if block.query_proj is None else padded_linear(rows, block.query_proj)
        scores = queries @ torch.cat((block.anchors, self.keys)).T  # (B * T, E + n)
        best, expert_ids = scores.topk(block.config.num_experts_per_tok, dim=-1)
        known, new = block.experts.matrices(), self.experts.matrices()
        matrices = [(*mine, *added) for mine, added in zip(known, new, strict=True)]
        outputs = dispatch(
            rows,
            expert_ids,
            len(matrices[0]),
            lambda expert, own_rows: self.experts.run(own_rows, *(matrix[expert] for matrix in matrices)),
        )
        combined = (outputs * best.softmax(-1).unsqueeze(-1)).sum(1)
        return combined.view_as(hidden), hidden.new_zeros(())


@dataclass(frozen=True, slots=True)
class NewExperts:
    """What was trained, by layer, and the mean held-out loss in nats without and with it."""

    matrices: dict[int, dict[str, Tensor]]  # each (n, outputs, inputs), bfloat16
    keys: dict[int, Tensor]  # (n, D) float32
    loss_before: float
    loss_after: float


def train_experts(
    model: Transformer,
    blocks: Mapping[int, SomeBlock],
    layers: tuple[int, ...],
    count: int,
    config: TrainingConfig,
    train: WindowSet,
    heldout: WindowSet,
    run: Path,
) -> NewExperts:
    """Train `count` new experts in each of `layers`, or go on where `run` left off."""
    torch.manual_seed(config.seed)
    widened = {layer: WidenedBlock(blocks[layer], count) for layer in layers}
    learning = [p for each in widened.values() for p in each.parameters() if p.requires_grad]
    everything: dict[int, nn.Module] = {**blocks, **widened}
    groups = [{"params": learning, "rate_scale": 1.0}]
    fit(model, everything, groups, config, {train.domain: train}, run, run / "lower", "train experts")
    for each in widened.values():
        for matrix in each.experts.parameters():
            matrix.data = matrix.data.bfloat16().float()  # measured as they are written
    compared: dict[str, Mapping[int, BlockPass]] = {"before": blocks, "after": everything}
    losses = window_losses(model, compared, {heldout.domain: heldout})
    return NewExperts(
        {
            layer: {name: p.detach().bfloat16().cpu() for name, p in each.experts.stacked.items()}
            for layer, each in widened.items()
        },
        {layer: each.keys.detach().cpu() for layer, each in widened.items()},
        float(losses["before"][heldout.domain].mean()),
        float(losses["after"][heldout.domain].mean()),
    )
