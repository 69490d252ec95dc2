"""Rows that pass their expert blocks within the compiled call of the layers, and what that leaves behind.

L layers, N passes of a row through a block, K experts per token, D key size.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from model.blocks.base import BlockSpan, ExpertBlock, ExpertUsage
from model.keys import KeyView
from model.native.routed import COLUMNS

About = Mapping[int, tuple[int, ...]]  # by layer, what compiled code needs to know


@dataclass(frozen=True, slots=True)
class Variant:
    """Expert blocks by layer, and the count of what they routed."""

    blocks: Mapping[int, ExpertBlock]
    usage: ExpertUsage


@dataclass(slots=True)
class BlockRows:
    """Consecutive rows of one variant in a batch, all being written or none: so no row's way hangs on another's.

    `about`: what they see, where they pass their blocks within the layers' compiled call.
    """

    variant: Variant
    first: int
    end: int
    written: bool
    about: About | None
    spans: list[BlockSpan] = field(default_factory=list[BlockSpan])


def about_blocks(variant: Variant, keys: KeyView | None) -> About | None:
    """What compiled code needs to know for rows that see these keys; None: it does not take them in every layer."""
    about = {layer: block.compiled(layer, keys) for layer, block in variant.blocks.items()}
    known = {layer: numbers for layer, numbers in about.items() if numbers is not None}
    return known if len(known) == len(about) else None


class CompiledRows:
    """One step's rows through their blocks. `table`: what `model.native.decode.work` takes as blocks."""

    def __init__(self, groups: Sequence[BlockRows], num_layers: int):
        self._passes: list[tuple[int, int, BlockRows]] = []  # first pass, layer
        starts, rows = [0], list[tuple[int, ...]]()
        for layer in range(num_layers):
            for group in groups:
                if group.about is not None and layer in group.about:
                    self._passes.append((len(rows), layer, group))
                    rows += [(*group.about[layer], row) for row in range(group.first, group.end)]
            starts.append(len(rows))
        per_token = max((group.variant.usage.num_experts_per_tok for _, _, group in self._passes), default=0)
        about = np.array(rows, np.int64).reshape(-1, COLUMNS)
        self.table = np.array(starts), about, np.empty((len(rows), per_token + 1), np.int64)

    def record(self) -> None:
        """Count what the rows selected, and leave the ids with the spans that ask for them.

        Where a score was not finite, raises what a search among the row's keys does.
        """
        chosen = self.table[2]
        if chosen[:, -1].any():
            self._refuse()
        for first, layer, group in self._passes:
            usage = group.variant.usage
            ids = chosen[first : first + group.end - group.first, : usage.num_experts_per_tok]
            usage.add(layer, ids, decode=True)
            for span in group.spans:
                if span.routed is not None:
                    span.routed.append(ids[span.first : span.end])

    def _refuse(self) -> None:
        for first, layer, group in self._passes:
            for span in group.spans:
                wrong = self.table[2][first + span.first, -1]
                if wrong and span.keys is not None:
                    queries = np.full((1, span.keys.keys_of(layer).shape[1]), np.nan, np.float32)
                    span.keys.search(layer, queries, group.variant.usage.num_experts_per_tok)
