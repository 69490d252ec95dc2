"""The way of prompt rows through the base's quantised weights (model.native.reading)."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from llvmlite.binding import get_host_cpu_features
from torch import Tensor

from model.config import ModelConfig
from model.kv_cache import SequenceCache
from model.native.halves import WIDTH
from model.native.reading import read
from model.native.sharing import Helpers
from model.native.simd import LANES

BLOCK = 24  # rows of a prompt that attend together


def readable(matrices: Sequence[Any], head_dim: int) -> bool:
    """Whether this processor has the instructions, and matrices (L, N / 16, ...) and heads whole panels."""
    features = get_host_cpu_features()
    instructions = all(features.get(name, False) for name in ("avx512f", "avx512bw", "avx512bf16"))
    return instructions and head_dim % WIDTH == 0 and all(m.shape[1] * LANES % WIDTH == 0 for m in matrices)


class Reader:
    """Takes prompt rows through the packed matrices of a decoder. As many threads work as torch has at the time."""

    def __init__(self, config: ModelConfig, matrices: tuple[Any, ...], rope: tuple[Tensor, Tensor]):
        """matrices: those of `Decoder`; rope: cos and sin, (P, D / 2) each."""
        self._config = config
        self._matrices = matrices
        self._rope = (rope[0].numpy(), rope[1].numpy(), np.float32(config.rms_norm_eps))
        self._helpers = Helpers(read)

    def halves(
        self, first: int, last: int, hidden: Tensor, place: tuple[Any, ...], room: tuple[Any, ...]
    ) -> None:
        """Rows (R, H) float32 through half layers `first` to `last` - 1, in place; caches take in keys and values.

        Half a layer is its attention, of layer n number 2 n, or its FFN.
        """
        heads = (self._config.num_attention_heads, self._config.num_key_value_heads)
        job = (hidden.numpy(), place, self._matrices, room, self._rope, *heads)
        self._helpers.lead(first, last, job)

    def plan(
        self, spans: Sequence[tuple[int, int, SequenceCache]]
    ) -> tuple[tuple[Any, ...], tuple[Any, ...]]:
        """Where rows belong, and arrays to work in: for sequences' rows laid end to end, (start, length, cache) each.

        A span is: addresses of keys and values, capacity, first row, first position, first stretch, end.
        """
        config = self._config
        places: list[tuple[int, ...]] = []
        blocks: list[tuple[int, int, int]] = []
        stretches: list[tuple[int, int]] = []
        row = 0
        for index, (start, length, cache) in enumerate(spans):
            end = start + length
            addresses = (cache.keys.data_ptr(), cache.values.data_ptr(), cache.capacity)
            places.append((*addresses, row, start, len(stretches), end))
            blocks += [(index, at, min(at + BLOCK, row + length)) for at in range(row, row + length, BLOCK)]
            stretches += [(index, at) for at in range(-(-end // WIDTH))]
            row += length
        positions = np.concatenate([np.arange(start, start + length) for start, length, _ in spans])
        of_row = np.repeat(np.arange(len(spans)), [length for _, length, _ in spans])
        place = (positions, np.array(places), of_row, np.array(blocks), np.array(stretches))
        qkv = config.query_size + 2 * config.key_value_size
        halves = (config.num_key_value_heads, len(stretches), config.head_dim // 2, WIDTH)
        value_halves = (halves[0], config.head_dim // WIDTH, len(stretches) * WIDTH // 2, WIDTH)
        room = (
            _empty(row, max(config.hidden_size, config.query_size), dtype=torch.uint16),
            _empty(row, qkv, dtype=torch.float32),
            _empty(row, config.query_size, dtype=torch.uint16),
            _empty(row, config.intermediate_size, dtype=torch.uint16),
            _empty(*halves, dtype=torch.uint32),
            _empty(*value_halves, dtype=torch.uint32),
        )
        return place, room


def _empty(*shape: int, dtype: torch.dtype) -> Any:
    """An array that begins where a register may be loaded from, which numpy's own do not."""
    return torch.empty(shape, dtype=dtype).numpy()
