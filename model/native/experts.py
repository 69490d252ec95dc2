"""Routing and the selected experts of written rows, one row after another, straight from the stacked matrices.

Float32 throughout. T rows, K experts per row, E experts, F expert width, H hidden.
"""

# pyright: reportUntypedFunctionDecorator=false, reportUnknownParameterType=false, reportMissingParameterType=false

import numpy as np
from numba import njit

from model.native.rows import ONE, SUMS, exp, norm, softmax


@njit(error_model="numpy", fastmath=SUMS)
def dot(first, second):
    total = np.float32(0)
    for i in range(len(first)):
        total += first[i] * second[i]
    return total


@njit(error_model="numpy", fastmath=SUMS)
def silu(x):
    return x / (ONE + exp(-x))


@njit(nogil=True, error_model="numpy", fastmath=SUMS)
def mix_silu(rows, expert_ids, gates, down, up, out):
    """sum_k g up(silu(down(x))): rows and out (T, H), expert_ids and gates (T, K), down (E, F, H), up (E, H, F)."""
    inner = np.empty(down.shape[1], np.float32)
    for t in range(len(rows)):
        out[t] = np.float32(0)
        for k in range(expert_ids.shape[1]):
            expert = expert_ids[t, k]
            for i in range(len(inner)):
                inner[i] = silu(dot(down[expert, i], rows[t])) * gates[t, k]
            for i in range(out.shape[1]):
                out[t, i] += dot(up[expert, i], inner)


@njit(nogil=True, error_model="numpy", fastmath=SUMS)
def mix_swiglu(rows, expert_ids, gates, gate, up, down, out):
    """sum_k g down(silu(gate(x)) * up(x)), as `mix_silu`; gate and up (E, F, H), down (E, H, F)."""
    inner = np.empty(gate.shape[1], np.float32)
    for t in range(len(rows)):
        out[t] = np.float32(0)
        for k in range(expert_ids.shape[1]):
            expert = expert_ids[t, k]
            for i in range(len(inner)):
                gated = silu(dot(gate[expert, i], rows[t])) * dot(up[expert, i], rows[t])
                inner[i] = gated * gates[t, k]
            for i in range(out.shape[1]):
                out[t, i] += dot(down[expert, i], inner)


@njit(nogil=True)
def project(hidden, weight, eps, matrix, normed, out):
    """RMSNorm of rows (T, H), and `matrix` (N, H) by it: hidden, normed (T, H), weight (H), out (T, N)."""
    for t in range(len(hidden)):
        norm(hidden[t], weight, eps, normed[t])
        for i in range(len(matrix)):
            out[t, i] = dot(matrix[i], normed[t])


@njit(nogil=True, error_model="numpy")
def choose(logits, renormalize, gates, expert_ids):
    """The K largest of softmax(logits (T, E)), falling, and of equals the first: gates and expert_ids (T, K)."""
    for t in range(len(logits)):
        row = logits[t]
        softmax(row)
        total = np.float32(0)
        for k in range(gates.shape[1]):
            best = 0
            for i in range(1, len(row)):
                if row[i] > row[best]:
                    best = i
            gates[t, k], expert_ids[t, k] = row[best], best
            total += row[best]
            row[best] = np.float32(-1)
        if renormalize:
            for k in range(gates.shape[1]):
                gates[t, k] /= total
