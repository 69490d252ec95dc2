"""Sequences that are being written, a token each, as one recorded call per step. Knows no scheduling and no sampling.

What a recording depends on is how many rows and how many positions it is for, both rounded up to powers of two, and
whose blocks its rows pass through; tokens, positions, places in the pool of keys and values, and versions of routing
keys are inputs. Rows that cannot go this way are left to the model's other one. R rows, H hidden.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from model.graphs.batch import COLUMNS, Batch
from model.graphs.blocks import GraphVariant
from model.graphs.device import Call, Download, Recorder, upload
from model.graphs.kv_pool import PooledBudget, PooledCache
from model.graphs.way import way_on
from model.transformer import Segment, Transformer, Variant

MAX_ROWS = 256  # of one call; more are cut
SHORTEST = 256  # positions
MOST_RECORDINGS = (
    128  # about a megabyte of the device's memory each; beyond, those that were unused longest go
)
NO_VARIANT = -1

Ordinary = Callable[[Sequence[Segment]], Tensor]


@dataclass(frozen=True, slots=True)
class Recording:
    """A recorded call and what it fills."""

    replay: Call
    batch: Batch


@dataclass(frozen=True, slots=True)
class Routed:
    """Expert ids that are on their way to the host, and whose they are."""

    segments: Sequence[Segment]
    variants: Sequence[GraphVariant]
    expert_ids: Download


class GraphDecoder:
    """The recorded calls of one model."""

    def __init__(self, model: Transformer):
        self._model = model
        self._pool: PooledBudget | None = None
        self._way = way_on(model.device)
        self._inputs = torch.zeros(MAX_ROWS, len(COLUMNS), dtype=torch.int64, device=model.device)
        self._variants: dict[int, tuple[Variant, GraphVariant | None]] = {}  # by id; None: not covered
        self._routed: list[Routed] = []
        self._forget()

    def cache_budget(self, capacity_tokens: int) -> PooledBudget:
        """The memory of the sequences that may go this way, in place of what an earlier call gave."""
        self._forget()
        model = self._model
        self._pool = PooledBudget(model.config, capacity_tokens, model.dtype, model.device)
        return self._pool

    @torch.inference_mode()
    def step(self, segments: Sequence[Segment], ordinary: Ordinary) -> Tensor:
        """Hidden states before the final norm, one row per segment (R, H); caches take in keys and values.

        Nobody waits for the device here unless a segment asks for its expert ids.
        """
        present = {id(segment.variant): segment.variant for segment in segments}.values()
        fitting = {id(v) for v in present if v is None or self._variant(v) is not None}
        mine, others = list[int](), list[int]()
        for i, segment in enumerate(segments):
            (mine if id(segment.variant) in fitting and self._covers(segment) else others).append(i)
        parts = [
            self._run([segments[i] for i in mine[at : at + MAX_ROWS]]) for at in range(0, len(mine), MAX_ROWS)
        ]
        if any(segments[i].routed is not None for i in mine):
            self.settle()
        if not others:
            return parts[0] if len(parts) == 1 else torch.cat(parts)
        parts.append(ordinary([segments[i] for i in others]))
        order = np.argsort(mine + others).tolist()
        return torch.cat(parts)[upload(order, torch.int64, self._model.device)]

    @torch.inference_mode()
    def logits(self, hidden: Tensor) -> Tensor | None:
        """Next-token logits of written rows: (n, H) -> (n, V) float32; None: they are computed as others are."""
        return None if self._way.logits is None else self._way.logits(self._model, hidden)

    def settle(self) -> None:
        """Count what was routed. Without waiting once somebody has waited for the tokens."""
        routed, self._routed = self._routed, []
        for batch in routed:
            _count(batch)

    def _covers(self, segment: Segment) -> bool:
        """If its variant fits."""
        cache = segment.cache
        return (
            isinstance(cache, PooledCache)
            and cache.pool is self._pool
            and segment.trace is None
            and segment.forced is None
            and segment.offsets is None
        )

    def _variant(self, variant: Variant) -> GraphVariant | None:
        """None where its blocks do not fit."""
        known = self._variants.get(id(variant))
        if known is None or (known[1] is not None and not known[1].current):
            if known is not None:
                self._forget()
            fits = GraphVariant.covers(variant)
            known = variant, GraphVariant(variant, MAX_ROWS, self._model.device) if fits else None
            self._variants[id(variant)] = known
        return known[1]

    def _forget(self) -> None:
        """Drop all recordings: some memory that they know is to go."""
        self._recorder = Recorder(self._model.device)
        self._recordings: dict[tuple[int, int, tuple[int, ...]], Recording] = {}

    def _run(self, segments: Sequence[Segment]) -> Tensor:
        numbers = [NO_VARIANT if s.variant is None else id(s.variant) for s in segments]
        present = tuple(sorted(set(numbers)))
        covered = {number: self._variants[number][1] for number in present if number != NO_VARIANT}
        variants = {number: variant for number, variant in covered.items() if variant is not None}
        inputs = [
            (s.token_ids[0], s.start, _first_block(s), slot, number)
            for s, slot, number in zip(segments, _key_slots(segments, variants), numbers, strict=True)
        ]
        rows = _rounded(len(segments), 1)
        inputs += [(0, 0, 0, 0, NO_VARIANT)] * (rows - len(segments))
        self._inputs[:rows].copy_(upload(inputs, torch.int64, self._model.device))
        length = _rounded(max(s.start for s in segments) + 1, SHORTEST)
        key = rows, length, present
        recording = self._recordings.pop(key, None)
        if recording is None:
            recording = self._record(rows, length, variants, alike=len(present) == 1)
        self._recordings[key] = recording  # the newest are at the end
        if len(self._recordings) > MOST_RECORDINGS:
            self._recordings.pop(next(iter(self._recordings)))
        recording.replay()
        if variants:
            routed = Routed(
                segments, list(variants.values()), Download(recording.batch.expert_ids[: len(segments)])
            )
            self._routed.append(routed)
        return recording.batch.hidden[: len(segments)].clone()

    def _record(self, rows: int, length: int, variants: dict[int, GraphVariant], *, alike: bool) -> Recording:
        """`alike`: all rows are of one variant or of none."""
        model, pool = self._model, self._pool
        assert pool is not None, "no pool of keys and values"
        hidden_size = model.config.hidden_size
        batch = Batch.over(self._inputs[:rows], length, variants, hidden_size, alike=alike)
        run_layers = self._way.run_layers
        return Recording(self._recorder.capture(lambda: run_layers(model, pool, batch)), batch)


def _key_slots(segments: Sequence[Segment], variants: dict[int, GraphVariant]) -> list[int]:
    """Where each row's version of the keys lies in its variant's table; 0 without keys."""
    slots = [0] * len(segments)
    for variant in variants.values():
        if variant.keys is None:
            continue
        rows = [i for i, segment in enumerate(segments) if segment.variant is variant.variant]
        views = [view for i in rows if (view := segments[i].keys) is not None]
        assert len(views) == len(rows), "a plastic layer needs a key view"
        for row, slot in zip(rows, variant.keys.slots_of(views), strict=True):
            slots[row] = slot
    return slots


def _count(batch: Routed) -> None:
    """Add a batch's expert ids to its variants' usage, and leave them with the segments that ask for them."""
    host, column = batch.expert_ids.result().numpy(), 0
    for variant in batch.variants:
        rows = [i for i, segment in enumerate(batch.segments) if segment.variant is variant.variant]
        routed_rows = (batch.segments[row].routed for row in rows)
        asking = [(place, routed) for place, routed in enumerate(routed_rows) if routed is not None]
        for layer in sorted(variant.layers):
            end = column + variant.variant.blocks[layer].config.num_experts_per_tok
            expert_ids = host[rows, column:end]
            variant.variant.usage.add((layer,), expert_ids[None], decode=True)
            for place, routed in asking:
                routed.append(expert_ids[place][None])
            column = end


def _first_block(segment: Segment) -> int:
    assert isinstance(segment.cache, PooledCache), segment.cache
    return segment.cache.first


def _rounded(count: int, least: int) -> int:
    """The power of two that is not below either."""
    return max(least, 1 << (count - 1).bit_length())
