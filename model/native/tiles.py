"""The inner loop of every product: 16 outputs of a packed matrix by a few rows, in x86's 8-bit dot products (AVX-512 VNNI).

A row's inputs have 16 bits, a high and a low byte: with 8 the error would be three times that of bfloat16 products.
"""

from collections.abc import Callable, Iterator
from typing import Any

from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from model.native.simd import (
    BYTES,
    F32,
    FLOATS,
    HALVES,
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

GROUP = 32  # inputs that share a scale and a minimum


def group_bytes(bits: int) -> int:
    """Bytes of a tile's group: quants of 16 outputs by 32 inputs, then 16 scales and 16 minima in float16."""
    return LANES * GROUP * bits // 8 + 2 * 2 * LANES


def _quants(b: Builder, group: Value, bits: int) -> Iterator[Value]:
    """Eight registers, of 16 outputs by 4 inputs each."""
    for part in range(bits):
        stored = load(b, b.add(group, number(64 * part)), BYTES, 64)
        if bits == 8:
            yield stored
        else:
            yield b.and_(stored, filled(BYTES, 15))
            yield b.lshr(stored, filled(BYTES, 4))


def _products(b: Builder, weights: list[Value], inputs: Value) -> Value:
    """Sums over a group for 16 outputs: the weights' registers by 32 signed bytes."""
    total = filled(INTS, 0)
    for part, weight in enumerate(weights):
        fours = splat(b, load(b, b.add(inputs, number(4 * part)), I32), INTS)
        total = call(b, "llvm.x86.avx512.vpdpbusd.512", INTS, total, weight, b.bitcast(fours, BYTES))
    return total


def _tile(rows: int, bits: int) -> Callable[..., Any]:
    """The function for a number of rows. It does the same to each: a row's bits do not depend on the number."""

    @intrinsic
    def tile(  # addresses and strides in bytes
        typingctx: Any,
        packed: Any,
        groups: Any,
        quants: Any,
        quants_stride: Any,
        sums: Any,
        sums_stride: Any,
        out: Any,
        out_stride: Any,
    ) -> Any:
        def generate(context: Any, b: Builder, signature: Any, arguments: Any) -> Any:
            packed, groups, quants, quants_stride, sums, sums_stride, out, out_stride = arguments

            def of_row(base: Value, stride: Value, row: int) -> Value:
                return b.add(base, b.mul(stride, number(row)))

            totals = [cgutils.alloca_once_value(b, filled(FLOATS, 0.0)) for _ in range(rows)]
            with cgutils.for_range(b, groups) as loop:
                at = b.add(packed, b.mul(loop.index, number(group_bytes(bits))))
                weights = list(_quants(b, at, bits))
                scales = b.add(at, number(64 * bits))
                scale = b.fpext(load(b, scales, HALVES, 32), FLOATS)
                minimum = b.fpext(load(b, b.add(scales, number(2 * LANES)), HALVES, 32), FLOATS)
                for row, total in enumerate(totals):
                    own = b.add(of_row(quants, quants_stride, row), b.mul(loop.index, number(2 * GROUP)))
                    high, low = (_products(b, weights, b.add(own, number(at))) for at in (0, GROUP))
                    products = b.add(b.shl(high, filled(INTS, 8)), low)
                    own = b.add(of_row(sums, sums_stride, row), b.mul(loop.index, number(8)))
                    row_scale = b.fmul(scale, splat(b, load(b, own, F32), FLOATS))
                    row_sum = splat(b, load(b, b.add(own, number(4)), F32), FLOATS)
                    scaled = fma(b, b.sitofp(products, FLOATS), row_scale, b.load(total))
                    b.store(fma(b, minimum, row_sum, scaled), total)
            for row, total in enumerate(totals):
                store(b, b.load(total), of_row(out, out_stride, row))
            return context.get_dummy_value()

        return types.void(*[types.int64] * 8), generate

    return tile


TILES_4BIT, TILES_8BIT = ([_tile(rows, bits) for rows in (1, 2, 4, 8)] for bits in (4, 8))
