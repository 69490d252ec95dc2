"""Flow-matching experts: each expert carries its tokens along a learned velocity field (mixture-of-flows 0.2.0).

dx/dt = v_e(x, t) from t = 0 to 1; the router is linear without bias, softmax, the K best, renormalised. The block's
contribution is the displacement, sum_e p_e (x_e(1) - x). The reference's first product is over [x; emb(t)]: the part
of emb(t) does not depend on x, so it becomes one bias per integration time. T tokens, E experts, H hidden, F width.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from model.blocks.base import (
    BlockSpan,
    ExpertBlock,
    ExpertUsage,
    all_written,
    check_choice,
    forced_rows,
    record_routing,
)
from model.blocks.experts import compiles, padded_linear
from model.blocks.flow_experts import FlowExperts, FmMoeConfig
from model.blocks.routing import (
    BALANCE_LOSS_COEF,
    RENORMALIZE_EPS,
    ROUTER_Z_LOSS_COEF,
    top_k_of_softmax,
    z_loss,
)
from model.blocks.solvers import SOLVERS
from model.native.experts import choose
from model.threads import one_thread


@dataclass(frozen=True, slots=True)
class UsageStats:
    """The reference's statistics of some tokens: both arrays (E), balance 1 when every expert gets as much."""

    expert_probs: Tensor
    expert_selections: Tensor
    balance_score: float


class FmMoeBlock(ExpertBlock):
    """One layer of flow-matching experts."""

    config: FmMoeConfig
    rows_at_once: ClassVar = 128  # some 10 ms

    def __init__(self, config: FmMoeConfig):
        super().__init__(config)
        check_choice(config, "solver", SOLVERS)
        self.router = nn.Parameter(torch.randn(config.num_experts, config.hidden_size) * 0.01)
        self.experts = FlowExperts(config)

    def serve(self, hidden: Tensor, layer: int, spans: Sequence[BlockSpan], usage: ExpertUsage) -> Tensor:
        forced = forced_rows(spans, layer)
        with one_thread():
            if all_written(spans) and not forced and compiles(hidden, self.router):
                return self._write(hidden, layer, spans, usage)
            normed = self.normed(hidden)
            gates, expert_ids, _ = self.route(normed, forced)
            record_routing(usage, layer, expert_ids, spans)
            parts = [
                self.experts(normed[rows], expert_ids[rows], steps or self.config.flow_steps)
                for rows, steps in _rows_by_steps(spans)
            ]
            return (torch.cat(parts) * gates.unsqueeze(-1)).sum(1)

    def forward(self, hidden: Tensor) -> tuple[Tensor, Tensor]:
        normed = self.normed(hidden).flatten(0, 1)
        contribution, router_logits = self.displacement(normed, self.config.flow_steps)
        return contribution.view_as(hidden), flow_auxiliary_loss(router_logits)

    def active_parameters(self) -> int:
        return (
            self.norm.numel()
            + self.router.numel()
            + self.experts.active_parameters(self.config.num_experts_per_tok)
        )

    def displacement(self, rows: Tensor, steps: int) -> tuple[Tensor, Tensor]:
        """sum_e p_e (x_e(1) - x) of rows (T, H), and the router logits (T, E)."""
        gates, expert_ids, router_logits = self.route(rows)
        outputs = self.experts(rows, expert_ids, steps)  # (T, K, H)
        return (outputs * gates.unsqueeze(-1)).sum(1), router_logits

    def route(
        self, rows: Tensor, forced: Sequence[tuple[slice, Tensor]] = ()
    ) -> tuple[Tensor, Tensor, Tensor]:
        """rows (T, H) -> gates (T, K), expert ids (T, K), router logits (T, E)."""
        router_logits = padded_linear(rows, self.router)
        gates, expert_ids = top_k_of_softmax(
            router_logits, self.config.num_experts_per_tok, eps=RENORMALIZE_EPS, forced=forced
        )
        return gates, expert_ids, router_logits

    def _write(self, hidden: Tensor, layer: int, spans: Sequence[BlockSpan], usage: ExpertUsage) -> Tensor:
        """`serve` of rows that are being written, compiled."""
        normed, router_logits = self.projected(hidden, self.router, written=True)
        gates = hidden.new_empty(len(hidden), self.config.num_experts_per_tok)
        expert_ids = torch.empty(gates.shape, dtype=torch.int64)
        choose(router_logits.numpy(), True, gates.numpy(), expert_ids.numpy())
        record_routing(usage, layer, expert_ids, spans)
        mixed = torch.empty_like(hidden)
        for rows, steps in _rows_by_steps(spans):
            self.experts.write(
                normed[rows], expert_ids[rows], gates[rows], steps or self.config.flow_steps, mixed[rows]
            )
        return mixed

    @torch.no_grad()
    def usage_stats(self, rows: Tensor) -> UsageStats:
        """The reference's `get_expert_usage_stats` over rows (T, H)."""
        _, expert_ids, router_logits = self.route(rows)
        selections = torch.bincount(expert_ids.flatten(), minlength=self.config.num_experts).float()
        uneven = (selections - selections.mean()).abs().sum() / (2 * selections.sum())
        return UsageStats(router_logits.softmax(-1).mean(0), selections, 1.0 - float(uneven))


def flow_auxiliary_loss(router_logits: Tensor) -> Tensor:
    """0.01 E sum_e (mean p_e - 1/E)^2 + 0.001 mean logsumexp^2, over router logits (T, E)."""
    experts = router_logits.shape[-1]
    uneven = (router_logits.softmax(-1).mean(0) - 1.0 / experts).square().sum()
    return BALANCE_LOSS_COEF * experts * uneven + ROUTER_Z_LOSS_COEF * z_loss(router_logits)


def load_reference(block: FmMoeBlock, state: Mapping[str, Tensor]) -> None:
    """Copy a mixture-of-flows 0.2.0 state dict into a block of the same sizes. Raises KeyError, RuntimeError."""
    hidden = block.config.hidden_size
    names = {
        "input_bias": "0.bias",
        "input_norm": "2.weight",
        "input_norm_bias": "2.bias",
        "hidden_proj": "4.weight",
        "hidden_bias": "4.bias",
        "hidden_norm": "6.weight",
        "hidden_norm_bias": "6.bias",
        "velocity_proj": "8.weight",
        "velocity_bias": "8.bias",
    }

    def stacked(name: str) -> Tensor:
        return torch.stack([state[f"experts.{e}.network.{name}"] for e in range(block.config.num_experts)])

    first = stacked("0.weight")  # (E, F, H + time)
    own = {ours: stacked(theirs) for ours, theirs in names.items()}
    own |= {"input_proj": first[..., :hidden], "time_proj": first[..., hidden:]}
    block.experts.load_state_dict(own)
    with torch.no_grad():
        block.router.copy_(state["router.gate.weight"])


def _rows_by_steps(spans: Sequence[BlockSpan]) -> list[tuple[slice, int | None]]:
    """Consecutive rows that integrate in equally many steps."""
    groups: list[tuple[slice, int | None]] = []
    for span in spans:
        first = span.first
        if groups and groups[-1][1] == span.flow_steps:
            first = groups.pop()[0].start
        groups.append((slice(first, span.end), span.flow_steps))
    return groups
