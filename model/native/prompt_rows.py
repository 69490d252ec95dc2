"""Which way each row of a prompt takes: its first positions the exact one of written rows, the others that of bfloat16.

All that a sequence writes stands upon its first positions, and short prompts have no others. Exact ones cost a sixth more
(docs/performance.md). A row's way hangs on its position alone, so its bits do not depend on how a prompt was cut.
"""

from collections.abc import Callable, Sequence
from functools import partial

from torch import Tensor

from model.kv_cache import SequenceCache
from model.native.decoder import Decoder
from model.native.reader import Reader

EXACT_POSITIONS = 64

Halves = Callable[
    [int, int], None
]  # runs half layers `first` to `last` - 1, of layer n number 2 n and the next


def prompt_rows(
    decoder: Decoder, reader: Reader, spans: Sequence[tuple[int, int, SequenceCache]], hidden: Tensor
) -> list[Halves]:
    """What runs rows (R, H) in place, in order: of sequences' rows laid end to end, (start, length, cache) each."""
    parts: list[Halves] = []
    row = 0
    for start, length, cache in spans:
        exact = min(max(EXACT_POSITIONS - start, 0), length)
        if exact:
            positions, rows = range(start, start + exact), hidden[row : row + exact]
            parts.append(partial(_exact, decoder, rows, positions, [cache] * exact))
        if exact < length:
            plan = reader.plan([(start + exact, length - exact, cache)])
            parts.append(partial(_rounded, reader, hidden[row + exact : row + length], plan))
        row += length
    return parts


def _exact(
    decoder: Decoder, rows: Tensor, positions: range, caches: Sequence[SequenceCache], first: int, last: int
) -> None:
    """Whole layers, when their first half comes."""
    decoder.layers((first + 1) // 2, (last + 1) // 2, rows, positions, caches)


def _rounded(
    reader: Reader, rows: Tensor, plan: tuple[tuple[object, ...], ...], first: int, last: int
) -> None:
    reader.halves(first, last, rows, *plan)
