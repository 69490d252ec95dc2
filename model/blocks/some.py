"""SOME: experts found by the address they have now (SOME v2, formal definition sections 2 and 3).

query q = Q(x), score s_i = q . k_i, the K best, g = softmax(s_selected), y = sum g_i e_i(x).
Experts and Q are frozen after training; the trained keys become the anchors, and the keys in force come from
a `KeyView`. T tokens, K experts per token, E experts, D key size, H hidden.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from model.blocks.base import (
    BlockConfig,
    BlockSpan,
    ExpertUsage,
    LayerTrace,
    all_written,
    check_choice,
    record_routing,
)
from model.blocks.compiled_block import CompiledBlock
from model.blocks.compiled_weights import CompiledWeights, FoundKeys, found_keys
from model.blocks.experts import EXPERT_FORMS, Stacked, padded_linear
from model.blocks.routing import switch_auxiliary_loss
from model.errors import UnsupportedConfig
from model.keys import Float32Array, KeyView
from model.threads import one_thread
from model.value_offsets import add_offsets


@dataclass(frozen=True, slots=True, kw_only=True)
class SomeConfig(BlockConfig):
    """`query`: "linear", or "identity" (Q = identity: a pretrained router's rows are the keys).

    `expert_form`: "silu" as in the formal definition, or "swiglu" for experts that come from elsewhere.
    """

    key_size: int
    query: str = "linear"
    expert_form: str = "silu"


@dataclass(slots=True)
class Mixture:
    """What a block makes of B windows of T tokens."""

    combined: Tensor  # (B, T, H), the block's contribution
    all_scores: Tensor  # (B, T, E)
    trace: LayerTrace  # of the B * T rows


class SomeBlock(CompiledBlock):
    """One plastic layer."""

    config: SomeConfig

    def __init__(self, config: SomeConfig):
        super().__init__(config)
        check_choice(config, "query", ("linear", "identity"))
        check_choice(config, "expert_form", EXPERT_FORMS)
        hidden = config.hidden_size
        if config.query == "identity":
            if config.key_size != hidden:
                raise UnsupportedConfig(
                    f"some: with query 'identity' key_size is {config.key_size}; allowed: {hidden}"
                )
            self.query_proj = None
        else:
            self.query_proj = nn.Parameter(torch.randn(config.key_size, hidden) * hidden**-0.5)
        self.anchors = nn.Parameter(torch.randn(config.num_experts, config.key_size) * config.key_size**-0.5)
        self.experts = EXPERT_FORMS[config.expert_form](config.num_experts, hidden, config.expert_size)

    def serve(self, hidden: Tensor, layer: int, spans: Sequence[BlockSpan], usage: ExpertUsage) -> Tensor:
        with one_thread():
            return self._serve(hidden, layer, spans, usage)

    def _serve(self, hidden: Tensor, layer: int, spans: Sequence[BlockSpan], usage: ExpertUsage) -> Tensor:
        written = all_written(spans)
        if self.query_proj is None:
            normed = queries = self.normed(hidden)
        else:
            normed, queries = self.projected(hidden, self.query_proj, written=written)
        gates, expert_ids = self._route(queries, layer, spans)
        record_routing(usage, layer, expert_ids, spans)
        combined = self._combined(normed, expert_ids, gates, written=written)
        add_offsets(combined, expert_ids, gates, layer, spans)
        for span in spans:
            if span.trace is not None and layer in span.trace.layers:
                rows = slice(span.first, span.end)
                norms = torch.linalg.vector_norm(hidden[rows] + combined[rows], dim=-1)
                trace = LayerTrace(expert_ids[rows], gates[rows], queries[rows], normed[rows], norms)
                span.trace.by_layer[layer] = trace
                if span.trace.enters_at(layer):
                    span.trace.entry = hidden[rows].clone()
        return combined

    def compiled(self, layer: int, keys: KeyView | None) -> tuple[CompiledWeights, FoundKeys] | None:
        assert keys is not None, "a plastic layer needs a key view"
        weights, found = self.compiled_weights(), found_keys(keys, layer, self.config.num_experts_per_tok)
        return None if weights is None or found is None else (weights, found)

    def copied(self, stacked: Stacked) -> CompiledWeights | None:
        if self.query_proj is None:
            return None
        return CompiledWeights.of(self, self.query_proj, self.experts, stacked, over_all=False)

    def forward(self, hidden: Tensor) -> tuple[Tensor, Tensor]:
        mixture = self.mix(self.normed(hidden), self.anchors)
        auxiliary = switch_auxiliary_loss(mixture.all_scores.flatten(0, 1), mixture.trace.expert_ids)
        return mixture.combined, auxiliary

    def mix(
        self,
        normed: Tensor,
        keys: Tensor,
        offsets: Tensor | None = None,
        forced: Tensor | None = None,
        visible_ids: Tensor | None = None,
    ) -> Mixture:
        """Differentiable, on whole windows: normed (B, T, H), keys (E, D) or (B, E, D) one set a window.

        `offsets` (E, H) or (B, E, H) are added to the experts' outputs; `forced` (B, T, K) replaces the choice, which
        is among `visible_ids` then (None: all).
        """
        rows = normed.flatten(0, 1)
        queries = self._queries(rows)
        all_scores = queries.view(*normed.shape[:2], -1) @ keys.transpose(-1, -2)  # (B, T, E)
        chosen = (
            all_scores.topk(self.config.num_experts_per_tok, dim=-1).indices if forced is None else forced
        )
        gates = self._gates(all_scores, chosen, visible_ids)
        expert_ids = chosen.flatten(0, 1)
        combined = self._combined(rows, expert_ids, gates.flatten(0, 1)).view_as(normed)
        if offsets is not None:
            shares = torch.zeros_like(all_scores).scatter(-1, chosen, gates)
            combined = combined + shares @ offsets
        trace = LayerTrace(expert_ids, gates.flatten(0, 1), queries, rows)
        return Mixture(combined, all_scores, trace)

    def outside_credit(self, scores: Tensor, selected: Tensor, aligned: Tensor, of_output: Tensor) -> Tensor:
        """Credit (T, E) that experts would have beside the K `selected` (T, K), as model.credit defines it.

        scores (T, E); aligned (T, E): y . G of each expert; of_output (T, 1): o . G of what was selected.
        """
        joined = (scores - scores.gather(1, selected).logsumexp(1, keepdim=True)).sigmoid()
        return -(joined * (1 - joined)) * (aligned - of_output)

    def active_parameters(self) -> int:
        routing = self.anchors.numel() + (0 if self.query_proj is None else self.query_proj.numel())
        return self.norm.numel() + routing + self.experts.active_parameters(self.config.num_experts_per_tok)

    def _queries(self, normed: Tensor) -> Tensor:
        return normed if self.query_proj is None else padded_linear(normed, self.query_proj)

    def _combined(
        self, normed: Tensor, expert_ids: Tensor, gates: Tensor, *, written: bool = False
    ) -> Tensor:
        """normed (T, H), expert_ids and gates (T, K) -> what the rows get (T, H)."""
        return self.experts.mix(normed, expert_ids, gates, written=written)

    def _gates(self, all_scores: Tensor, chosen: Tensor, visible_ids: Tensor | None) -> Tensor:
        """Gates (..., K) of the `chosen` (..., K) of all scores (..., E), where some are `visible_ids`."""
        return all_scores.gather(-1, chosen).softmax(-1)

    def _route(self, queries: Tensor, layer: int, spans: Sequence[BlockSpan]) -> tuple[Tensor, Tensor]:
        """Gates and expert ids (T, K)."""
        scores, expert_ids = self._search(queries, layer, spans)
        return scores.softmax(-1), expert_ids

    def _search(self, queries: Tensor, layer: int, spans: Sequence[BlockSpan]) -> tuple[Tensor, Tensor]:
        """Scores and expert ids (T, K): each sequence's rows look up their own version."""
        host = queries.numpy(force=True)
        found = [
            keys.search(layer, host[members[0].first : members[-1].end], self.config.num_experts_per_tok)
            for keys, members in by_version(spans)
        ]
        scores, expert_ids = (
            torch.from_numpy(parts[0] if len(parts) == 1 else np.concatenate(parts))
            for parts in zip(*found, strict=True)
        )
        self._force(scores, expert_ids, host, layer, spans)
        return scores.to(queries.device), expert_ids.to(queries.device)

    @staticmethod
    def _force(
        scores: Tensor, expert_ids: Tensor, queries: Float32Array, layer: int, spans: Sequence[BlockSpan]
    ) -> None:
        """Where experts are given, put them and their scores in place of those that were found."""
        for span in spans:
            if span.forced is None:
                continue
            assert span.keys is not None, "a plastic layer needs a key view"
            ids = span.forced[layer].cpu()
            rows = slice(span.first, span.first + len(ids))
            expert_ids[rows] = ids
            scores[rows] = torch.from_numpy(span.keys.score(layer, queries[rows], ids.numpy()))


def by_version(spans: Sequence[BlockSpan]) -> Iterator[tuple[KeyView, Sequence[BlockSpan]]]:
    """Consecutive spans that see the same keys."""
    at = 0
    while at < len(spans):
        keys = spans[at].keys
        assert keys is not None, "a plastic layer needs a key view"
        until = at + 1
        while until < len(spans) and spans[until].keys is keys:
            until += 1
        yield keys, spans[at:until]
        at = until
