"""What every expert block has in common: its configuration, its rows of a batch, and what it leaves behind."""

from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from model.keys import KeyView


@dataclass(frozen=True, slots=True)
class BlockConfig:
    """One variant: the kind of its blocks, the layers that carry one, and their sizes."""

    kind: str
    layers: tuple[int, ...]
    hidden_size: int
    num_experts: int
    num_experts_per_tok: int
    expert_size: int  # width of one expert's hidden layer
    key_size: int
    rms_norm_eps: float


@dataclass(slots=True)
class LayerTrace:
    """How one plastic layer routed some consecutive tokens: T tokens, K experts each, H hidden, D key size."""

    expert_ids: Tensor  # (T, K) int64
    gates: Tensor  # (T, K) float32
    queries: Tensor  # (T, D) float32
    deviations: Tensor  # (T, K, H) float32: each selected expert's output minus the block's output


@dataclass(slots=True)
class RoutingTrace:
    """What a sequence's rows left behind in the layers that are asked to leave something."""

    layers: frozenset[int]
    by_layer: dict[int, LayerTrace] = field(default_factory=dict[int, LayerTrace])


@dataclass(slots=True)
class BlockSpan:
    """Consecutive rows of one sequence: which keys they see, and what is to be remembered of them."""

    first: int
    end: int
    keys: KeyView
    trace: RoutingTrace | None
    decode: bool


class ExpertUsage:
    """Tokens per (phase, layer, expert) since the start. Written by the engine thread, read by anybody."""

    PHASES = ("prefill", "decode")

    def __init__(self, layers: Sequence[int], num_experts: int):
        self.layers = tuple(layers)
        self._index = {layer: i for i, layer in enumerate(self.layers)}
        self.counts: NDArray[np.int64] = np.zeros((2, len(self.layers), num_experts), dtype=np.int64)

    def add(self, layer: int, expert_ids: NDArray[np.int64], *, decode: bool) -> None:
        row = self.counts[int(decode), self._index[layer]]
        row += np.bincount(expert_ids.ravel(), minlength=len(row))


class ExpertBlock(nn.Module):
    """A residual block behind a layer's FFN: `hidden + block(hidden)`. Blocks compute in float32."""

    def __init__(self, config: BlockConfig):
        super().__init__()
        self.config = config
        self.norm = nn.Parameter(torch.ones(config.hidden_size))

    @abstractmethod
    def serve(self, hidden: Tensor, layer: int, spans: Sequence[BlockSpan], usage: ExpertUsage) -> Tensor:
        """The block's contribution to `hidden` (T, H), same shape, float32; records usage and traces."""

    @abstractmethod
    def forward(self, hidden: Tensor) -> tuple[Tensor, Tensor]:
        """Training: contribution (T, H) float32 and the auxiliary loss, routing by the trainable anchors."""
