"""Held-out windows through the blocks as they are served, under any version of the keys.

What lies below the first block is computed once. W windows, T tokens of each, H hidden, K experts per token, D key
size.
"""

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from tqdm import tqdm

from model.blocks.base import BlockSpan, ExpertUsage, RoutingTrace
from model.checkpoints.blocks import BlockFolder
from model.head import loss_and_gradient
from model.keys import Float32Array, KeyView
from model.training.upper import lower_states, run_layers
from model.transformer import Transformer


@dataclass(frozen=True, slots=True, eq=False)
class Reading:
    """What one version of the keys made of the windows."""

    loss: float  # nats per token
    queries: dict[int, Float32Array]  # (W * T, D) by layer
    expert_ids: dict[int, NDArray[np.int64]]  # (W * T, K) by layer, selected


class Serving:
    """Windows whose lower layers have run."""

    def __init__(self, model: Transformer, folder: BlockFolder, windows: NDArray[np.int32]):
        self._model, self._folder = model, folder
        self._first = min(folder.config.layers)
        tokens = torch.from_numpy(windows).long()  # (W, T + 1)
        self._targets = tokens[:, 1:]
        self._states = [
            lower_states(model, each[None], self._first)
            for each in tqdm(tokens[:, :-1], desc="lower layers", unit="window")
        ]

    @torch.inference_mode()
    def read(self, keys: KeyView) -> Reading:
        """Serve every window with these keys."""
        traces: list[RoutingTrace] = []
        losses: list[Tensor] = []
        for states, targets in zip(self._states, self._targets, strict=True):
            trace = RoutingTrace(frozenset(self._folder.config.layers))
            losses.append(self._losses(states, targets, keys, trace))
            traces.append(trace)
        return Reading(
            loss=float(torch.cat(losses).mean()),
            queries={
                layer: np.concatenate([each.by_layer[layer].queries.numpy() for each in traces])
                for layer in self._folder.config.layers
            },
            expert_ids={
                layer: np.concatenate([each.by_layer[layer].expert_ids.numpy() for each in traces])
                for layer in self._folder.config.layers
            },
        )

    def _losses(self, states: Tensor, targets: Tensor, keys: KeyView, trace: RoutingTrace) -> Tensor:
        model, usage, at = self._model, ExpertUsage.of(self._folder.config), self._first
        hidden = states.clone()  # (1, T, H)
        for layer, block in self._folder.blocks.items():
            hidden = run_layers(model, hidden, at + 1, layer + 1)
            span = BlockSpan(0, len(targets), 0, keys, trace, decode=False, state={})
            hidden = hidden + block.serve(hidden[0], layer, [span], usage)
            at = layer
        hidden = run_layers(model, hidden, at + 1, len(model.layers))
        eps = model.config.rms_norm_eps
        return loss_and_gradient(hidden[0], model.final_norm, eps, model.embedding, targets)[0]
