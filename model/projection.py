"""A frozen matrix in the two forms that are fast: 16-bit for many rows, 4-bit as in the file for a few.

A product over many rows is bound by arithmetic, one over a few rows by reading the weights. Rows that are being
written ("decode") always take the 4-bit form and prompt rows never do, so a row's bits do not depend on its
neighbours; torch's 4-bit product gives a row the same bits for any number of rows (tests/model/test_projection.py).
R rows, N outputs, M inputs.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

GROUP = 32  # inputs that share a scale and a zero, GGUF's Q4_1


@dataclass(frozen=True, slots=True)
class Int4Weight:
    """w = scale (q - 8) + zero, in the layout that torch's product wants on this processor."""

    packed: Tensor
    scales_and_zeros: Tensor  # (M / GROUP, N, 2) bfloat16

    @classmethod
    def of(cls, quants: Tensor, scales_and_zeros: Tensor) -> "Int4Weight":
        """From quants (N, M) uint8 holding 0 to 15. The packed layout is the processor's: never store it."""
        packed = torch.ops.aten._convert_weight_to_int4pack_for_cpu(quants.int(), 1)
        return cls(packed, scales_and_zeros)

    def product(self, rows: Tensor) -> Tensor:
        """rows (R, M) bfloat16 -> (R, N) bfloat16."""
        return torch.ops.aten._weight_int4pack_mm_for_cpu(rows, self.packed, GROUP, self.scales_and_zeros)


@dataclass(frozen=True, slots=True)
class Projection:
    """One matrix of a layer."""

    weight: Tensor  # (N, M)
    int4: Int4Weight | None = None

    def __call__(self, rows: Tensor, decode_rows: int = 0) -> Tensor:
        """rows (R, M) -> (R, N); the first `decode_rows` take the 4-bit form where there is one."""
        if self.int4 is None or decode_rows == 0:
            return F.linear(rows, self.weight)
        if decode_rows == len(rows):
            return self.int4.product(rows)
        written = self.int4.product(rows[:decode_rows])
        return torch.cat((written, F.linear(rows[decode_rows:], self.weight)))
