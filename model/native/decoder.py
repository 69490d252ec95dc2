"""The base's quantised weights, and the way of written rows through them (model.native.decode)."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from llvmlite.binding import get_host_cpu_features
from numpy.typing import NDArray
from torch import Tensor

from model.config import ModelConfig
from model.kv_cache import SequenceCache
from model.native.attention import scratch_size
from model.native.decode import work
from model.native.embedding import look_up
from model.native.routed import COLUMNS
from model.native.sharing import Helpers
from model.native.tiles import GROUP

BlockTable = tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.int64]]
MATRICES = ("qkv_proj", "o_proj", "gate_up_proj", "down_proj")


def supported() -> bool:
    """Whether this processor has the instructions."""
    features = get_host_cpu_features()
    return all(features.get(name, False) for name in ("avx512f", "avx512bw", "avx512vnni"))


class Decoder:
    """Packed matrices and what is needed beside them. As many threads work as torch has at the time."""

    def __init__(
        self,
        config: ModelConfig,
        packed: dict[str, Tensor],
        norms: Tensor,
        head: Tensor,
        final_norm: Tensor,
        rope: tuple[Tensor, Tensor],
    ):
        """packed by the names in MATRICES, stacked (L, N / 16, M / 32, bytes); head (V / 16, H / 32, bytes).

        norms (L, 2, H); rope: cos and sin, (P, D / 2) each.
        """
        self._config = config
        self.matrices = (*(packed[name].numpy() for name in MATRICES), norms.numpy())
        self._head = (head.numpy(), final_norm.numpy())
        self._rope = (rope[0].numpy(), rope[1].numpy(), np.float32(config.rms_norm_eps))
        self._heads = (config.num_attention_heads, config.num_key_value_heads)
        self._no_blocks = (
            np.full(config.num_hidden_layers, -1),
            np.empty((0, 0, COLUMNS), np.int64),
            np.empty((0, 0, 1), np.int64),
        )
        self._helpers = Helpers(work)

    def embed(self, token_ids: Tensor) -> Tensor:
        """The residual stream's start: token ids (T) int64 -> (T, H) float32."""
        rows = torch.empty(len(token_ids), self._config.hidden_size)
        look_up(self._head[0], token_ids.contiguous().numpy(), rows.numpy())
        return rows

    def layers(
        self,
        first: int,
        last: int,
        hidden: Tensor,
        positions: Sequence[int],
        caches: Sequence[SequenceCache],
        blocks: BlockTable | None = None,
    ) -> None:
        """Rows (R, H) float32 through layers `first` to `last` - 1, in place; caches take in keys and values.

        `blocks`: the expert blocks that some rows pass, as `work` takes them.
        """
        places = [(cache.keys.data_ptr(), cache.values.data_ptr(), cache.capacity) for cache in caches]
        self._run(first, last, hidden, np.array(positions), np.array(places), torch.empty(0, 0), blocks)

    def logits(self, hidden: Tensor) -> Tensor:
        """Rows (R, H) float32 behind the last layer -> logits (R, V) float32."""
        logits = torch.empty(len(hidden), self._config.vocab_size)
        nowhere = np.zeros((len(hidden), 3), np.int64)
        self._run(0, 0, hidden, nowhere[:, 0].copy(), nowhere, logits)
        return logits

    def _run(
        self,
        first: int,
        last: int,
        hidden: Tensor,
        positions: Any,
        caches: Any,
        logits: Tensor,
        blocks: BlockTable | None = None,
    ) -> None:
        """One call of `work`."""
        job = (
            hidden.numpy(),
            (positions, caches),
            self.matrices,
            blocks or self._no_blocks,
            (*self._head, logits.numpy()),
            self.room(len(hidden), int(positions.max()) + 1),
            self._rope,
            *self._heads,
        )
        self._helpers.lead(first, last, job)

    def room(self, rows: int, positions: int) -> tuple[Any, ...]:
        """Arrays that are written between the products: quantised rows, outputs, values before they are quantised."""
        config = self._config
        size, inner = config.hidden_size, config.intermediate_size
        widest = max(size, inner, config.query_size)
        return (
            np.empty((rows, widest // GROUP, 2, GROUP), np.int8),
            np.empty((rows, widest // GROUP, 2), np.float32),
            np.empty((rows, max(2 * inner, config.query_size + 2 * config.key_value_size)), np.float32),
            np.empty((rows, size), np.float32),
            np.empty((rows, widest), np.float32),
            np.empty(
                (rows * config.num_key_value_heads, scratch_size(positions, config.head_dim)), np.float32
            ),
        )
