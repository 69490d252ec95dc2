"""Attention of a prompt's rows over its sequence's cache: bfloat16 products, float32 softmax.

Each row attends to the positions up to its own, in an order that hangs on nothing else. Keys and values are laid out
as panels first (model.native.halves). G key/value heads, D head_dim, P positions in stretches of 32.
"""

# pyright: reportUntypedFunctionDecorator=false, reportUnknownParameterType=false, reportMissingParameterType=false
# pyright: reportCallIssue=false

import numpy as np
from numba import njit
from numba.np.numpy_support import carray

from model.native.attention import bfloat16_of
from model.native.halves import ROWS, WIDTH, run_tile
from model.native.rows import ONE, SUMS, exp
from model.native.simd import pointer


@njit(inline="always")
def cached_pairs(address, layer, kv_heads, head, capacity, head_dim):
    """One head's positions (capacity, D / 2) of a cache (layers, G, capacity, D), two numbers in 32 bits."""
    offset = (layer * kv_heads + head) * capacity * head_dim * 2
    return carray(pointer(address + offset), (capacity, head_dim // 2), np.uint32)


@njit
def lay_out(layer, span, stretch, kv_heads, keys, values):
    """One stretch of a sequence's cache as panels, zero behind the last position.

    keys (G, P / 32, D / 2, 32) and values (G, D / 32, P / 2, 32), two numbers in 32 bits.
    """
    half_dim = keys.shape[2]
    low, high = np.uint32(0xFFFF), np.uint32(0xFFFF0000)
    end, first, at = span[6], stretch * WIDTH, span[5] + stretch
    for head in range(kv_heads):
        key = cached_pairs(span[0], layer, kv_heads, head, span[2], 2 * half_dim)
        value = cached_pairs(span[1], layer, kv_heads, head, span[2], 2 * half_dim)
        for i in range(WIDTH):
            for pair in range(half_dim):
                keys[head, at, pair, i] = key[first + i, pair] if first + i < end else np.uint32(0)
        for i in range(WIDTH // 2):
            position = first + 2 * i
            for pair in range(half_dim):
                even = value[position, pair] if position < end else np.uint32(0)
                odd = value[position + 1, pair] if position + 1 < end else np.uint32(0)
                panel, column = 2 * pair // WIDTH, 2 * pair % WIDTH
                row = at * (WIDTH // 2) + i
                values[head, panel, row, column] = (even & low) | (odd << np.uint32(16))
                values[head, panel, row, column + 1] = (even >> np.uint32(16)) | (odd & high)


@njit(error_model="numpy", fastmath=SUMS)
def share(scores, count, scale, shares):
    """exp(scale (score - largest)) of the first `count` in bfloat16, and their sum."""
    top = scores[0]
    for i in range(1, count):
        top = max(top, scores[i])
    total = np.float32(0)
    for i in range(count):
        weight = exp((scores[i] - top) * scale)
        shares[i] = bfloat16_of(weight)
        total += weight
    return total


@njit
def attend_block(queries, position, keys, values, first, scratch, out):
    """Rows of one query head (n, D), of which the first stands at `position`; out (n, D), both bfloat16.

    keys (P / 32, D / 2, 32) from the sequence's first stretch on, values (D / 32, P / 2, 32) of all sequences, of which
    this one's begin at stretch `first`.
    """
    scores, shares, sums = scratch
    rows, head_dim = queries.shape
    scale = ONE / np.sqrt(np.float32(head_dim))
    totals = np.empty(len(sums), np.float32)
    row = 0
    while row < rows:
        taken = ROWS if rows - row >= ROWS else 4 if rows - row >= 4 else 1
        stretches = (position + row + taken - 1) // WIDTH + 1
        given, stride = queries.ctypes.data + row * queries.strides[0], queries.strides[0]
        for stretch in range(stretches):
            panel = keys.ctypes.data + stretch * keys.strides[0]
            to = scores.ctypes.data + stretch * WIDTH * 4
            run_tile(taken, panel, head_dim // 2, given, stride, to, scores.strides[0])
        for i in range(taken):
            count = position + row + i + 1
            totals[i] = ONE / share(scores[i], count, scale, shares[i])
            shares[i, count : stretches * WIDTH] = np.uint16(0)
        for panel in range(len(values)):
            address = values[panel].ctypes.data + first * (WIDTH // 2) * values.strides[1]
            run_tile(
                taken,
                address,
                stretches * WIDTH // 2,
                shares.ctypes.data,
                shares.strides[0],
                sums.ctypes.data,
                sums.strides[0],
            )
            for i in range(taken):
                for j in range(WIDTH):
                    out[row + i, panel * WIDTH + j] = bfloat16_of(sums[i, j] * totals[i])
        row += taken
