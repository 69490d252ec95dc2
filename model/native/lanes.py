"""What happens to one row between two products, sixteen numbers at a time: quantising, SiLU, softmax.

M numbers of a row, a multiple of 32 for quantising and of 16 otherwise; addresses.
"""

# pyright: reportUntypedFunctionDecorator=false, reportUnknownParameterType=false, reportMissingParameterType=false

from typing import Any

from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from model.native.simd import (
    F32,
    FLOATS,
    I8,
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
from model.native.tiles import GROUP

LARGEST_QUANT = 127 * 256 + 127
LARGEST_EXPONENT = 88.0
LOG2_E, LN_2_HIGH, LN_2_LOW = 1.44269504, 0.693359375, -2.12194440e-4
POLYNOMIAL = (  # Cephes expf
    1.9875691500e-4,
    1.3981999507e-3,
    8.3334519073e-3,
    4.1665795894e-2,
    1.6666665459e-1,
    5.0000001201e-1,
)


def _of_floats(b: Builder, name: str, *values: Value) -> Value:
    return call(b, f"llvm.{name}.v16f32", FLOATS, *values)


def exp(b: Builder, x: Value) -> Value:
    """e^x within 2e-7 of it; beyond 88 and -88 as if it were those."""
    x = _of_floats(b, "minnum", x, filled(FLOATS, LARGEST_EXPONENT))
    x = _of_floats(b, "maxnum", x, filled(FLOATS, -LARGEST_EXPONENT))
    n = _of_floats(b, "rint", b.fmul(x, filled(FLOATS, LOG2_E)))
    r = fma(b, n, filled(FLOATS, -LN_2_HIGH), x)
    r = fma(b, n, filled(FLOATS, -LN_2_LOW), r)
    p = filled(FLOATS, POLYNOMIAL[0])
    for coefficient in POLYNOMIAL[1:]:
        p = fma(b, p, r, filled(FLOATS, coefficient))
    p = b.fadd(fma(b, p, b.fmul(r, r), r), filled(FLOATS, 1.0))
    exponent = b.shl(b.add(b.fptosi(n, INTS), filled(INTS, 127)), filled(INTS, 23))
    return b.fmul(p, b.bitcast(exponent, FLOATS))


def _at(b: Builder, base: Value, index: Value, size: int = 4 * LANES) -> Value:
    return b.add(base, b.mul(index, number(size)))


@intrinsic
def quantise_groups(typingctx: Any, values: Any, groups: Any, quants: Any, sums: Any) -> Any:
    """32 numbers at a time: high and low bytes, and behind each other scale and sum (model.native.rows.quantise)."""

    def generate(context: Any, b: Builder, signature: Any, arguments: Any) -> Any:
        values, groups, quants, sums = arguments
        with cgutils.for_range(b, groups) as loop:
            at = _at(b, values, loop.index, 4 * GROUP)
            halves = [load(b, b.add(at, number(4 * first)), FLOATS) for first in (0, LANES)]
            # Magnitudes are ordered as their bits are; those of infinity and NaN are above all others.
            bits = [b.and_(b.bitcast(half, INTS), filled(INTS, 0x7FFFFFFF)) for half in halves]
            top = call(b, "llvm.umax.v16i32", INTS, *bits)
            top = b.bitcast(call(b, "llvm.vector.reduce.umax.v16i32", I32, top), F32)
            inverse = b.fdiv(F32(float(LARGEST_QUANT)), top)
            inverse = b.select(b.fcmp_ordered("==", top, F32(0.0)), F32(0.0), inverse)
            found = [
                b.fptosi(_of_floats(b, "rint", b.fmul(half, splat(b, inverse, FLOATS))), INTS)
                for half in halves
            ]
            own = _at(b, quants, loop.index, 2 * GROUP)
            bytes_of = ir.VectorType(I8, LANES)
            for first, quant in zip((0, LANES), found, strict=True):
                high = b.ashr(b.add(quant, filled(INTS, 128)), filled(INTS, 8))
                store(b, b.trunc(high, bytes_of), b.add(own, number(first)), 1)
                store(b, b.trunc(quant, bytes_of), b.add(own, number(GROUP + first)), 1)
            total = call(b, "llvm.vector.reduce.add.v16i32", I32, b.add(*found))
            scale = b.fdiv(top, F32(float(LARGEST_QUANT)))
            own = _at(b, sums, loop.index, 8)
            store(b, scale, own)
            store(b, b.fmul(scale, b.sitofp(total, F32)), b.add(own, number(4)))
        return context.get_dummy_value()

    return types.void(*[types.int64] * 4), generate


@intrinsic
def silu_times(typingctx: Any, gate: Any, up: Any, count: Any, out: Any) -> Any:
    """silu(gate) * up."""

    def generate(context: Any, b: Builder, signature: Any, arguments: Any) -> Any:
        gate, up, count, out = arguments
        with cgutils.for_range(b, b.udiv(count, number(LANES))) as loop:
            x, factor = (load(b, _at(b, base, loop.index), FLOATS) for base in (gate, up))
            below = b.fadd(exp(b, b.fneg(x)), filled(FLOATS, 1.0))
            store(b, b.fmul(b.fdiv(x, below), factor), _at(b, out, loop.index))
        return context.get_dummy_value()

    return types.void(*[types.int64] * 4), generate


@intrinsic
def softmax_lanes(typingctx: Any, scores: Any, count: Any) -> Any:
    """In place; what fills the last sixteen up is -infinity."""

    def generate(context: Any, b: Builder, signature: Any, arguments: Any) -> Any:
        scores, count = arguments
        steps = b.udiv(count, number(LANES))
        top = cgutils.alloca_once_value(b, filled(FLOATS, float("-inf")))
        total = cgutils.alloca_once_value(b, filled(FLOATS, 0.0))
        with cgutils.for_range(b, steps) as loop:
            own = load(b, _at(b, scores, loop.index), FLOATS)
            b.store(_of_floats(b, "maxnum", own, b.load(top)), top)
        most = splat(b, call(b, "llvm.vector.reduce.fmax.v16f32", F32, b.load(top)), FLOATS)
        with cgutils.for_range(b, steps) as loop:
            at = _at(b, scores, loop.index)
            raised = exp(b, b.fsub(load(b, at, FLOATS), most))
            b.store(b.fadd(b.load(total), raised), total)
            store(b, raised, at)
        flags = ("reassoc", "nsz")
        whole = call(b, "llvm.vector.reduce.fadd.v16f32", F32, F32(0.0), b.load(total), fastmath=flags)
        inverse = splat(b, b.fdiv(F32(1.0), whole), FLOATS)
        with cgutils.for_range(b, steps) as loop:
            at = _at(b, scores, loop.index)
            store(b, b.fmul(load(b, at, FLOATS), inverse), at)
        return context.get_dummy_value()

    return types.void(*[types.int64] * 2), generate


@intrinsic
def largest_lanes(typingctx: Any, values: Any, count: Any) -> Any:
    """The largest of the first numbers, a multiple of 16. Says nothing about NaN."""

    def generate(context: Any, b: Builder, signature: Any, arguments: Any) -> Any:
        values, count = arguments
        top = cgutils.alloca_once_value(b, filled(FLOATS, float("-inf")))
        with cgutils.for_range(b, b.udiv(count, number(LANES))) as loop:
            own = load(b, _at(b, values, loop.index), FLOATS)
            b.store(_of_floats(b, "maxnum", own, b.load(top)), top)
        return call(b, "llvm.vector.reduce.fmax.v16f32", F32, b.load(top))

    return types.float32(*[types.int64] * 2), generate
