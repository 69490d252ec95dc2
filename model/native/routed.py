"""An expert block of one written row: norm, router or query, the best experts, and their mixture.

Weights are the bits of bfloat16, sums are float32. What belongs to a row is named by address, as each has its own block
and its own version of the keys. H hidden, N outputs of the router or query, E experts that the row may find, K experts
that it takes, F expert width.
"""

# pyright: reportUntypedFunctionDecorator=false, reportUnknownParameterType=false, reportMissingParameterType=false

import numpy as np
from numba import njit
from numba.np.numpy_support import carray

from model.native.experts import dot, silu
from model.native.rows import ONE, SUMS, exp, norm
from model.native.simd import float_of_bits, pointer

# What a row's numbers say. First its block: addresses of the norm's weight (H), of the matrix (N, H) and of the experts
# (E, F, PARTS, H), the last matrix among them transposed; EPS are a float's bits, PER_TOKEN is K, OVER_ALL whether gates
# are shares of all E.
NORM, EPS, MATRIX, OUTPUTS, EXPERTS, WIDTH, PARTS, PER_TOKEN, OVER_ALL = range(9)
# Then addresses of the keys (0: the outputs are the scores) and of the ids that may be found (0: the first); FOUND is E.
KEYS, IDS, FOUND = range(9, 12)
COLUMNS = 12
BITS = np.uint32(16)


@njit(error_model="numpy", fastmath=SUMS)
def dot_of_bits(bits, values):
    total = np.float32(0)
    for i in range(len(values)):
        total += float_of_bits(np.uint32(bits[i]) << BITS) * values[i]
    return total


@njit(error_model="numpy", fastmath=SUMS)
def add_expert(matrices, normed, gate, total):
    """Add gate last(activations): matrices (F, PARTS, H), two parts for SiLU and three for SwiGLU; total (H)."""
    parts = matrices.shape[1]
    for i in range(len(matrices)):
        inner = silu(dot_of_bits(matrices[i, 0], normed)) * gate
        if parts == 3:
            inner *= dot_of_bits(matrices[i, 1], normed)
        last = matrices[i, parts - 1]
        for h in range(len(total)):
            total[h] += inner * float_of_bits(np.uint32(last[h]) << BITS)


@njit(error_model="numpy", fastmath=SUMS)
def score(about, hidden, normed, scores):
    """The row's norm (H) and its scores (E)."""
    eps = float_of_bits(np.uint32(about[EPS]))
    norm(hidden, carray(pointer(about[NORM]), (len(hidden),), np.float32), eps, normed)
    matrix = carray(pointer(about[MATRIX]), (about[OUTPUTS], len(hidden)), np.uint16)
    outputs = np.empty(about[OUTPUTS], np.float32)
    for i in range(len(outputs)):
        outputs[i] = dot_of_bits(matrix[i], normed)
    if about[KEYS] == 0:
        scores[:] = outputs
        return
    for i in range(len(scores)):
        own = about[KEYS] + 4 * len(outputs) * identity(about, i)
        scores[i] = dot(carray(pointer(own), (len(outputs),), np.float32), outputs)


@njit(inline="always")
def identity(about, place):
    """The expert at a place among those that may be found."""
    if about[IDS] == 0:
        return place
    return carray(pointer(about[IDS]), (about[FOUND],), np.int64)[place]


@njit(error_model="numpy", fastmath=SUMS)
def select(scores, over_all, gates, places):
    """The K best, falling, of equals the first, and their softmax; whether all of these are finite.

    scores (E) is used up.
    """
    infinity = np.float32(np.inf)
    for k in range(len(places)):
        best, top = -1, -infinity
        for i in range(len(scores)):
            if scores[i] > top:
                best, top = i, scores[i]
        if best < 0 or top == infinity:
            return False
        gates[k], places[k] = top, best
        scores[best] = -infinity
    top, total = gates[0], np.float32(0)
    for k in range(len(gates)):
        gates[k] = exp(gates[k] - top)
        total += gates[k]
    if over_all:
        for i in range(len(scores)):
            if scores[i] > -infinity:
                total += exp(scores[i] - top)
    for k in range(len(gates)):
        gates[k] *= ONE / total
    return True


@njit
def add_block(about, hidden, chosen):
    """Add what the block gives to its row (H), in place; chosen takes in K expert ids, and last whether they are wrong.

    Where a score that counts is not finite they are, and so is the row.
    """
    size, count = len(hidden), about[PER_TOKEN]
    normed, scores = np.empty(size, np.float32), np.empty(about[FOUND], np.float32)
    score(about, hidden, normed, scores)
    gates, places = np.empty(count, np.float32), np.zeros(count, np.int64)
    finite = select(scores, about[OVER_ALL] != 0, gates, places)
    chosen[-1] = not finite
    for k in range(count):
        chosen[k] = identity(about, places[k])
    if not finite:
        hidden[:] = np.float32(np.nan)
        return
    total = np.zeros(size, np.float32)
    width, parts = about[WIDTH], about[PARTS]
    for k in range(count):
        own = about[EXPERTS] + 2 * chosen[k] * width * parts * size
        add_expert(carray(pointer(own), (width, parts, size), np.uint16), normed, gates[k], total)
    for h in range(size):
        hidden[h] += total[h]
