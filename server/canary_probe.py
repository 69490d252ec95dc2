"""The canary text through the model: what the guard compares versions by.

The layers below the keys that move run once, at the first probe, and their output is kept; the upper ones run
for every probe. Runs beside the engine, on one thread, and leaves no mark on its counters or caches.
"""

# W windows, T tokens of each, H hidden

from collections.abc import Collection, Mapping

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from keystore.canary import CanaryRun, Guard
from model.blocks.base import BlockSpan, ExpertBlock, ExpertUsage
from model.checkpoints.load import BaseModel
from model.keys import KeyView
from model.threads import one_thread
from model.training.upper import run_layers
from model.transformer import Transformer
from server.canary_text import canary_windows
from server.settings import GuardSettings

ROWS_A_HEAD = 64  # logits alive at once, which a cache can hold


def make_guard(
    settings: GuardSettings,
    base: BaseModel,
    blocks: Mapping[int, ExpertBlock],
    plastic_layers: Collection[int],
) -> Guard | None:
    """Reads the canary text; what takes long waits for the first probe. Raises OSError, ValueError."""
    if not (settings.enabled and plastic_layers):
        return None
    model = base.transformer
    windows = canary_windows(base.tokenizer, settings.canary_file, model.config.max_position_embeddings)
    return Guard(CanaryProbe(model, blocks, plastic_layers, windows), settings.config())


class CanaryProbe:
    """One model, one variant's blocks and some windows (W, T + 1) of tokens. One caller at a time."""

    def __init__(
        self,
        model: Transformer,
        blocks: Mapping[int, ExpertBlock],
        plastic_layers: Collection[int],
        windows: Tensor,
    ):
        self._model, self._blocks, self._plastic = model, blocks, frozenset(plastic_layers)
        self._windows = windows
        self._first = min(plastic_layers)
        self._lower: list[Tensor] = []  # (T, H) bfloat16 a window, behind layer `first` without its block

    @torch.inference_mode()
    def run(self, view: KeyView) -> CanaryRun:
        """Mean next-token loss over all windows, and who was selected in the plastic layers."""
        with one_thread():
            if not self._lower:
                self._lower = [self._lower_states(window[:-1], view) for window in self._windows]
            losses: list[Tensor] = []
            selected: dict[int, list[NDArray[np.int64]]] = {layer: [] for layer in sorted(self._plastic)}
            for window, states in zip(self._windows, self._lower, strict=True):
                hidden, routed = self._upper(states.float(), view)
                losses.append(self._losses(hidden, window[1:].to(hidden.device)))
                for layer, expert_ids in routed.items():
                    selected[layer].append(expert_ids)
        return CanaryRun(
            float(torch.cat(losses).double().mean()),
            {layer: np.concatenate(expert_ids) for layer, expert_ids in selected.items()},
        )

    def _lower_states(self, tokens: Tensor, view: KeyView) -> Tensor:
        """What no version changes: keys below the plastic layers are the anchors in every view."""
        hidden, at = self._model.embed(tokens.to(self._model.device)), -1
        for layer in sorted(layer for layer in self._blocks if layer < self._first):
            hidden, _ = self._block(self._layers(hidden, at + 1, layer + 1), layer, view)
            at = layer
        return self._layers(hidden, at + 1, self._first + 1).bfloat16()

    def _upper(self, hidden: Tensor, view: KeyView) -> tuple[Tensor, dict[int, NDArray[np.int64]]]:
        routed: dict[int, NDArray[np.int64]] = {}
        at = self._first
        for layer in sorted(layer for layer in self._blocks if layer >= self._first):
            hidden, expert_ids = self._block(self._layers(hidden, at + 1, layer + 1), layer, view)
            if layer in self._plastic:
                routed[layer] = expert_ids
            at = layer
        return self._layers(hidden, at + 1, len(self._model.layers)), routed

    def _layers(self, hidden: Tensor, first: int, end: int) -> Tensor:
        return run_layers(self._model, hidden.unsqueeze(0), first, end).squeeze(0)

    def _block(self, hidden: Tensor, layer: int, view: KeyView) -> tuple[Tensor, NDArray[np.int64]]:
        """Through a block as requests go, with `view` in force; usage is counted where nobody looks."""
        routed: list[NDArray[np.int64]] = []
        span = BlockSpan(
            first=0, end=len(hidden), start=0, keys=view, trace=None, decode=False, state={}, routed=routed
        )
        config = self._blocks[layer].config
        uncounted = ExpertUsage([layer], len(view.keys_of(layer)), config.num_experts_per_tok)
        contribution = self._blocks[layer].serve(hidden, layer, [span], uncounted)
        return hidden + contribution, routed[0]

    def _losses(self, hidden: Tensor, targets: Tensor) -> Tensor:
        """hidden (T, H), targets (T) -> next-token loss (T)."""
        model = self._model
        normed = F.rms_norm(hidden, model.final_norm.shape, model.final_norm, model.config.rms_norm_eps)
        return torch.cat(
            [
                F.cross_entropy(F.linear(rows.to(model.dtype), model.head).float(), wanted, reduction="none")
                for rows, wanted in zip(normed.split(ROWS_A_HEAD), targets.split(ROWS_A_HEAD), strict=True)
            ]
        )
