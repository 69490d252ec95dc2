"""One layer of Masters over rows that are being written, compiled: what does not change from token to token is bound once.

T rows, N Masters, H hidden.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from model.blocks.masters import Floats, WrittenRows
from model.native.masters import combine, measure, norm_rows


@dataclass(frozen=True, slots=True)
class WrittenMasters:
    """The parts of a block, on the memory of its parameters. `kept`: which gates (T, N) count."""

    norm: tuple[Floats, np.float32]  # weight and epsilon
    attention: Callable[[Floats, Floats], None] | None
    gates: tuple[
        Floats, Floats, Floats, bool, np.float32
    ]  # A, w, b, the literal temperature, the bypass threshold
    masters: Sequence[Callable[[WrittenRows, Floats], None]]
    flow: tuple[np.float32, bool]  # decay, mean
    mixing: tuple[Floats, Floats, Floats, Floats]  # alpha_m, W, a (empty: none), gamma
    kept: Callable[[Tensor], Tensor]

    def write(
        self, hidden: Tensor, positions: Sequence[int], states: Sequence[Tensor]
    ) -> tuple[Tensor, Tensor, Tensor, Sequence[Tensor]]:
        """hidden (T, H) -> contribution (T, H), gates (T, N), which rows take part (T), each sequence's new state."""
        following = torch.stack(list(states))
        gates, contribution = hidden.new_empty(len(hidden), len(self.masters)), torch.empty_like(hidden)
        normed, active = np.empty(hidden.shape, np.float32), np.empty(len(hidden), np.bool_)
        rows = WrittenRows(normed, np.array(positions), active, following.numpy())
        norm_rows(hidden.numpy(), *self.norm, normed)
        if self.attention is not None:
            self.attention(normed, rows.states)
        measure(normed, *self.gates, gates.numpy(), active)
        outputs = np.empty((len(self.masters), *hidden.shape), np.float32)
        for write, out in zip(self.masters, outputs, strict=True):
            write(rows, out)
        gates = self.kept(gates)
        combine(outputs, gates.numpy(), active, rows.states, *self.flow, *self.mixing, contribution.numpy())
        return contribution, gates, torch.from_numpy(active), following.unbind()
