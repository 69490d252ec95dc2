"""Attention of one written row over its sequence's cache, in float32; keys and values are bfloat16.

Up to three query heads that share a key/value head go together, so that what is stored is widened once for all. Of two
numbers beside each other, the first half of a register's bits is the even one: 32 numbers become 16 even and 16 odd ones.
Q query heads, G key/value heads, D head_dim, a multiple of 64; P positions.
"""

# pyright: reportUntypedFunctionDecorator=false, reportUnknownParameterType=false, reportMissingParameterType=false
# pyright: reportCallIssue=false

from collections.abc import Callable
from typing import Any

import numpy as np
from llvmlite import ir
from numba import njit, types
from numba.core import cgutils
from numba.extending import intrinsic
from numba.np.numpy_support import carray

from model.native.lanes import softmax_lanes
from model.native.rows import ONE
from model.native.simd import (
    F32,
    FLOATS,
    I32,
    INTS,
    LANES,
    Builder,
    Value,
    bits_of_float,
    filled,
    fma,
    load,
    number,
    pointer,
    splat,
    store,
)

STEP = 64  # dimensions that are worked on at once, in four registers
PAIRS = 2 * LANES  # numbers that come apart as even and odd ones
TOGETHER = 4  # positions that are scored at once
HEADS = 3  # that go together at most


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


def scratch_size(positions: int, head_dim: int) -> int:
    """Float32 numbers that `attend` needs beside its arguments."""
    return HEADS * (head_dim + -(-positions // LANES) * LANES)


def _widened(b: Builder, address: Value) -> tuple[Value, Value]:
    """32 numbers of bfloat16 as float32: even and odd ones."""
    pairs = load(b, address, INTS, 2)
    even = b.shl(pairs, filled(INTS, 16))
    odd = b.and_(pairs, filled(INTS, 0xFFFF0000))
    return b.bitcast(even, FLOATS), b.bitcast(odd, FLOATS)


def _shuffled(b: Builder, first: Value, second: Value, lanes: list[int]) -> Value:
    return b.shuffle_vector(first, second, ir.Constant(ir.VectorType(I32, len(lanes)), lanes))


def _of_quarters(first: list[int]) -> list[int]:
    """Lanes that do in each quarter of a register what `first` does in the lowest."""
    return [lane + 4 * quarter for quarter in range(4) for lane in first]


def _sums(b: Builder, totals: list[Value]) -> Value:
    """The sums over all lanes of four registers, as four numbers."""
    low, high = _of_quarters([0, 16, 1, 17]), _of_quarters([2, 18, 3, 19])
    pairs = [
        b.fadd(_shuffled(b, first, second, low), _shuffled(b, first, second, high))
        for first, second in (totals[:2], totals[2:])
    ]
    low, high = _of_quarters([0, 1, 16, 17]), _of_quarters([2, 3, 18, 19])
    whole = b.fadd(_shuffled(b, *pairs, low), _shuffled(b, *pairs, high))
    half = b.fadd(*(_shuffled(b, whole, whole, list(range(first, first + 8))) for first in (0, 8)))
    return b.fadd(*(_shuffled(b, half, half, list(range(first, first + 4))) for first in (0, 4)))


def _scores(heads: int) -> Callable[..., Any]:
    """scale q . k of every key for some heads; the query's even and odd numbers lie apart in every 32."""

    @intrinsic
    def scores(
        typingctx: Any, query: Any, keys: Any, fours: Any, head_dim: Any, scale: Any, out: Any, stride: Any
    ) -> Any:  # addresses; positions in fours; bytes between the heads' scores
        def generate(context: Any, b: Builder, signature: Any, arguments: Any) -> Any:
            query, keys, fours, head_dim, scale, out, stride = arguments
            scale = splat(b, scale, ir.VectorType(ir.FloatType(), TOGETHER))
            totals = [[cgutils.alloca_once(b, FLOATS) for _ in range(TOGETHER)] for _ in range(heads)]
            with cgutils.for_range(b, fours) as loop:
                key = b.add(keys, b.mul(loop.index, b.mul(head_dim, number(2 * TOGETHER))))
                for of_head in totals:
                    for total in of_head:
                        b.store(filled(FLOATS, 0.0), total)
                with cgutils.for_range(b, b.udiv(head_dim, number(PAIRS))) as step:
                    at = b.mul(step.index, number(PAIRS))
                    stored = [
                        _widened(
                            b, b.add(key, b.mul(b.add(at, b.mul(head_dim, number(position))), number(2)))
                        )
                        for position in range(TOGETHER)
                    ]
                    for head, of_head in enumerate(totals):
                        own = b.add(query, b.mul(b.add(at, b.mul(head_dim, number(head))), number(4)))
                        even, odd = load(b, own, FLOATS), load(b, b.add(own, number(4 * LANES)), FLOATS)
                        for (their_even, their_odd), total in zip(stored, of_head, strict=True):
                            sum_of_even = fma(b, even, their_even, b.load(total))
                            b.store(fma(b, odd, their_odd, sum_of_even), total)
                for head, of_head in enumerate(totals):
                    found = b.fmul(_sums(b, [b.load(total) for total in of_head]), scale)
                    place = b.add(b.mul(stride, number(head)), b.mul(loop.index, number(4 * TOGETHER)))
                    store(b, found, b.add(out, place))
            return context.get_dummy_value()

        return types.void(*[types.int64] * 4, types.float32, types.int64, types.int64), generate

    return scores


def _mixture(heads: int) -> Callable[..., Any]:
    """sum of weight times value over the positions, for some heads."""

    @intrinsic
    def mixture(
        typingctx: Any, weights: Any, stride: Any, values: Any, count: Any, head_dim: Any, out: Any
    ) -> Any:  # addresses; bytes between the heads' weights
        def generate(context: Any, b: Builder, signature: Any, arguments: Any) -> Any:
            weights, stride, values, count, head_dim, out = arguments
            parts = STEP // PAIRS
            totals = [[cgutils.alloca_once(b, FLOATS) for _ in range(2 * parts)] for _ in range(heads)]
            with cgutils.for_range(b, b.udiv(head_dim, number(STEP))) as step:
                for of_head in totals:
                    for total in of_head:
                        b.store(filled(FLOATS, 0.0), total)
                first = b.mul(step.index, number(STEP))
                with cgutils.for_range(b, count) as position:
                    own = b.add(first, b.mul(position.index, head_dim))
                    stored = [
                        half
                        for part in range(parts)
                        for half in _widened(
                            b, b.add(values, b.mul(b.add(own, number(PAIRS * part)), number(2)))
                        )
                    ]
                    for head, of_head in enumerate(totals):
                        at = b.add(b.mul(stride, number(head)), b.mul(position.index, number(4)))
                        weight = splat(b, load(b, b.add(weights, at), F32), FLOATS)
                        for value, total in zip(stored, of_head, strict=True):
                            b.store(fma(b, weight, value, b.load(total)), total)
                for head, of_head in enumerate(totals):
                    for part in range(parts):
                        even, odd = (b.load(total) for total in of_head[2 * part : 2 * part + 2])
                        for half in range(2):
                            lanes = [8 * half + i // 2 + LANES * (i % 2) for i in range(LANES)]
                            at = b.add(first, number(PAIRS * part + LANES * half))
                            place = b.add(b.mul(head_dim, number(head)), at)
                            store(b, _shuffled(b, even, odd, lanes), b.add(out, b.mul(place, number(4))))
            return context.get_dummy_value()

        return types.void(*[types.int64] * 6), generate

    return mixture


_scores_1, _scores_2, _scores_3 = (_scores(heads) for heads in range(1, HEADS + 1))
_mixture_1, _mixture_2, _mixture_3 = (_mixture(heads) for heads in range(1, HEADS + 1))


@njit
def take_apart(heads, out):
    """Queries (n, D), of every 32 numbers first the even ones: out (n D)."""
    at = 0
    for head in range(len(heads)):
        for first in range(0, heads.shape[1], PAIRS):
            for i in range(LANES):
                out[at + i] = heads[head, first + 2 * i]
                out[at + LANES + i] = heads[head, first + 2 * i + 1]
            at += PAIRS


@njit
def attend(query, key, value, count, scratch, out):
    """The query heads of one key/value head over the first `count` positions.

    query (Q / G, D), key and value (capacity, D), the capacity a multiple of 4; out (Q / G, D); scratch as
    `scratch_size` says.
    """
    head_dim = query.shape[1]
    scale = ONE / np.sqrt(np.float32(head_dim))
    fours, filled_up = (count + TOGETHER - 1) // TOGETHER, (count + LANES - 1) // LANES * LANES
    scores = scratch[HEADS * head_dim :]
    q, k, v, s, stride = (
        scratch.ctypes.data,
        key.ctypes.data,
        value.ctypes.data,
        scores.ctypes.data,
        4 * filled_up,
    )
    head = 0
    while head < len(query):
        heads = min(HEADS, len(query) - head)
        take_apart(query[head : head + heads], scratch)
        if heads == 3:
            _scores_3(q, k, fours, head_dim, scale, s, stride)
        elif heads == 2:
            _scores_2(q, k, fours, head_dim, scale, s, stride)
        else:
            _scores_1(q, k, fours, head_dim, scale, s, stride)
        for own in range(heads):
            scores[own * filled_up + count : (own + 1) * filled_up] = -np.float32(np.inf)
            softmax_lanes(s + own * stride, filled_up)
        o = out[head].ctypes.data
        if heads == 3:
            _mixture_3(s, stride, v, count, head_dim, o)
        elif heads == 2:
            _mixture_2(s, stride, v, count, head_dim, o)
        else:
            _mixture_1(s, stride, v, count, head_dim, o)
        head += heads
