"""Routing keys of every version that rows of a batch see, at fixed addresses; a new version is copied in.

S slots, E experts, D key size.
"""

from collections.abc import Mapping, Sequence
from weakref import WeakKeyDictionary

import numpy as np
import torch
from torch import Tensor

from model.graphs.device import upload
from model.keys import KeyView


class KeyTable:
    """One variant's keys in all layers. A slot holds one version; the one that was unused longest makes room."""

    def __init__(self, sizes: Mapping[int, tuple[int, int]], slots: int, device: torch.device):
        """sizes: layer -> (E, D)."""
        self.keys = {layer: torch.zeros(slots, *size, device=device) for layer, size in sizes.items()}
        # Added to scores: 0, or -inf for an expert that the version does not show.
        self.shown = {layer: torch.zeros(slots, size[0], device=device) for layer, size in sizes.items()}
        self._slots: WeakKeyDictionary[KeyView, int] = WeakKeyDictionary()
        self._used_at = [0] * slots
        self._batch = 0

    def slots_of(self, views: Sequence[KeyView]) -> list[int]:
        """A slot for the view of each row, up to S different ones, with its keys in it."""
        self._batch += 1
        different = {id(view): view for view in views}
        for view in different.values():
            if view in self._slots:
                self._used_at[self._slots[view]] = self._batch
        for view in different.values():
            if view not in self._slots:
                self._fill(view)
        slots = {number: self._slots[view] for number, view in different.items()}
        return [slots[id(view)] for view in views]

    def _fill(self, view: KeyView) -> None:
        slot = min(range(len(self._used_at)), key=self._used_at.__getitem__)
        assert self._used_at[slot] < self._batch, "more versions in a batch than slots"
        for former in [known for known, held in self._slots.items() if held == slot]:
            del self._slots[former]
        for layer, keys in self.keys.items():
            rows, visible = view.keys_of(layer), view.visible_ids(layer)
            shown = np.full(keys.shape[1], -np.inf, dtype=np.float32)
            shown[: len(rows) if visible is None else 0] = 0
            if visible is not None:
                shown[visible] = 0
            keys[slot, : len(rows)].copy_(upload(rows, torch.float32, keys.device))
            self.shown[layer][slot].copy_(upload(shown, torch.float32, keys.device))
        self._slots[view] = slot
        self._used_at[slot] = self._batch

    def scores(self, layer: int, queries: Tensor, slots: Tensor) -> Tensor:
        """Each row's query (R, D) by the keys of its own slot (R): (R, E)."""
        keys = self.keys[layer].index_select(0, slots)  # (R, E, D)
        return (keys @ queries.unsqueeze(-1)).squeeze(-1) + self.shown[layer].index_select(0, slots)
