"""A sequence's next tokens as the model takes them, and what computing them leaves: its routing, a lesson."""

from collections.abc import Collection

import numpy as np
import torch
from numpy.typing import NDArray

from model.blocks.base import RoutingTrace
from model.transformer import Segment, Variant
from server.engine.sequence import Lesson, RoutedRows, Sequence


def next_segment(
    sequence: Sequence, count: int, variant: Variant | None, plastic_layers: Collection[int]
) -> Segment:
    """The token that was written last, or the next `count` of the prompt. `plastic_layers`: whose routing may teach."""
    assert sequence.cache is not None, sequence.sequence_id
    routed: list[NDArray[np.int64]] | None = [] if sequence.report.routed_experts else None
    if sequence.decoding:
        position = len(sequence.prompt_token_ids) + len(sequence.generated) - 1
        return Segment(
            sequence.generated[-1:],
            position,
            sequence.cache,
            variant,
            sequence.keys,
            decode=True,
            flow_steps=sequence.flow_steps,
            routed=routed,
            offsets=sequence.offsets,
        )
    start = sequence.prefilled
    teaching = sequence.teach is not None and start + 1 < len(sequence.prompt_token_ids)
    return Segment(
        sequence.prompt_token_ids[start : start + count],
        start,
        sequence.cache,
        variant,
        sequence.keys,
        _trace(sequence, variant, plastic_layers) if teaching else None,
        flow_steps=sequence.flow_steps,
        routed=routed,
        forced=_forced(sequence, variant, start, count),
        offsets=sequence.offsets,
    )


def lesson_of(sequence: Sequence, segment: Segment, hidden: torch.Tensor) -> Lesson:
    """What a teaching prompt's chunk with hidden states (T, H) has to teach."""
    assert segment.keys is not None, sequence.sequence_id
    assert segment.trace is not None, sequence.sequence_id
    following = sequence.prompt_token_ids[segment.start + 1 : segment.start + 1 + len(hidden)]
    return Lesson(
        sequence,
        segment.keys,
        segment.trace,
        segment.start,
        hidden[: len(following)],
        torch.tensor(following),
        segment.offsets,
    )


def routed_rows(segment: Segment) -> RoutedRows:
    """Expert ids (T, layers, K) of a segment that was asked for them, in as few bytes as they fit."""
    assert segment.variant is not None, segment
    assert segment.routed is not None, segment
    stacked = np.stack(segment.routed, axis=1)
    return stacked.astype(np.uint8 if segment.variant.usage.counts.shape[-1] <= 256 else np.uint16)


def _trace(sequence: Sequence, variant: Variant | None, plastic_layers: Collection[int]) -> RoutingTrace:
    """Keys learn in the plastic layers, value offsets in all that have blocks."""
    if sequence.newest_offsets is None or variant is None:
        return RoutingTrace(frozenset(plastic_layers))
    return RoutingTrace(frozenset(variant.blocks), entry_layer=min(plastic_layers))


def _forced(
    sequence: Sequence, variant: Variant | None, start: int, count: int
) -> dict[int, torch.Tensor] | None:
    """The chunk's part of the experts that the request prescribes, by layer."""
    if sequence.forced is None or variant is None or start >= len(sequence.forced):
        return None
    rows = torch.from_numpy(sequence.forced[start : start + count].astype(np.int64))
    return {layer: rows[:, i].contiguous() for i, layer in enumerate(sorted(variant.blocks))}
