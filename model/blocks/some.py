"""SOME: experts found by the address they have now (SOME v2, formal definition sections 2 and 3).

query q = Q(x), score s_i = q . k_i, the K best, g = softmax(s_selected), y = sum g_i e_i(x).
Experts and Q are frozen after training; the trained keys become the anchors, and the keys in force come from
a `KeyView`. T tokens, K experts per token, E experts, D key size, H hidden.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from model.blocks.base import BlockConfig, BlockSpan, ExpertBlock, ExpertUsage, LayerTrace
from model.blocks.experts import padded_linear, run_experts
from model.threads import one_thread

BALANCE_LOSS_COEF = 0.01  # Switch Transformers section 2.2: E sum f_e P_e
ROUTER_Z_LOSS_COEF = 0.001  # ST-MoE section 2: mean logsumexp^2


class SomeBlock(ExpertBlock):
    """One plastic layer."""

    def __init__(self, config: BlockConfig):
        super().__init__(config)
        experts, width, hidden = config.num_experts, config.expert_size, config.hidden_size
        self.query_proj = nn.Parameter(torch.randn(config.key_size, hidden) * hidden**-0.5)
        self.anchors = nn.Parameter(torch.randn(experts, config.key_size) * config.key_size**-0.5)
        self.down_proj = nn.Parameter(torch.randn(experts, width, hidden) * hidden**-0.5)
        self.up_proj = nn.Parameter(torch.zeros(experts, hidden, width))
        self._frozen_experts: tuple[tuple[Tensor, ...], tuple[Tensor, ...]] | None = None

    def serve(self, hidden: Tensor, layer: int, spans: Sequence[BlockSpan], usage: ExpertUsage) -> Tensor:
        with one_thread():
            return self._serve(hidden, layer, spans, usage)

    def _serve(self, hidden: Tensor, layer: int, spans: Sequence[BlockSpan], usage: ExpertUsage) -> Tensor:
        normed, queries = self._queries(hidden)
        scores, expert_ids = self._search(queries, layer, spans, usage)
        gates = scores.softmax(-1)
        outputs = run_experts(normed, expert_ids, *self._experts())  # (T, K, H)
        combined = (outputs * gates.unsqueeze(-1)).sum(1)
        for span in spans:
            if span.trace is not None and layer in span.trace.layers:
                rows = slice(span.first, span.end)
                span.trace.by_layer[layer] = LayerTrace(
                    expert_ids[rows],
                    gates[rows],
                    queries[rows],
                    outputs[rows] - combined[rows].unsqueeze(1),
                )
        return combined

    def forward(self, hidden: Tensor) -> tuple[Tensor, Tensor]:
        normed, queries = self._queries(hidden)
        all_scores = queries @ self.anchors.T  # (T, E)
        scores, expert_ids = all_scores.topk(self.config.num_experts_per_tok, dim=-1)
        gates = scores.softmax(-1)
        outputs = run_experts(normed, expert_ids, self.down_proj.unbind(), self.up_proj.unbind())
        return (outputs * gates.unsqueeze(-1)).sum(1), self._auxiliary_loss(all_scores, expert_ids)

    def _experts(self) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
        if self._frozen_experts is None:
            self._frozen_experts = (self.down_proj.data.unbind(), self.up_proj.data.unbind())
        return self._frozen_experts

    def _queries(self, hidden: Tensor) -> tuple[Tensor, Tensor]:
        normed = F.rms_norm(hidden.float(), self.norm.shape, self.norm, self.config.rms_norm_eps)
        return normed, padded_linear(normed, self.query_proj)

    def _search(
        self, queries: Tensor, layer: int, spans: Sequence[BlockSpan], usage: ExpertUsage
    ) -> tuple[Tensor, Tensor]:
        """Each sequence's rows look up their own version; consecutive rows of one version go together."""
        k = self.config.num_experts_per_tok
        scores = torch.empty(len(queries), k)
        expert_ids = torch.empty(len(queries), k, dtype=torch.int64)
        host = queries.numpy(force=True)
        at = 0
        while at < len(spans):
            until = at + 1
            while (
                until < len(spans)
                and spans[until].keys is spans[at].keys
                and spans[until].decode == spans[at].decode
            ):
                until += 1
            rows = slice(spans[at].first, spans[until - 1].end)
            found_scores, found_ids = spans[at].keys.search(layer, host[rows], k)
            scores[rows] = torch.from_numpy(found_scores)
            expert_ids[rows] = torch.from_numpy(found_ids)
            usage.add(layer, found_ids, decode=spans[at].decode)
            at = until
        return scores.to(queries.device), expert_ids.to(queries.device)

    def _auxiliary_loss(self, scores: Tensor, expert_ids: Tensor) -> Tensor:
        experts = self.config.num_experts
        share = torch.bincount(expert_ids.flatten(), minlength=experts).float() / expert_ids.numel()
        balance = experts * (share * scores.softmax(-1).mean(0)).sum()
        z_loss = scores.logsumexp(-1).square().mean()
        return BALANCE_LOSS_COEF * balance + ROUTER_Z_LOSS_COEF * z_loss
