"""Rows of the embedding out of its 8 bits: what the file holds, unrounded."""

# pyright: reportUntypedFunctionDecorator=false, reportUnknownParameterType=false, reportMissingParameterType=false

import numpy as np
from numba import njit

from model.native.simd import LANES, float_of_half
from model.native.tiles import GROUP


@njit(nogil=True)
def look_up(packed, token_ids, out):
    """packed (V / 16, H / 32, bytes) of 8 bits, token_ids (T) -> out (T, H)."""
    halves = LANES * GROUP
    for t in range(len(token_ids)):
        tile, lane = token_ids[t] // LANES, token_ids[t] % LANES
        for group in range(packed.shape[1]):
            stored = packed[tile, group]
            at = halves + 2 * lane
            scale = float_of_half(np.uint16(stored[at]) | np.uint16(stored[at + 1]) << np.uint16(8))
            at += 2 * LANES
            minimum = float_of_half(np.uint16(stored[at]) | np.uint16(stored[at + 1]) << np.uint16(8))
            for i in range(GROUP):
                quant = stored[(i // 4 * LANES + lane) * 4 + i % 4]
                out[t, group * GROUP + i] = scale * np.float32(quant) + minimum
