"""Decaying sums along a sequence, all positions at once or one after the other, with a state of constant size.

S_t = d S_{t-1} + x_t. What a sequence has behind it is one vector per sum, so decoding costs the same at any length.
T tokens, C channels.
"""

import itertools
from collections.abc import Sequence
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor


def decayed_sums(values: Tensor, decay: Tensor, initial: Tensor) -> Tensor:
    """Every S_t of `values` (..., T, C), behind `initial` (..., C); decay (C) or (1) in (0, 1].

    Doubling: after step n each position holds the sum of its last 2^n values, so T tokens take log2 T passes. A
    position's bits depend on what stands before it in `values` only, not on what follows.
    """
    length = values.shape[-2]
    first = values[..., :1, :] + decay * initial.unsqueeze(-2)
    sums, factor, shift = torch.cat((first, values[..., 1:, :]), dim=-2), decay, 1
    while shift < length:
        sums = sums + F.pad(sums[..., :-shift, :], (0, 0, shift, 0)) * factor
        factor, shift = factor * factor, 2 * shift
    return sums


class Memory(Protocol):
    """Runs a block's recurrences over rows that belong to one or more sequences."""

    def run(self, slot: int, values: Tensor, decay: Tensor) -> Tensor:
        """S_t of every row, in the shape of `values` (..., C); `slot` numbers the block's recurrences."""
        ...


class WholeWindows:
    """Windows that start with nothing behind them: values (B, T, C). For training."""

    def run(self, slot: int, values: Tensor, decay: Tensor) -> Tensor:
        return decayed_sums(values, decay, values.new_zeros(values.shape[0], values.shape[2]))


class SequenceRows:
    """Rows of several sequences (T, C), each going on from its own state (slots, C), which is replaced.

    lengths: rows of each sequence, in order.
    """

    def __init__(self, states: Sequence[Tensor], lengths: Sequence[int]):
        self._states = torch.stack(list(states))  # (sequences, slots, C)
        self._lengths = list(lengths)
        self._single = sum(1 for _ in itertools.takewhile(lambda length: length == 1, lengths))

    @property
    def states(self) -> tuple[Tensor, ...]:
        """What each sequence goes on from after the rows that were run."""
        return self._states.unbind()

    def run(self, slot: int, values: Tensor, decay: Tensor) -> Tensor:
        states = self._states[:, slot, : values.shape[1]]
        single = self._single
        parts = [values[:single] + decay * states[:single]]  # sequences that are being written, all at once
        states[:single] = parts[0]
        for index, rows in enumerate(values[single:].split(self._lengths[single:]), single):
            parts.append(decayed_sums(rows, decay, states[index]))
            states[index] = parts[-1][-1]
        return torch.cat(parts)
