"""A frozen matrix in 16 bits and, where compiled code (model.native) has no instructions, in torch's own 4 bits.

A product over many rows is bound by arithmetic, one over a few rows by reading the weights. Rows that are being
written always take the 4-bit form and prompt rows never do, so a row's bits do not depend on its neighbours; torch's
4-bit product gives a row the same bits for any number of rows (tests/model/test_projection.py).
R rows, N outputs, M inputs.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from model.native.packed import unpack

GROUP = 32  # inputs that share a scale and a zero, GGUF's Q4_1


@dataclass(frozen=True, slots=True)
class Int4Weight:
    """w = scale (q - 8) + zero, in the layout that torch's product wants on this processor."""

    packed: Tensor
    scales_and_zeros: Tensor  # (M / GROUP, N, 2) bfloat16

    @classmethod
    def of(cls, packed: Tensor) -> "Int4Weight":
        """From 4 bits as model.native.packed stores them. torch's layout is the processor's own."""
        quants, scales = unpack(packed)
        scale, minimum = scales.float().unbind(-1)
        pairs = torch.stack((scale, minimum + 8 * scale), -1).transpose(0, 1).bfloat16().contiguous()
        return cls(torch.ops.aten._convert_weight_to_int4pack_for_cpu(quants.int(), 1), pairs)

    def product(self, rows: Tensor) -> Tensor:
        """rows (R, M) bfloat16 -> (R, N) bfloat16."""
        return torch.ops.aten._weight_int4pack_mm_for_cpu(rows, self.packed, GROUP, self.scales_and_zeros)


@dataclass(frozen=True, slots=True)
class Projection:
    """One matrix of a layer."""

    weight: Tensor  # (N, M)
    int4: Int4Weight | None = None
    bias: Tensor | None = None  # (N,), of a matrix without a 4-bit form

    def __call__(self, rows: Tensor, *, written: bool = False) -> Tensor:
        """rows (R, M) -> (R, N); rows that are being written take the 4-bit form where there is one."""
        if written and self.int4 is not None:
            return self.int4.product(rows)
        return F.linear(rows, self.weight, self.bias)
