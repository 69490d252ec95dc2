"""The frozen base model and one batched step through it, with expert blocks where a variant has them.

Sequences of all variants share one pass: the base's products run over every row, a block only over the rows of
its own variant. Weights and products may be bfloat16; the residual stream is always float32, which costs little and
halves the error. R rows (padded), H hidden, V vocabulary.
"""

import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from model.attention import attend_cached, causal_mask, rope_table, rotate
from model.blocks.base import BlockSpan, ExpertBlock, ExpertUsage, RoutingTrace
from model.config import ModelConfig
from model.keys import KeyView
from model.kv_cache import SequenceCache
from model.projection import Projection

Attend = Callable[[Tensor, Tensor, Tensor], Tensor]

# Rows of a batch are padded to a multiple of this: then a row's bits do not depend on how many others there are.
ROW_MULTIPLE = {torch.float32: 4, torch.bfloat16: 2}
EXACT_LOGITS = 16


@dataclass(frozen=True, slots=True)
class LayerWeights:
    """One decoder layer. Fused projections: qkv (Q + 2G heads, H), gate_up (2 * intermediate, H)."""

    input_norm: Tensor
    qkv_proj: Projection
    o_proj: Projection
    post_attention_norm: Tensor
    gate_up_proj: Projection
    down_proj: Projection


@dataclass(frozen=True, slots=True)
class Variant:
    """Expert blocks by layer, and the count of what they routed."""

    blocks: Mapping[int, ExpertBlock]
    usage: ExpertUsage


@dataclass(slots=True, eq=False)
class Segment:
    """Consecutive tokens of one sequence in one batch."""

    token_ids: Sequence[int]
    start: int  # position of the first token
    cache: SequenceCache
    variant: Variant | None = None  # None: the untouched base
    keys: KeyView | None = None  # required by plastic blocks
    trace: RoutingTrace | None = None
    decode: bool = False
    flow_steps: int | None = None  # integration steps of flow-matching experts; None: the variant's own
    routed: list[NDArray[np.int64]] | None = None  # takes in each routed layer's expert ids (T, K)
    forced: Mapping[int, Tensor] | None = None  # expert ids (rows, K) of the leading rows, by layer
    offsets: Mapping[int, Tensor] | None = None  # the session's value offsets (E, H) by layer


class Transformer:
    """A Llama-family decoder with tied embeddings."""

    def __init__(
        self, config: ModelConfig, embedding: Tensor, layers: Sequence[LayerWeights], final_norm: Tensor
    ):
        assert len(layers) == config.num_hidden_layers, (len(layers), config.num_hidden_layers)
        self.config = config
        self.embedding = embedding
        self.layers = tuple(layers)
        self.final_norm = final_norm
        self.cos, self.sin = rope_table(config, embedding.device)

    @property
    def dtype(self) -> torch.dtype:
        return self.embedding.dtype

    @property
    def device(self) -> torch.device:
        return self.embedding.device

    @torch.inference_mode()
    def step(self, segments: Sequence[Segment]) -> Tensor:
        """Hidden states before the final norm, one row per token in segment order, (tokens, H).

        Decoding segments come first, and segments of one variant beside each other; each one's cache takes in
        its keys and values.
        """
        token_ids = [token for segment in segments for token in segment.token_ids]
        positions = [segment.start + i for segment in segments for i in range(len(segment.token_ids))]
        decode_rows = self._decode_rows(segments)
        padding = [0] * (-(len(token_ids) - decode_rows) % ROW_MULTIPLE[self.dtype])
        rope = self.rope_at(torch.tensor(positions + padding, device=self.device))
        hidden = self.embed(torch.tensor(token_ids + padding, device=self.device))
        spans, groups = self._plan(segments)
        for index, layer in enumerate(self.layers):
            hidden = self.layer(
                hidden,
                layer,
                rope,
                lambda q, k, v, index=index: attend_cached(q, k, v, index, spans),
                decode_rows,
            )
            for variant, first, end, block_spans in groups:
                block = variant.blocks.get(index)
                if block is not None:
                    rows = hidden[first:end]
                    rows += block.serve(rows, index, block_spans, variant.usage)
        return hidden[: len(token_ids)]

    def embed(self, token_ids: Tensor) -> Tensor:
        """The residual stream's start: token ids (...) -> (..., H) float32."""
        return F.embedding(token_ids, self.embedding).float()

    def layer(
        self,
        hidden: Tensor,
        weights: LayerWeights,
        rope: tuple[Tensor, Tensor],
        attend: Attend,
        decode_rows: int = 0,
    ) -> Tensor:
        """One decoder layer over rows (R, H) float32; `attend` maps rotated q, k and v (R, heads, D) to (R, H).

        The first `decode_rows` take the 4-bit products.
        """
        config = self.config
        normed = self._norm(hidden, weights.input_norm)
        qkv = weights.qkv_proj(normed, decode_rows)
        sizes = [config.query_size + config.key_value_size, config.key_value_size]
        qk, v = (part.unflatten(1, (-1, config.head_dim)) for part in qkv.split(sizes, dim=1))
        q, k = rotate(qk, *rope).split([config.num_attention_heads, config.num_key_value_heads], dim=1)
        hidden = hidden + weights.o_proj(attend(q, k, v), decode_rows)
        normed = self._norm(hidden, weights.post_attention_norm)
        gate, up = weights.gate_up_proj(normed, decode_rows).chunk(2, dim=1)
        return hidden + weights.down_proj(F.silu(gate) * up, decode_rows)

    @torch.inference_mode()
    def logits(self, hidden: Tensor, wanted: Tensor | None = None) -> Tensor:
        """Next-token logits of some rows: (n, H) -> (n, V) float32.

        bfloat16 rounds logits near 25 to eighths, which ties the best tokens; the likeliest, and for each row a
        token that is `wanted` (n), are computed again in float32.
        """
        count = len(hidden)
        padding = -count % ROW_MULTIPLE[self.dtype]
        hidden = F.pad(hidden, (0, 0, 0, padding))
        normed = F.rms_norm(hidden, self.final_norm.shape, self.final_norm, self.config.rms_norm_eps)
        logits = F.linear(normed.to(self.dtype), self.embedding).float()
        if self.dtype != torch.float32:
            again = logits.topk(EXACT_LOGITS, dim=1).indices  # (n, EXACT_LOGITS)
            if wanted is not None:
                again = torch.cat((again, F.pad(wanted, (0, padding)).unsqueeze(1)), dim=1)
            exact = (self.embedding[again].float() * normed.unsqueeze(1)).sum(-1)
            logits.scatter_(1, again, exact)
        return logits[:count]

    def rope_at(self, positions: Tensor) -> tuple[Tensor, Tensor]:
        return self.cos[positions].unsqueeze(1), self.sin[positions].unsqueeze(1)

    def _norm(self, hidden: Tensor, weight: Tensor) -> Tensor:
        return F.rms_norm(hidden, weight.shape, weight, self.config.rms_norm_eps).to(self.dtype)

    def _decode_rows(self, segments: Sequence[Segment]) -> int:
        """How many leading rows take the 4-bit products: those being written, if this model has such products."""
        if self.layers[0].qkv_proj.int4 is None:
            return 0
        leading = list(itertools.takewhile(lambda segment: segment.decode, segments))
        assert not any(s.decode for s in segments[len(leading) :]), "decoding segments come first"
        return sum(len(segment.token_ids) for segment in leading)

    def _plan(
        self, segments: Sequence[Segment]
    ) -> tuple[
        list[tuple[int, int, int, SequenceCache, Tensor | None]],
        list[tuple[Variant, int, int, list[BlockSpan]]],
    ]:
        """Where each segment's rows lie, for attention; and each variant's rows, for its blocks."""
        spans: list[tuple[int, int, int, SequenceCache, Tensor | None]] = []
        groups: list[tuple[Variant, int, int, list[BlockSpan]]] = []
        row = 0
        for segment in segments:
            length = len(segment.token_ids)
            mask = causal_mask(segment.start, length, self.dtype, self.device)
            spans.append((row, length, segment.start, segment.cache, mask))
            if segment.variant is not None:
                if not groups or groups[-1][0] is not segment.variant or groups[-1][2] != row:
                    groups.append((segment.variant, row, row, []))
                variant, first, _, members = groups.pop()
                members.append(
                    BlockSpan(
                        first=row - first,
                        end=row - first + length,
                        start=segment.start,
                        keys=segment.keys,
                        trace=segment.trace,
                        decode=segment.decode,
                        state=segment.cache.block_states,
                        flow_steps=segment.flow_steps,
                        routed=segment.routed,
                        forced=segment.forced,
                        offsets=segment.offsets,
                    )
                )
                groups.append((variant, first, row + length, members))
            row += length
        return spans, groups
