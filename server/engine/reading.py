"""Prompts on their way through the layers, in parts, between which others are written."""

from collections.abc import Callable, Generator
from dataclasses import dataclass

from torch import Tensor

from model.transformer import Segment
from server.engine.sequence import Sequence

Batch = list[tuple[Sequence, int]]  # sequences, and how many tokens of each


@dataclass(slots=True)
class Reading:
    """One chunk each of some prompts. Their keys, and how they are cut, are those of its beginning."""

    batch: Batch
    segments: list[Segment]
    parts: Generator[bool, None, Tensor]  # of Transformer.reading

    def __contains__(self, sequence: Sequence) -> bool:
        return any(sequence is member for member, _ in self.batch)

    @property
    def wanted(self) -> bool:
        """Whether any of the sequences has not ended."""
        return any(sequence.cache is not None for sequence, _ in self.batch)

    def go_on(self, clock: Callable[[], float], until: float) -> Tensor | None:
        """Compute a part, and more as long as they are likely to be done by `until`. The hidden states at the end."""
        now = clock()
        while True:
            try:
                long_one_next = next(self.parts)
            except StopIteration as end:
                return end.value
            before, now = now, clock()
            if long_one_next or now + (now - before) > until:
                return None
