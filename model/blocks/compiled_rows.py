"""Rows that pass their expert blocks within the compiled call of the layers, and what that leaves behind.

R rows, L layers of which B have blocks, K experts per token, D key size.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from weakref import WeakKeyDictionary

import numpy as np
from numpy.typing import NDArray

from model.blocks.base import BlockSpan, ExpertBlock, ExpertUsage
from model.blocks.compiled_block import CompiledBlock
from model.blocks.compiled_weights import CompiledWeights
from model.keys import KeyView
from model.native.routed import COLUMNS


@dataclass(frozen=True, slots=True, eq=False)
class About:
    """What compiled code needs to know of a variant's blocks, for rows that see the same keys."""

    layers: tuple[int, ...]
    numbers: NDArray[np.int64]  # (B, COLUMNS)
    weights: tuple[CompiledWeights, ...]
    per_token: int


@dataclass(frozen=True, slots=True, eq=False)
class Variant:
    """Expert blocks by layer, and the count of what they routed. `seen`: what is known for each version of the keys."""

    blocks: Mapping[int, ExpertBlock]
    usage: ExpertUsage
    seen: WeakKeyDictionary[KeyView | ExpertUsage, About] = field(
        init=False, default_factory=WeakKeyDictionary["KeyView | ExpertUsage", About]
    )

    @property
    def rows_at_once(self) -> int | None:
        """Of a prompt, the most rows that all its blocks take in one call; None: any number."""
        return min((n for block in self.blocks.values() if (n := block.rows_at_once)), default=None)


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
    whose = variant.usage if keys is None else keys
    known = variant.seen.get(whose)
    if known is None or not all(weights.in_force for weights in known.weights):
        layers = tuple(sorted(variant.blocks))
        parts: list[CompiledWeights] = []
        numbers: list[tuple[int, ...]] = []
        for layer in layers:
            block = variant.blocks[layer]
            compiled = block.compiled(layer, keys) if isinstance(block, CompiledBlock) else None
            if compiled is None:
                return None
            weights, found = compiled
            parts.append(weights)
            numbers.append((*weights.about, *found))
        known = variant.seen[whose] = About(
            layers, np.array(numbers, np.int64), tuple(parts), variant.usage.num_experts_per_tok
        )
    return known


class CompiledRows:
    """One step's rows through their blocks. `table`: what `model.native.decode.work` takes as blocks.

    Most steps are of the same rows as the one `before`, and share what does not change.
    """

    def __init__(
        self,
        groups: Sequence[BlockRows],
        num_layers: int,
        num_rows: int,
        before: "CompiledRows | None" = None,
    ):
        plan = [(group.about, group.first, group.end) for group in groups if group.about is not None]
        if before is not None and (before._plan, before._num_rows) == (plan, num_rows):
            places, every = before.table[:2]
            self._layers, width = before._layers, before.table[2].shape[2]
        else:
            self._layers = tuple(sorted({layer for about, _, _ in plan for layer in about.layers}))
            width = 1 + max((about.per_token for about, _, _ in plan), default=0)
            places = np.full(num_layers, -1)
            places[list(self._layers)] = np.arange(len(self._layers))
            every = np.zeros((len(self._layers), num_rows, COLUMNS), np.int64)
            for about, first, end in plan:
                every[places[list(about.layers)], first:end] = about.numbers[:, None]
        self._plan, self._num_rows = plan, num_rows
        self.table = places, every, np.zeros((len(self._layers), num_rows, width), np.int64)

    def record(self, groups: Sequence[BlockRows]) -> None:
        """Count what the rows of the groups selected, and leave the ids with the spans that ask for them.

        Where a score was not finite, raises what a search among the row's keys does.
        """
        places, _, chosen = self.table
        if chosen[..., -1].any():
            self._refuse(groups)
        for group in groups:
            about = group.about
            if about is None:
                continue
            layers = slice(None) if about.layers == self._layers else places[list(about.layers)]
            expert_ids = chosen[layers, group.first : group.end, : about.per_token]  # (B, T, K)
            group.variant.usage.add(about.layers, expert_ids, decode=True)
            for span in group.spans:
                if span.routed is not None:
                    span.routed.extend(expert_ids[:, span.first : span.end])

    def _refuse(self, groups: Sequence[BlockRows]) -> None:
        for group in groups:
            for layer in group.about.layers if group.about else ():
                wrong = self.table[2][self.table[0][layer], group.first : group.end, -1]
                for span in group.spans:
                    if wrong[span.first] and span.keys is not None:
                        queries = np.full((1, span.keys.keys_of(layer).shape[1]), np.nan, np.float32)
                        span.keys.search(layer, queries, group.variant.usage.num_experts_per_tok)
