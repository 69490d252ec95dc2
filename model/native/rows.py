"""What happens to one row between two products: norm, quantising, rotation, SiLU. One row at a time.

A row's bits can therefore not depend on how many rows there are. H hidden, M inputs, D head_dim.
"""

# pyright: reportUntypedFunctionDecorator=false, reportUnknownParameterType=false, reportMissingParameterType=false
# pyright: reportCallIssue=false

import numpy as np
from numba import njit

from model.native.lanes import quantise_groups, silu_times
from model.native.simd import float_of_bits, rounded

# Sums may be reordered, so that they run in all lanes of a register; NaN and infinity stay what they are.
SUMS = {"reassoc", "contract", "nsz"}
LOG2_E, LN_2_HIGH, LN_2_LOW = np.float32(1.44269504), np.float32(0.693359375), np.float32(-2.12194440e-4)
ONE = np.float32(1.0)
LARGEST_EXPONENT = np.float32(88.0)


@njit(error_model="numpy", fastmath=SUMS)
def exp(x):
    """e^x within 2e-7 of it, for x of at most 88; below -88 as if it were that."""
    x = min(max(x, -LARGEST_EXPONENT), LARGEST_EXPONENT)
    n = rounded(x * LOG2_E)
    r = x - n * LN_2_HIGH - n * LN_2_LOW
    p = np.float32(1.9875691500e-4)  # Cephes expf
    p = p * r + np.float32(1.3981999507e-3)
    p = p * r + np.float32(8.3334519073e-3)
    p = p * r + np.float32(4.1665795894e-2)
    p = p * r + np.float32(1.6666665459e-1)
    p = p * r + np.float32(5.0000001201e-1)
    return (p * r * r + r + ONE) * float_of_bits(np.uint32(np.int32(n) + np.int32(127)) << np.uint32(23))


@njit(error_model="numpy", fastmath=SUMS)
def mean_square(values):
    total = np.float32(0)
    for i in range(len(values)):
        total += values[i] * values[i]
    return total / np.float32(len(values))


@njit
def quantise(values, quants, sums):
    """values (M) to 16 bits, value = scale (256 high + low): quants (M / 32, 2, 32) int8, the high bytes first.

    sums (M / 32, 2): each group's scale, and the sum of its quantised values. A value that is not finite leaves a
    scale that is not.
    """
    quantise_groups(values.ctypes.data, len(sums), quants.ctypes.data, sums.ctypes.data)


@njit(error_model="numpy", fastmath={"contract"})
def norm(values, weight, eps, normed):
    """RMSNorm of (H)."""
    scale = ONE / np.sqrt(mean_square(values) + eps)
    for i in range(len(values)):
        normed[i] = values[i] * scale * weight[i]


@njit
def silu_product(gate, up, out):
    """silu(gate) * up of a multiple of 16 numbers."""
    silu_times(gate.ctypes.data, up.ctypes.data, len(gate), out.ctypes.data)


@njit(error_model="numpy", fastmath={"contract"})
def rotate(heads, cos, sin):
    """Rotate the halves of every head (heads, D) in place by one position's angles (D / 2)."""
    half = len(cos)
    for head in range(heads.shape[0]):
        for i in range(half):
            first, second = heads[head, i], heads[head, half + i]
            heads[head, i] = first * cos[i] - second * sin[i]
            heads[head, half + i] = second * cos[i] + first * sin[i]


@njit(error_model="numpy", fastmath=SUMS)
def softmax(scores):
    """In place."""
    top = scores[0]
    for i in range(1, len(scores)):
        top = max(top, scores[i])
    total = np.float32(0)
    for i in range(len(scores)):
        scores[i] = exp(scores[i] - top)
        total += scores[i]
    inverse = ONE / total
    for i in range(len(scores)):
        scores[i] *= inverse
