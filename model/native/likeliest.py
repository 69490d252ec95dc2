"""The likeliest token of each written row. T rows, V vocabulary."""

# pyright: reportUntypedFunctionDecorator=false, reportUnknownParameterType=false, reportMissingParameterType=false
# pyright: reportCallIssue=false

import numpy as np
from numba import njit

from model.native.lanes import largest_lanes
from model.native.rows import SUMS
from model.native.simd import LANES

BLOCK = 4096  # logits that are gone through twice while they are at hand


@njit
def largest(values):
    """Says nothing about NaN."""
    found = largest_lanes(values.ctypes.data, len(values))
    for i in range(len(values) // LANES * LANES, len(values)):
        found = max(found, values[i])
    return found


@njit(fastmath=SUMS)
def total(values):
    found = np.float32(0)
    for i in range(len(values)):
        found += values[i]
    return found


@njit(nogil=True)
def likeliest(logits, tokens):
    """logits (T, V) -> tokens (T): the first of the largest; -1 in a row that is not finite."""
    for t in range(len(logits)):
        row, top, first, everything = logits[t], -np.float32(np.inf), 0, np.float32(0)
        for start in range(0, len(row), BLOCK):
            block = row[start : start + BLOCK]
            everything += total(block)
            found = largest(block)
            if found > top:
                top, first = found, start
        tokens[t] = -1
        if np.isfinite(everything):  # a sum is finite only if every term is
            while row[first] != top:
                first += 1
            tokens[t] = first
