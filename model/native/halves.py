"""The inner loops of prompts: bfloat16 dot products (AVX-512 BF16), and the panels that they read.

A panel is 32 columns of a matrix with its rows in pairs: pair after pair, for each column the two numbers beside each
other. It stands in for the 4-bit weights while a prompt passes, and for keys and values in attention.
"""

# pyright: reportUntypedFunctionDecorator=false, reportUnknownParameterType=false, reportMissingParameterType=false

from collections.abc import Callable
from typing import Any

from llvmlite import ir
from numba import njit, types
from numba.core import cgutils
from numba.extending import intrinsic

from model.native.simd import (
    BYTES,
    FLOATS,
    HALVES,
    I16,
    I32,
    INTS,
    LANES,
    Builder,
    Value,
    call,
    filled,
    fma,
    load,
    number,
    splat,
    store,
)
from model.native.tiles import GROUP, group_bytes

WIDTH = 2 * LANES  # columns of a panel
PAIR_BYTES = 4 * WIDTH
ROWS = 12  # of the largest tile: with 32 columns, as many sums as there are registers


class _BFloat16(ir.Type):
    """llvmlite has no name for it."""

    def __str__(self) -> str:
        return "bfloat"


BFLOAT = _BFloat16()
PAIRS = ir.VectorType(BFLOAT, 2 * LANES)
SINGLES = ir.VectorType(BFLOAT, LANES)
WORDS = ir.VectorType(I16, LANES)


def _bits(b: Builder, values: Value) -> Value:
    """16 numbers of float32 as the bits of bfloat16, in the low halves of 16 words."""
    return b.zext(b.bitcast(b.fptrunc(values, SINGLES), WORDS), INTS)


def _pairs(b: Builder, even: Value, odd: Value) -> Value:
    """Two registers of float32 as pairs of bfloat16."""
    return b.or_(_bits(b, even), b.shl(_bits(b, odd), filled(INTS, 16)))


def _unpack(bits: int) -> Callable[..., Any]:
    """The function for tiles of as many bits."""

    @intrinsic
    def unpack(typingctx: Any, packed: Any, groups: Any, out: Any) -> Any:
        """A tile of 16 outputs (model.native.packed) as half the columns of a panel; addresses."""

        def generate(context: Any, b: Builder, signature: Any, arguments: Any) -> Any:
            packed, groups, out = arguments
            mask = filled(INTS, (1 << bits) - 1)
            with cgutils.for_range(b, groups) as loop:
                at = b.add(packed, b.mul(loop.index, number(group_bytes(bits))))
                to = b.add(out, b.mul(loop.index, number(GROUP // 2 * PAIR_BYTES)))
                scales = b.add(at, number(64 * bits))
                scale = b.fpext(load(b, scales, HALVES, 32), FLOATS)
                minimum = b.fpext(load(b, b.add(scales, number(2 * LANES)), HALVES, 32), FLOATS)
                for register in range(bits):
                    stored = b.bitcast(load(b, b.add(at, number(64 * register)), BYTES, 64), INTS)
                    # A byte is one of four inputs; of 4 bits, its upper half belongs to the four after those.
                    shifts = [8 * byte + start for start in range(0, 8, bits) for byte in range(4)]
                    quants = [b.and_(b.lshr(stored, filled(INTS, shift)), mask) for shift in shifts]
                    values = [fma(b, b.sitofp(quant, FLOATS), scale, minimum) for quant in quants]
                    for i in range(len(values) // 2):
                        pair = number((register * len(values) // 2 + i) * PAIR_BYTES)
                        store(b, _pairs(b, values[2 * i], values[2 * i + 1]), b.add(to, pair))
            return context.get_dummy_value()

        return types.void(*[types.int64] * 3), generate

    return unpack


unpack_4bit, unpack_8bit = (_unpack(bits) for bits in (4, 8))


def _tile(rows: int) -> Callable[..., Any]:
    """The function for a number of rows. It does the same to each: a row's bits do not depend on the number."""

    @intrinsic
    def tile(  # addresses, and strides in bytes
        typingctx: Any, panel: Any, pairs: Any, inputs: Any, inputs_stride: Any, out: Any, out_stride: Any
    ) -> Any:
        def generate(context: Any, b: Builder, signature: Any, arguments: Any) -> Any:
            panel, pairs, inputs, inputs_stride, out, out_stride = arguments
            starts = [b.add(inputs, b.mul(inputs_stride, number(row))) for row in range(rows)]
            totals = [
                [cgutils.alloca_once_value(b, filled(FLOATS, 0.0)) for _ in range(2)] for _ in range(rows)
            ]
            with cgutils.for_range(b, pairs) as loop:
                at = b.add(panel, b.mul(loop.index, number(PAIR_BYTES)))
                columns = [
                    b.bitcast(load(b, b.add(at, number(64 * half)), INTS, 64), PAIRS) for half in range(2)
                ]
                offset = b.mul(loop.index, number(4))
                for start, sums in zip(starts, totals, strict=True):
                    pair = b.bitcast(splat(b, load(b, b.add(start, offset), I32), INTS), PAIRS)
                    for total, column in zip(sums, columns, strict=True):
                        b.store(
                            call(
                                b,
                                "llvm.x86.avx512bf16.dpbf16ps.512",
                                FLOATS,
                                b.load(total),
                                column,
                                pair,
                            ),
                            total,
                        )
            for row, sums in enumerate(totals):
                to = b.add(out, b.mul(out_stride, number(row)))
                for half, total in enumerate(sums):
                    store(b, b.load(total), b.add(to, number(64 * half)))
            return context.get_dummy_value()

        return types.void(*[types.int64] * 6), generate

    return tile


tile_1, tile_4, tile_12 = (_tile(rows) for rows in (1, 4, ROWS))


@njit
def run_tile(rows, panel, pairs, inputs, inputs_stride, out, out_stride):
    """Up to ROWS rows of bfloat16 (R, 2 pairs) by a panel: out (R, 32) float32. Returns how many: 1, 4 or ROWS.

    Addresses, and strides in bytes.
    """
    if rows >= ROWS:
        tile_12(panel, pairs, inputs, inputs_stride, out, out_stride)
        return ROWS
    if rows >= 4:
        tile_4(panel, pairs, inputs, inputs_stride, out, out_stride)
        return 4
    tile_1(panel, pairs, inputs, inputs_stride, out, out_stride)
    return 1
