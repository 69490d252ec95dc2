"""A checkpoint's own routed FFN as a plastic block: SwiGLU experts behind a router whose rows are the anchors.

p = softmax(x W_g) over all experts, the K best, renormalised over them (Mixtral, `norm_topk_prob`) or not (OLMoE),
y = sum p_e E_e(x), plus a shared expert behind a gate of its own where the family has one (Qwen2-MoE). The scores come
from a `KeyView` and the query is the normed hidden state itself (Q = identity), so the anchors' keys give what the
checkpoint was trained to give. T tokens, K experts per token, E experts, V visible ones, H hidden, S shared width.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from model.blocks.base import BlockSpan, ExpertUsage
from model.blocks.experts import ACTIVATION_MULTIPLE, SwigluExperts, pad_rows
from model.blocks.some import SomeBlock, SomeConfig, by_version
from model.errors import UnsupportedConfig

WIDTH_MULTIPLE = 8  # at other widths a row's bits would depend on its neighbours (model.blocks.experts)
EXACT = ("norm", "anchors", "shared_gate")  # parameters that are float32
LARGE_EXPERT = 1 << 18  # weights of a matrix from which several threads pay


@dataclass(frozen=True, slots=True, kw_only=True)
class RoutedFfnConfig(SomeConfig):
    """`norm_topk_prob`: gates sum to 1. `shared_size`: width of the expert that every token takes; 0: there is none."""

    norm_topk_prob: bool = True
    shared_size: int = 0


class StoredExperts(SwigluExperts):
    """Experts that compute in the type that their weights are stored in; float32 in and out."""

    def forward(self, rows: Tensor, expert_ids: Tensor) -> Tensor:
        return super().forward(rows.to(self.dtype), expert_ids).float()

    def alignments(self, rows: Tensor, directions: Tensor, dtype: torch.dtype | None = None) -> Tensor:
        return super().alignments(rows, directions, self.dtype if dtype is None else dtype)

    @property
    def dtype(self) -> torch.dtype:
        return next(self.parameters()).dtype


class RoutedFfnBlock(SomeBlock):
    """The routed FFN of one layer, which has no other."""

    # Set once, by the constructor, which takes no other kind.
    config: RoutedFfnConfig  # pyright: ignore[reportIncompatibleVariableOverride]

    def __init__(self, config: RoutedFfnConfig):
        for name in ("expert_size", "shared_size"):
            if getattr(config, name) % WIDTH_MULTIPLE:
                raise UnsupportedConfig(
                    f"the experts' width {name} is {getattr(config, name)}; allowed: multiples of {WIDTH_MULTIPLE}"
                )
        super().__init__(config)
        hidden, shared = config.hidden_size, config.shared_size
        self.experts = StoredExperts(config.num_experts, hidden, config.expert_size)
        self.shared_gate_proj = self.shared_up_proj = self.shared_down_proj = self.shared_gate = None
        if shared:
            self.shared_gate_proj = nn.Parameter(torch.zeros(shared, hidden))
            self.shared_up_proj = nn.Parameter(torch.zeros(shared, hidden))
            self.shared_down_proj = nn.Parameter(torch.zeros(hidden, shared))
            self.shared_gate = nn.Parameter(torch.zeros(1, hidden))

    @classmethod
    def of(cls, config: RoutedFfnConfig, tensors: Mapping[str, Tensor]) -> "RoutedFfnBlock":
        """A frozen block of these tensors by parameter name, which it does not copy but for small ones.

        What decides the routing is float32 whatever it is stored in.
        """
        block = cls.without_weights(config)
        exact = {name: tensors[name].float() for name in EXACT if name in tensors}
        block.load_state_dict({**tensors, **exact}, assign=True)
        return block.requires_grad_(requires_grad=False).eval()

    @classmethod
    def without_weights(cls, config: RoutedFfnConfig) -> "RoutedFfnBlock":
        """Parameters that have shapes and take no memory."""
        with torch.device("meta"):
            return cls(config).requires_grad_(requires_grad=False)

    def sharing(self) -> "RoutedFfnBlock":
        """Another block of the same weights in memory; experts that one gets later the other has not."""
        return RoutedFfnBlock.of(self.config, dict(self.named_parameters()))

    def serve(self, hidden: Tensor, layer: int, spans: Sequence[BlockSpan], usage: ExpertUsage) -> Tensor:
        if self.config.hidden_size * self.config.expert_size < LARGE_EXPERT:
            return super().serve(hidden, layer, spans, usage)
        return self._serve(hidden, layer, spans, usage)

    def outside_credit(self, scores: Tensor, selected: Tensor, aligned: Tensor, of_output: Tensor) -> Tensor:
        if self.config.norm_topk_prob:
            return super().outside_credit(scores, selected, aligned, of_output)
        # Nobody's gate makes room: with o' = o + p y, d o' / d s = p (y - o') = p ((1 - p) y - o).
        gates = scores.softmax(-1)
        return -gates * ((1 - gates) * aligned - of_output)

    def active_parameters(self) -> int:
        own = (self.shared_gate_proj, self.shared_up_proj, self.shared_down_proj, self.shared_gate)
        return super().active_parameters() + sum(p.numel() for p in own if p is not None)

    def _combined(
        self, normed: Tensor, expert_ids: Tensor, gates: Tensor, *, written: bool = False
    ) -> Tensor:
        combined = super()._combined(normed, expert_ids, gates, written=written)
        gate_proj, up_proj, down_proj = self.shared_gate_proj, self.shared_up_proj, self.shared_down_proj
        if gate_proj is None or up_proj is None or down_proj is None or self.shared_gate is None:
            return combined
        rows = pad_rows(normed.to(gate_proj.dtype))
        shared = StoredExperts.run(rows, gate_proj, up_proj, down_proj)[: len(normed)].float()
        # Not a product with one output, whose bits would depend on how many rows there are.
        share = pad_rows((normed * self.shared_gate).sum(-1, keepdim=True), ACTIVATION_MULTIPLE).sigmoid()
        return combined + share[: len(normed)] * shared

    def _gates(self, all_scores: Tensor, chosen: Tensor, visible_ids: Tensor | None) -> Tensor:
        if self.config.norm_topk_prob:
            return super()._gates(all_scores, chosen, visible_ids)
        shown = all_scores if visible_ids is None else all_scores[..., visible_ids]
        return (all_scores.gather(-1, chosen) - shown.logsumexp(-1, keepdim=True)).exp()

    def _route(self, queries: Tensor, layer: int, spans: Sequence[BlockSpan]) -> tuple[Tensor, Tensor]:
        if self.config.norm_topk_prob:
            return super()._route(queries, layer, spans)
        k = self.config.num_experts_per_tok
        gates = torch.empty(len(queries), k)
        expert_ids = torch.empty(len(queries), k, dtype=torch.int64)
        host = queries.numpy(force=True)
        for keys, members in by_version(spans):
            rows = slice(members[0].first, members[-1].end)
            visible = keys.visible_ids(layer)
            shown = np.arange(len(keys.keys_of(layer))) if visible is None else visible
            of_all = np.broadcast_to(shown, (rows.stop - rows.start, len(shown)))
            scores = keys.score(layer, host[rows], np.ascontiguousarray(of_all))  # (T, V)
            probabilities = torch.from_numpy(scores).softmax(-1)
            gates[rows], places = probabilities.topk(k, dim=-1)
            expert_ids[rows] = torch.from_numpy(shown)[places]
            for span in members:
                if span.forced is not None:
                    ids = span.forced[layer].cpu()
                    given = slice(span.first, span.first + len(ids))
                    expert_ids[given] = ids
                    places = torch.searchsorted(torch.from_numpy(shown), ids)
                    of_span = probabilities[given.start - rows.start : given.stop - rows.start]
                    gates[given] = of_span.gather(1, places)
        return gates.to(queries.device), expert_ids.to(queries.device)
