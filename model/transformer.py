"""The frozen base model and one batched step through it, with expert blocks where a variant has them.

Sequences of all variants share one pass: the base's products run over every row, a block only over the rows of
its own variant. Weights and products may be bfloat16; the residual stream is always float32, which costs little and
halves the error. R rows (padded), H hidden, V vocabulary.
"""

import itertools
from collections.abc import Callable, Generator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Protocol

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from model.attention import AttentionSpan, attend_cached, block_masks, rope_table, rotate
from model.blocks.base import BlockSpan, RoutingTrace
from model.blocks.compiled_rows import BlockRows, CompiledRows, Variant, about_blocks
from model.config import ModelConfig
from model.keys import KeyView
from model.kv_cache import CacheBudget, SequenceCache
from model.native.decoder import Decoder
from model.native.likely import LikelyHead
from model.native.prompt_rows import prompt_rows
from model.native.reader import Reader, readable
from model.projection import Projection
from model.qk_norm import QkNorm

Attend = Callable[[Tensor, Tensor, Tensor], Tensor]

# Rows of a batch are padded to a multiple of this: then a row's bits do not depend on how many others there are.
ROW_MULTIPLE = {torch.float32: 4, torch.bfloat16: 2}
EXACT_LOGITS = 16
PART_ROWS = 64  # of a prompt that is read beside others


@dataclass(frozen=True, slots=True)
class LayerWeights:
    """One decoder layer. Fused projections: qkv (Q + 2G heads, H), gate_up (2 * intermediate, H).

    A layer without an FFN of its own, whose last three are None, has a routed one behind it: an expert block.
    """

    input_norm: Tensor
    qkv_proj: Projection
    o_proj: Projection
    post_attention_norm: Tensor | None
    gate_up_proj: Projection | None
    down_proj: Projection | None
    qk_norm: QkNorm | None = None


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

    @property
    def plain(self) -> bool:
        """Being written, with nothing that an expert block would do beside its own work."""
        return self.decode and self.trace is None and self.forced is None and not self.offsets


class RecordedCalls(Protocol):
    """The way of written rows on a GPU: model.graphs."""

    def cache_budget(self, capacity_tokens: int) -> CacheBudget: ...

    def step(
        self, segments: Sequence[Segment], ordinary: Callable[[Sequence[Segment]], Tensor]
    ) -> Tensor: ...

    def logits(self, hidden: Tensor) -> Tensor | None: ...

    def settle(self) -> None: ...


class Transformer:
    """A Llama-family decoder."""

    def __init__(
        self,
        config: ModelConfig,
        embedding: Tensor,
        layers: Sequence[LayerWeights],
        final_norm: Tensor,
        head: Tensor | None = None,  # (V, H); None: tied to the embedding
        decoder: Decoder
        | None = None,  # the way of written rows, of the same weights; None: that of all rows
    ):
        assert len(layers) == config.num_hidden_layers, (len(layers), config.num_hidden_layers)
        self.config = config
        self.embedding = embedding
        self.head = embedding if head is None else head
        self.layers = tuple(layers)
        self.final_norm = final_norm
        self.decoder = decoder
        self.graphs: RecordedCalls | None = None
        self._passes: CompiledRows | None = None  # of the last step
        self.cos, self.sin = rope_table(config, embedding.device)
        self.reader: Reader | None = None  # the way of prompt rows, of the decoder's weights
        if decoder is not None and readable(decoder.matrices[:-1], config.head_dim):
            self.reader = Reader(config, decoder.matrices, (self.cos, self.sin))

    @property
    def dtype(self) -> torch.dtype:
        return self.embedding.dtype

    @property
    def device(self) -> torch.device:
        return self.embedding.device

    def cache_budget(self, capacity_tokens: int) -> CacheBudget:
        """Memory for sequences of this many positions in all."""
        if self.graphs is not None:
            return self.graphs.cache_budget(capacity_tokens)
        return CacheBudget(self.config, capacity_tokens, self.dtype, self.device)

    @cached_property
    def likely_head(self) -> LikelyHead:
        """The head for derivatives; where there is a `decoder`."""
        return LikelyHead(self.final_norm, self.config.rms_norm_eps, self.head)

    def settle(self) -> None:
        """Count the routing of steps that left it on the device."""
        if self.graphs is not None:
            self.graphs.settle()

    @torch.inference_mode()
    def step(self, segments: Sequence[Segment]) -> Tensor:
        """Hidden states before the final norm, one row per token in segment order, (tokens, H).

        Decoding segments come first, and segments of one variant beside each other; each one's cache takes in
        its keys and values.
        """
        count = 0
        if self.graphs or self.decoder or self.layers[0].qkv_proj.int4 is not None:
            count = sum(1 for _ in itertools.takewhile(lambda segment: segment.decode, segments))
            assert not any(s.decode for s in segments[count:]), "decoding segments come first"
        parts = [self._write(segments[:count])] if count else []
        if count < len(segments):
            parts.append(self._read(segments[count:]))
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    def _write(self, segments: Sequence[Segment]) -> Tensor:
        """`step` of sequences that are being written, a token each, in the form of the weights for few rows."""
        if self.graphs is not None:
            return self.graphs.step(segments, self._read)
        if self.decoder is None:
            return self._read(segments, written=True)
        hidden = self.embed(torch.tensor([segment.token_ids[0] for segment in segments], device=self.device))
        positions = [segment.start for segment in segments]
        caches = [segment.cache for segment in segments]
        groups = _plan_blocks(segments, compiled=True)
        passes = CompiledRows(groups, len(self.layers), len(segments), self._passes)
        self._passes = passes
        done = 0
        for index in _block_layers(groups):
            self.decoder.layers(done, index + 1, hidden, positions, caches, passes.table)
            _run_blocks(hidden, index, groups)
            done = index + 1
        self.decoder.layers(done, len(self.layers), hidden, positions, caches, passes.table)
        passes.record(groups)
        return hidden

    @torch.inference_mode()
    def reading(self, segments: Sequence[Segment], *, pauses: bool) -> Generator[bool, None, Tensor]:
        """`step` of prompts; with `pauses` in many short parts, where compiled code reads them.

        Says after each whether what comes next, an expert block, takes all rows at once.
        """
        if self.reader is None or self.decoder is None:
            return self._read(segments)
        hidden = self.embed(torch.tensor([token for s in segments for token in s.token_ids]))
        spans = [(s.start, len(s.token_ids), s.cache) for s in segments]
        parts = prompt_rows(self.decoder, self.reader, _cut(spans) if pauses else spans, hidden)
        groups = _plan_blocks(segments)
        half, blocks = 0, _block_layers(groups)
        for stop in sorted({2 * (layer + 1) for layer in blocks} | {2 * len(self.layers)}):
            has_block = stop // 2 - 1 in blocks
            while half < stop:
                until = half + 1 if pauses else stop
                for part in parts:
                    part(half, until)
                    if pauses:
                        yield has_block and until == stop and part is parts[-1]
                half = until
            if has_block:
                _run_blocks(hidden, stop // 2 - 1, groups)
                if pauses:
                    yield False
        return hidden

    def _read(self, segments: Sequence[Segment], *, written: bool = False) -> Tensor:
        """`step` of any rows; those that are `written` take the 4-bit products."""
        if self.reader is not None:
            return finished(self.reading(segments, pauses=False))
        token_ids = [token for segment in segments for token in segment.token_ids]
        positions = [segment.start + i for segment in segments for i in range(len(segment.token_ids))]
        padding = [0] * (0 if written else -len(token_ids) % ROW_MULTIPLE[self.dtype])
        rope = self.rope_at(torch.tensor(positions + padding, device=self.device))
        hidden = self.embed(torch.tensor(token_ids + padding, device=self.device))
        spans, groups = self._plan_attention(segments), _plan_blocks(segments)
        for index, layer in enumerate(self.layers):
            hidden = self.layer(
                hidden,
                layer,
                rope,
                lambda q, k, v, index=index: attend_cached(q, k, v, index, spans),
                written=written,
            )
            _run_blocks(hidden, index, groups)
        return hidden[: len(token_ids)]

    def embed(self, token_ids: Tensor) -> Tensor:
        """The residual stream's start: token ids (...) -> (..., H) float32."""
        if self.decoder is not None:
            return self.decoder.embed(token_ids.flatten()).unflatten(0, token_ids.shape)
        return F.embedding(token_ids, self.embedding).float()

    def layer(
        self,
        hidden: Tensor,
        weights: LayerWeights,
        rope: tuple[Tensor, Tensor],
        attend: Attend,
        *,
        written: bool = False,
    ) -> Tensor:
        """One decoder layer over rows (R, H) float32; `attend` maps rotated q, k and v (R, heads, D) to (R, H)."""
        config = self.config
        normed = self._norm(hidden, weights.input_norm)
        qkv = weights.qkv_proj(normed, written=written)
        sizes = [config.query_size + config.key_value_size, config.key_value_size]
        qk, v = (part.unflatten(1, (-1, config.head_dim)) for part in qkv.split(sizes, dim=1))
        qk = qk if weights.qk_norm is None else weights.qk_norm(qk)
        q, k = rotate(qk, *rope).split([config.num_attention_heads, config.num_key_value_heads], dim=1)
        hidden = hidden + weights.o_proj(attend(q, k, v), written=written)
        if weights.post_attention_norm is None or weights.gate_up_proj is None or weights.down_proj is None:
            return hidden
        normed = self._norm(hidden, weights.post_attention_norm)
        gate, up = weights.gate_up_proj(normed, written=written).chunk(2, dim=1)
        return hidden + weights.down_proj(F.silu(gate) * up, written=written)

    @torch.inference_mode()
    def logits(self, hidden: Tensor, wanted: Tensor | None = None, *, written: bool = False) -> Tensor:
        """Next-token logits of some rows: (n, H) -> (n, V) float32; `written`: of sequences that are being written.

        bfloat16 rounds logits near 25 to eighths, which ties the best tokens; the likeliest, and for each row a
        token that is `wanted` (n), are computed again in float32. Compiled code's and kernels' need none of that.
        """
        if written and self.decoder is not None:
            return self.decoder.logits(hidden)
        if written and self.graphs is not None and (logits := self.graphs.logits(hidden)) is not None:
            return logits
        count = len(hidden)
        padding = -count % ROW_MULTIPLE[self.dtype]
        hidden = F.pad(hidden, (0, 0, 0, padding))
        normed = F.rms_norm(hidden, self.final_norm.shape, self.final_norm, self.config.rms_norm_eps)
        logits = F.linear(normed.to(self.dtype), self.head).float()
        if self.dtype != torch.float32:
            again = logits.topk(EXACT_LOGITS, dim=1).indices  # (n, EXACT_LOGITS)
            if wanted is not None:
                again = torch.cat((again, F.pad(wanted, (0, padding)).unsqueeze(1)), dim=1)
            exact = (self.head[again].float() * normed.unsqueeze(1)).sum(-1)
            logits.scatter_(1, again, exact)
        return logits[:count]

    def rope_at(self, positions: Tensor) -> tuple[Tensor, Tensor]:
        return self.cos[positions].unsqueeze(1), self.sin[positions].unsqueeze(1)

    def _norm(self, hidden: Tensor, weight: Tensor) -> Tensor:
        return F.rms_norm(hidden, weight.shape, weight, self.config.rms_norm_eps).to(self.dtype)

    def _plan_attention(self, segments: Sequence[Segment]) -> list[AttentionSpan]:
        """Where each segment's rows lie."""
        spans: list[AttentionSpan] = []
        row = 0
        for segment in segments:
            length = len(segment.token_ids)
            masks = [] if segment.decode else block_masks(segment.start, length, self.dtype, self.device)
            spans.append((row, length, segment.start, segment.cache, masks))
            row += length
        return spans


def finished(reading: Generator[bool, None, Tensor]) -> Tensor:
    """What a `Transformer.reading` comes to, without a pause."""
    while True:
        try:
            next(reading)
        except StopIteration as end:
            return end.value


def _cut(spans: Sequence[tuple[int, int, SequenceCache]]) -> list[tuple[int, int, SequenceCache]]:
    """Sequences' rows, (start, length, cache) each, in pieces of at most PART_ROWS."""
    return [
        (start + at, min(PART_ROWS, length - at), cache)
        for start, length, cache in spans
        for at in range(0, length, PART_ROWS)
    ]


def _plan_blocks(segments: Sequence[Segment], *, compiled: bool = False) -> list[BlockRows]:
    """Each variant's rows, those that are being written apart, and with `compiled` those of each version of the keys."""
    groups: list[BlockRows] = []
    row = 0
    for segment in segments:
        length = len(segment.token_ids)
        if segment.variant is not None:
            takes = compiled and segment.plain
            about = about_blocks(segment.variant, segment.keys) if takes else None
            last = groups[-1] if groups else None
            alike = (
                last is not None
                and (last.variant, last.end, last.written) == (segment.variant, row, segment.decode)
                and last.about is about
            )
            if not alike:
                groups.append(BlockRows(segment.variant, row, row, segment.decode, about))
            group = groups[-1]
            group.spans.append(
                BlockSpan(
                    first=row - group.first,
                    end=row - group.first + length,
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
            group.end = row + length
        row += length
    return groups


def _block_layers(groups: Sequence[BlockRows]) -> list[int]:
    """Layers behind which somebody has a block that is not passed within the layers, in order."""
    return sorted({layer for group in groups if group.about is None for layer in group.variant.blocks})


def _run_blocks(hidden: Tensor, layer: int, groups: Sequence[BlockRows]) -> None:
    """Add what a layer's blocks contribute to their own rows of `hidden` (R, H), in place."""
    for group in groups:
        block = group.variant.blocks.get(layer)
        if block is not None and group.about is None:
            rows = hidden[group.first : group.end]
            rows += block.serve(rows, layer, group.spans, group.variant.usage)
