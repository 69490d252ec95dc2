"""Keys and values of prompts' beginnings, so that a prompt that begins alike need not read its own again.

A tree of blocks of POSITION_BLOCK tokens: a block is found by its tokens behind its parent, and the first by its tokens
under what rows hang on beside them. Rows are copied in and out; nobody holds a block, so giving one up is forgetting it.
Belongs to the engine's thread. Knows no model.
"""

import itertools
from collections import OrderedDict
from collections.abc import Hashable, Mapping
from dataclasses import dataclass
from typing import Union

from torch import Tensor

from model.kv_cache import POSITION_BLOCK, CacheBudget, SequenceCache

TokenIds = tuple[int, ...]
BlockKey = tuple[
    Union["PrefixBlock", Hashable], TokenIds
]  # its parent, or the scope of a first block; its tokens


@dataclass(frozen=True, slots=True)
class PrefixUse:
    """What a prompt has to do with the beginnings of others."""

    scope: Hashable  # all that rows hang on beside the tokens up to them, and whose they are
    takes: bool = True  # rows that were read before stand in for its own; else it only leaves some
    teaches: bool = False  # it takes none that have not taught


@dataclass(slots=True, eq=False)
class PrefixBlock:
    """What the layers remember of some tokens behind their parent's."""

    keys: Tensor  # (layers, kv_heads, POSITION_BLOCK, head_dim)
    values: Tensor  # (layers, kv_heads, POSITION_BLOCK, head_dim)
    states: Mapping[int, Tensor] | None = (
        None  # of expert blocks with memory, behind it; None: nobody kept them
    )
    taught: bool = False  # all its rows


class PrefixCache:
    """At most `limit_tokens` tokens, and no more than `budget` has left; what was used longest ago is given up.

    `cut_tokens`: prompts are cut at its multiples. What expert blocks remember hangs on the cuts and is kept there only.
    """

    def __init__(self, limit_tokens: int, budget: CacheBudget, cut_tokens: int):
        self.evicted_tokens = 0
        self._limit_tokens, self._budget, self._cut_tokens = limit_tokens, budget, cut_tokens
        # In order of use, a block before its parent: the first may always go.
        self._blocks: OrderedDict[BlockKey, PrefixBlock] = OrderedDict()

    @property
    def tokens(self) -> int:
        return len(self._blocks) * POSITION_BLOCK

    def take(self, use: PrefixUse, prompt: TokenIds, cache: SequenceCache, known: int = 0) -> int:
        """Fill `cache`, which has the first `known` tokens, from what is kept; how many of the prompt's it has then.

        The last token is never among them: somebody has to compute what comes after it.
        """
        chain = self._chain(use.scope, prompt[:-1])
        blocks = list(chain.values())
        if use.teaches:
            blocks = list(itertools.takewhile(lambda block: block.taught, blocks))
        while blocks and blocks[-1].states is None:
            blocks.pop()
        if len(blocks) * POSITION_BLOCK <= known:
            return known
        for i in range(known // POSITION_BLOCK, len(blocks)):
            rows = _rows(i)
            cache.keys[:, :, rows] = blocks[i].keys
            cache.values[:, :, rows] = blocks[i].values
        assert blocks[-1].states is not None
        cache.block_states.update({layer: state.clone() for layer, state in blocks[-1].states.items()})
        self._use(chain)
        return len(blocks) * POSITION_BLOCK

    def keep(self, use: PrefixUse, prompt: TokenIds, read: int, cache: SequenceCache) -> None:
        """Remember the first `read` tokens of a prompt, whose rows `cache` has; a beginning of them if not all fit."""
        chain = self._chain(use.scope, prompt[:read])
        self._use(chain)
        parent = next(reversed(chain.values()), None)
        for i in range(len(chain), read // POSITION_BLOCK):
            if not self._makes_room(besides=len(chain)):
                break
            rows = _rows(i)
            key: BlockKey = (parent or use.scope, prompt[rows])
            parent = chain[key] = PrefixBlock(
                cache.keys[:, :, rows].clone(), cache.values[:, :, rows].clone()
            )
            self._blocks[key] = parent
        self._use(chain)
        for i, block in enumerate(chain.values()):
            end = (i + 1) * POSITION_BLOCK
            # A row teaches by the token after it: a prompt's last row has not.
            block.taught = block.taught or (use.teaches and end < len(prompt))
            if block.states is None and (
                not cache.block_states or (end == read and not read % self._cut_tokens)
            ):
                block.states = {layer: state.clone() for layer, state in cache.block_states.items()}

    def give_way(self) -> None:
        """Give up what the budget has no room for any more."""
        while self.tokens > self._most_tokens:
            self._evict()

    @property
    def _most_tokens(self) -> int:
        return min(self._limit_tokens, self._budget.free_tokens)

    def _chain(self, scope: Hashable, token_ids: TokenIds) -> dict[BlockKey, PrefixBlock]:
        """The blocks that are known of these tokens, from the first one on."""
        chain: dict[BlockKey, PrefixBlock] = {}
        parent: PrefixBlock | None = None
        for i in range(len(token_ids) // POSITION_BLOCK):
            key: BlockKey = (parent or scope, token_ids[_rows(i)])
            parent = self._blocks.get(key)
            if parent is None:
                break
            chain[key] = parent
        return chain

    def _use(self, chain: dict[BlockKey, PrefixBlock]) -> None:
        for key in reversed(chain):
            self._blocks.move_to_end(key)

    def _makes_room(self, besides: int) -> bool:
        """Whether there is room for one more block without the `besides` that were used last."""
        while self.tokens + POSITION_BLOCK > self._most_tokens:
            if len(self._blocks) <= besides:
                return False
            self._evict()
        return True

    def _evict(self) -> None:
        self._blocks.popitem(last=False)
        self.evicted_tokens += POSITION_BLOCK


def _rows(block: int) -> slice:
    return slice(block * POSITION_BLOCK, (block + 1) * POSITION_BLOCK)
