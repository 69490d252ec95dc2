"""A packed matrix by rows that are quantised to 16 bits: R rows, N outputs, M inputs.

A row's bits do not depend on the others: every tile function does the same to each of its rows.
"""

# pyright: reportUntypedFunctionDecorator=false, reportUnknownParameterType=false, reportMissingParameterType=false

from numba import njit

from model.native.simd import LANES
from model.native.tiles import (
    tile_4bit_1,
    tile_4bit_2,
    tile_4bit_4,
    tile_4bit_8,
    tile_8bit_1,
    tile_8bit_2,
    tile_8bit_4,
    tile_8bit_8,
)


@njit
def product_4bit(packed, first, last, quants, sums, out):
    """4-bit packed (N / 16, M / 32, bytes) by rows quantised, (R, M / 32, 2, 32) and (R, M / 32, 2), -> out (R, N); some tiles."""
    rows, groups = len(quants), packed.shape[1]
    dq, ds, do = quants.strides[0], sums.strides[0], out.strides[0]
    q, s, o = quants.ctypes.data, sums.ctypes.data, out.ctypes.data + first * LANES * 4
    for tile in range(first, last):
        weights, row = packed.ctypes.data + tile * packed.strides[0], 0
        while rows - row >= 8:
            tile_4bit_8(weights, groups, q + row * dq, dq, s + row * ds, ds, o + row * do, do)
            row += 8
        if rows - row >= 4:
            tile_4bit_4(weights, groups, q + row * dq, dq, s + row * ds, ds, o + row * do, do)
            row += 4
        if rows - row >= 2:
            tile_4bit_2(weights, groups, q + row * dq, dq, s + row * ds, ds, o + row * do, do)
            row += 2
        if rows > row:
            tile_4bit_1(weights, groups, q + row * dq, dq, s + row * ds, ds, o + row * do, do)
        o += LANES * 4


@njit
def product_8bit(packed, first, last, quants, sums, out):
    """8-bit packed (N / 16, M / 32, bytes) by rows quantised, (R, M / 32, 2, 32) and (R, M / 32, 2), -> out (R, N); some tiles."""
    rows, groups = len(quants), packed.shape[1]
    dq, ds, do = quants.strides[0], sums.strides[0], out.strides[0]
    q, s, o = quants.ctypes.data, sums.ctypes.data, out.ctypes.data + first * LANES * 4
    for tile in range(first, last):
        weights, row = packed.ctypes.data + tile * packed.strides[0], 0
        while rows - row >= 8:
            tile_8bit_8(weights, groups, q + row * dq, dq, s + row * ds, ds, o + row * do, do)
            row += 8
        if rows - row >= 4:
            tile_8bit_4(weights, groups, q + row * dq, dq, s + row * ds, ds, o + row * do, do)
            row += 4
        if rows - row >= 2:
            tile_8bit_2(weights, groups, q + row * dq, dq, s + row * ds, ds, o + row * do, do)
            row += 2
        if rows > row:
            tile_8bit_1(weights, groups, q + row * dq, dq, s + row * ds, ds, o + row * do, do)
        o += LANES * 4
