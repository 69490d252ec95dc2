"""Top-k experts behind a linear router: p = softmax(x W_g), the K best, y = sum p_e E_e(x).

T tokens, K experts per token, E experts, H hidden.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from model.blocks.base import (
    BlockConfig,
    BlockSpan,
    ExpertUsage,
    all_written,
    check_choice,
    forced_rows,
    record_routing,
)
from model.blocks.compiled_block import CompiledBlock
from model.blocks.compiled_weights import CompiledWeights, FoundKeys
from model.blocks.experts import EXPERT_FORMS, Stacked, compiles, padded_linear
from model.blocks.routing import switch_auxiliary_loss, top_k_of_softmax
from model.keys import KeyView
from model.native.experts import choose
from model.threads import one_thread


@dataclass(frozen=True, slots=True, kw_only=True)
class MoeConfig(BlockConfig):
    """`expert_form`: "swiglu" as in Mixtral and OLMoE, or "silu". `norm_topk_prob`: gates sum to 1."""

    expert_form: str = "swiglu"
    norm_topk_prob: bool = True


class MoeBlock(CompiledBlock):
    """One routed layer. Only selected experts execute."""

    config: MoeConfig

    def __init__(self, config: MoeConfig):
        super().__init__(config)
        check_choice(config, "expert_form", EXPERT_FORMS)
        hidden = config.hidden_size
        self.router = nn.Parameter(torch.randn(config.num_experts, hidden) * hidden**-0.5)
        self.experts = EXPERT_FORMS[config.expert_form](config.num_experts, hidden, config.expert_size)

    def serve(self, hidden: Tensor, layer: int, spans: Sequence[BlockSpan], usage: ExpertUsage) -> Tensor:
        forced = forced_rows(spans, layer)
        if all_written(spans) and not forced and compiles(hidden, self.router):
            combined, expert_ids = self._write(hidden)
        else:
            with one_thread():
                combined, _, expert_ids = self._route(self.normed(hidden), forced)
        record_routing(usage, layer, expert_ids, spans)
        return combined

    def compiled(self, layer: int, keys: KeyView | None) -> tuple[CompiledWeights, FoundKeys] | None:
        weights = self.compiled_weights()
        return None if weights is None else (weights, (0, 0, self.config.num_experts))

    def copied(self, stacked: Stacked) -> CompiledWeights | None:
        over_all = not self.config.norm_topk_prob
        return CompiledWeights.of(self, self.router, self.experts, stacked, over_all=over_all)

    def forward(self, hidden: Tensor) -> tuple[Tensor, Tensor]:
        combined, router_logits, expert_ids = self._route(self.normed(hidden).flatten(0, 1))
        return combined.view_as(hidden), switch_auxiliary_loss(router_logits, expert_ids)

    def active_parameters(self) -> int:
        return (
            self.norm.numel()
            + self.router.numel()
            + self.experts.active_parameters(self.config.num_experts_per_tok)
        )

    def _write(self, hidden: Tensor) -> tuple[Tensor, Tensor]:
        """`_route` of rows that are being written, one by one: mixture (T, H), expert ids (T, K)."""
        normed, router_logits = self.projected(hidden, self.router, written=True)
        gates = hidden.new_empty(len(hidden), self.config.num_experts_per_tok)
        expert_ids = torch.empty(gates.shape, dtype=torch.int64)
        choose(router_logits.numpy(), self.config.norm_topk_prob, gates.numpy(), expert_ids.numpy())
        return self.experts.mix(normed, expert_ids, gates, written=True), expert_ids

    def _route(
        self, normed: Tensor, forced: Sequence[tuple[slice, Tensor]] = ()
    ) -> tuple[Tensor, Tensor, Tensor]:
        """normed (T, H) -> mixture (T, H), router logits (T, E), expert ids (T, K)."""
        router_logits = padded_linear(normed, self.router)
        gates, expert_ids = top_k_of_softmax(
            router_logits,
            self.config.num_experts_per_tok,
            renormalize=self.config.norm_topk_prob,
            forced=forced,
        )
        return self.experts.mix(normed, expert_ids, gates), router_logits, expert_ids
