"""A packed matrix by rows that are quantised to 16 bits: R rows, N outputs, M inputs.

A row's bits do not depend on the others: every tile function does the same to each of its rows.
"""

# pyright: reportUntypedFunctionDecorator=false, reportUnknownParameterType=false, reportMissingParameterType=false

from typing import Any

from numba import njit

from model.native.simd import LANES
from model.native.tiles import TILES_4BIT, TILES_8BIT


def _product(tile_1: Any, tile_2: Any, tile_4: Any, tile_8: Any) -> Any:
    """By tile functions for as many rows. Not an entry of model.native.compiled: numba could not find it again."""

    @njit
    def product(packed, first, last, quants, sums, out):
        """Packed (N / 16, M / 32, bytes) by rows quantised, (R, M / 32, 2, 32) and (R, M / 32, 2), -> out (R, N); some tiles."""
        rows, groups = len(quants), packed.shape[1]
        dq, ds, do = quants.strides[0], sums.strides[0], out.strides[0]
        q, s, o = quants.ctypes.data, sums.ctypes.data, out.ctypes.data + first * LANES * 4
        for tile in range(first, last):
            weights, row = packed.ctypes.data + tile * packed.strides[0], 0
            while rows - row >= 8:
                tile_8(weights, groups, q + row * dq, dq, s + row * ds, ds, o + row * do, do)
                row += 8
            if rows - row >= 4:
                tile_4(weights, groups, q + row * dq, dq, s + row * ds, ds, o + row * do, do)
                row += 4
            if rows - row >= 2:
                tile_2(weights, groups, q + row * dq, dq, s + row * ds, ds, o + row * do, do)
                row += 2
            if rows > row:
                tile_1(weights, groups, q + row * dq, dq, s + row * ds, ds, o + row * do, do)
            o += LANES * 4

    return product


product_4bit, product_8bit = _product(*TILES_4BIT), _product(*TILES_8BIT)
