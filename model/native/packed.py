"""A frozen matrix as the products of model.native read it: tiles of 16 outputs, groups of 32 inputs.

w = scale q + minimum with quants q of 4 or 8 bits, unsigned; scale and minimum are float16, so GGUF's Q4_1 and Q8_0
come in unchanged. N outputs, M inputs; the layout is the same on every processor.
"""

import math
import mmap
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from model.native.simd import LANES
from model.native.tiles import GROUP, group_bytes


def packable(outputs: int, inputs: int) -> bool:
    return outputs % LANES == 0 and inputs % GROUP == 0


def bits_of(packed: Tensor) -> int:
    return 4 if packed.shape[2] == group_bytes(4) else 8


def pack(quants: Tensor, scales: Tensor, bits: int) -> Tensor:
    """quants (N, M) uint8, scales and minima (N, M / 32, 2) float16 -> (N / 16, M / 32, bytes) uint8."""
    outputs, inputs = quants.shape
    assert packable(outputs, inputs), (outputs, inputs)
    tiles, groups = outputs // LANES, inputs // GROUP
    # Four inputs of an output are beside each other, then the next output; of 4 bits, the next four inputs share
    # the bytes.
    fours = quants.numpy().reshape(tiles, LANES, groups, GROUP // 4, 4).transpose(0, 2, 3, 1, 4)
    stored = fours if bits == 8 else fours[:, :, 0::2] | fours[:, :, 1::2] << 4
    pairs = scales.numpy().reshape(tiles, LANES, groups, 2).transpose(0, 2, 3, 1)
    packed = np.concatenate(
        (
            stored.reshape(tiles, groups, -1),
            np.ascontiguousarray(pairs).view(np.uint8).reshape(tiles, groups, -1),
        ),
        axis=2,
    )
    assert packed.shape[2] == group_bytes(bits), (packed.shape, bits)
    return torch.from_numpy(packed)


def unpack(packed: Tensor) -> tuple[Tensor, Tensor]:
    """What `pack` was given: quants (N, M) uint8, scales and minima (N, M / 32, 2) float16."""
    (tiles, groups, _), bits = packed.shape, bits_of(packed)
    stored, pairs = np.split(packed.numpy(), [LANES * GROUP * bits // 8], axis=2)
    fours = stored.reshape(tiles, groups, -1, LANES, 4)
    if bits == 4:
        fours = np.stack((fours & 15, fours >> 4), axis=3).reshape(tiles, groups, GROUP // 4, LANES, 4)
    quants = fours.transpose(0, 3, 1, 2, 4).reshape(tiles * LANES, groups * GROUP)
    halves = np.ascontiguousarray(pairs).view(np.float16).reshape(tiles, groups, 2, LANES)
    scales = halves.transpose(0, 3, 1, 2).reshape(tiles * LANES, groups, 2)
    return torch.from_numpy(np.ascontiguousarray(quants)), torch.from_numpy(np.ascontiguousarray(scales))


def stacked(parts: Sequence[Tensor]) -> Tensor:
    """Packed matrices of one shape behind each other, in memory of large pages.

    A written token reads all of them: with pages of 4 KiB a fifth of the time would go into looking pages up.
    """
    shape = (len(parts), *parts[0].shape)
    memory = mmap.mmap(-1, math.prod(shape), flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    memory.madvise(mmap.MADV_HUGEPAGE)
    return torch.stack(list(parts), out=torch.frombuffer(memory, dtype=torch.uint8).view(shape))
