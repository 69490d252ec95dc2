"""Attention of one written row over its sequence's cache, in float32; keys and values are bfloat16.

Q query heads, G key/value heads, D head_dim, a multiple of 64; P positions.
"""

# pyright: reportUntypedFunctionDecorator=false, reportUnknownParameterType=false, reportMissingParameterType=false
# pyright: reportCallIssue=false

from typing import Any

import numpy as np
from numba import njit, types
from numba.core import cgutils
from numba.extending import intrinsic
from numba.np.numpy_support import carray

from model.native.rows import ONE, softmax
from model.native.simd import (
    F32,
    FLOATS,
    INTS,
    LANES,
    SHORTS,
    Builder,
    Value,
    bits_of_float,
    call,
    filled,
    fma,
    load,
    number,
    pointer,
    splat,
    store,
)

STEP = 64  # dimensions that are worked on at once, in four registers


@njit(inline="always")
def bfloat16_of(x):
    """The 16 bits nearest to a float32, ties to even."""
    bits = bits_of_float(x)
    return np.uint16((bits + np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1))) >> np.uint32(16))


@njit(inline="always")
def cached(address, layer, kv_heads, head, capacity, head_dim):
    """One head's positions (capacity, D) of a cache (layers, G, capacity, D) of bfloat16, as bits."""
    offset = (layer * kv_heads + head) * capacity * head_dim * 2
    return carray(pointer(address + offset), (capacity, head_dim), np.uint16)


def _widened(b: Builder, address: Value) -> Value:
    """16 numbers of bfloat16 as float32."""
    wide = b.zext(load(b, address, SHORTS, 2), INTS)
    return b.bitcast(b.shl(wide, filled(INTS, 16)), FLOATS)


@intrinsic
def _scores(typingctx: Any, query: Any, keys: Any, count: Any, head_dim: Any, scale: Any, out: Any) -> Any:
    """scale q . k of every key; addresses."""

    def generate(context: Any, b: Builder, signature: Any, arguments: Any) -> Any:
        query, keys, count, head_dim, scale, out = arguments
        totals = [cgutils.alloca_once(b, FLOATS) for _ in range(STEP // LANES)]
        with cgutils.for_range(b, count) as position:
            key = b.add(keys, b.mul(position.index, b.mul(head_dim, number(2))))
            for total in totals:
                b.store(filled(FLOATS, 0.0), total)
            with cgutils.for_range(b, b.udiv(head_dim, number(STEP))) as step:
                for part, total in enumerate(totals):
                    at = b.add(b.mul(step.index, number(STEP)), number(LANES * part))
                    mine = load(b, b.add(query, b.mul(at, number(4))), FLOATS)
                    theirs = _widened(b, b.add(key, b.mul(at, number(2))))
                    b.store(fma(b, mine, theirs, b.load(total)), total)
            first, second, third, fourth = (b.load(total) for total in totals)
            lanes = b.fadd(b.fadd(first, second), b.fadd(third, fourth))
            summed = call(
                b, "llvm.vector.reduce.fadd.v16f32", F32, F32(0.0), lanes, fastmath=("reassoc", "nsz")
            )
            store(b, b.fmul(summed, scale), b.add(out, b.mul(position.index, number(4))))
        return context.get_dummy_value()

    signature = types.void(*[types.int64] * 4, types.float32, types.int64)
    return signature, generate


@intrinsic
def _mixture(typingctx: Any, weights: Any, values: Any, count: Any, head_dim: Any, out: Any) -> Any:
    """sum of weight times value over the positions; addresses."""

    def generate(context: Any, b: Builder, signature: Any, arguments: Any) -> Any:
        weights, values, count, head_dim, out = arguments
        totals = [cgutils.alloca_once(b, FLOATS) for _ in range(STEP // LANES)]
        with cgutils.for_range(b, b.udiv(head_dim, number(STEP))) as step:
            for total in totals:
                b.store(filled(FLOATS, 0.0), total)
            first = b.mul(step.index, number(STEP))
            with cgutils.for_range(b, count) as position:
                weight = splat(b, load(b, b.add(weights, b.mul(position.index, number(4))), F32), FLOATS)
                at = b.add(b.mul(position.index, head_dim), first)
                for part, total in enumerate(totals):
                    value = _widened(b, b.add(values, b.mul(b.add(at, number(LANES * part)), number(2))))
                    b.store(fma(b, weight, value, b.load(total)), total)
            for part, total in enumerate(totals):
                store(b, b.load(total), b.add(out, b.mul(b.add(first, number(LANES * part)), number(4))))
        return context.get_dummy_value()

    return types.void(*[types.int64] * 5), generate


@njit
def attend(query, key, value, count, scores, out):
    """The query heads of one key/value head over the first `count` positions.

    query (Q / G, D), key and value (capacity, D), out (Q / G, D); scores (count or more) is scratch.
    """
    head_dim = query.shape[1]
    scale = ONE / np.sqrt(np.float32(head_dim))
    for head in range(len(query)):
        _scores(query[head].ctypes.data, key.ctypes.data, count, head_dim, scale, scores.ctypes.data)
        softmax(scores[:count])
        _mixture(scores.ctypes.data, value.ctypes.data, count, head_dim, out[head].ctypes.data)
