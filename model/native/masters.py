"""The Masters of written rows, and what ties them together (model.blocks.mom), every matrix read once for all rows.

Float32 throughout; a row's bits do not depend on its neighbours. Rows that are not `active` pass by: no FFN runs for
them. T rows, N Masters, H hidden, F width, S the vectors that a block keeps of a sequence, states (T, S, H).
"""

# pyright: reportUntypedFunctionDecorator=false, reportUnknownParameterType=false, reportMissingParameterType=false

import numpy as np
from numba import njit

from model.native.experts import dot, silu
from model.native.rows import ONE, SUMS, exp, norm, softmax

SMALLEST_WEIGHT = np.float32(1e-30)  # of a mean over no tokens


@njit(error_model="numpy", fastmath=SUMS)
def sigmoid(x):
    return ONE / (ONE + exp(-x))


@njit(error_model="numpy", fastmath=SUMS)
def linear(rows, active, matrix, out):
    """matrix (N, M) by the active of rows (T, M) -> out (T, N); others are left as they are."""
    for i in range(len(matrix)):
        for t in range(len(rows)):
            if active[t]:
                out[t, i] = dot(matrix[i], rows[t])


@njit(nogil=True)
def norm_rows(hidden, weight, eps, normed):
    """RMSNorm of rows (T, H)."""
    for t in range(len(hidden)):
        norm(hidden[t], weight, eps, normed[t])


@njit(nogil=True, error_model="numpy", fastmath=SUMS)
def measure(normed, gate_proj, temperature_proj, bias, literal, least, gates, active):
    """softmax(A x / tau), and whether tau is `least` or more: normed (T, H) -> gates (T, N), active (T).

    tau = sigmoid(w x + b) where it is `literal`, otherwise 0.01 + softplus(w x + b); 0.01 to 10 in either case.
    """
    for t in range(len(normed)):
        raw = dot(temperature_proj[0], normed[t]) + bias[0]
        if literal:
            tau = sigmoid(raw)
        elif raw > np.float32(20):
            tau = np.float32(0.01) + raw
        else:
            tau = np.float32(0.01) + np.float32(np.log1p(exp(raw)))
        tau = min(max(tau, np.float32(0.01)), np.float32(10))
        active[t] = tau >= least
        for n in range(len(gate_proj)):
            gates[t, n] = dot(gate_proj[n], normed[t]) / tau
        softmax(gates[t])


@njit(nogil=True, error_model="numpy", fastmath=SUMS)
def attend_flow(normed, states, slot, qkv_proj, decay_logits, bound, o_proj):
    """Add FlowAttention (model.flow_attention) to rows (T, H), in place."""
    size, everybody = normed.shape[1], np.ones(len(normed), np.bool_)
    qkv = np.empty((len(normed), len(qkv_proj)), np.float32)
    gated, mixed = np.empty_like(normed), np.empty_like(normed)
    linear(normed, everybody, qkv_proj, qkv)
    channels = size // len(decay_logits)
    for t in range(len(normed)):
        for i in range(size):
            decay = sigmoid(decay_logits[i // channels])
            weight = exp(min(max(qkv[t, size + i], -bound), bound))
            states[t, slot, i] = decay * states[t, slot, i] + weight * qkv[t, 2 * size + i]
            states[t, slot + 1, i] = decay * states[t, slot + 1, i] + weight
            gated[t, i] = sigmoid(qkv[t, i]) * states[t, slot, i] / states[t, slot + 1, i]
    linear(gated, everybody, o_proj, mixed)
    normed += mixed


@njit(nogil=True, error_model="numpy", fastmath=SUMS)
def add_place(normed, positions, frequencies, position_proj, embedding, out):
    """What PositionMaster reads: positions (T), frequencies of the features' halves -> out (T, H)."""
    half = len(frequencies)
    features = np.empty(2 * half, np.float32)
    for t in range(len(normed)):
        for i in range(half):
            angle = np.float32(positions[t]) * frequencies[i]
            features[i], features[half + i] = np.sin(angle), np.cos(angle)
        for i in range(normed.shape[1]):
            out[t, i] = normed[t, i] + dot(position_proj[i], features) + embedding[i]


@njit(nogil=True, error_model="numpy", fastmath=SUMS)
def add_concepts(normed, active, query_proj, keys, values, output_proj, embedding, out):
    """What ConceptMaster reads, of the active rows: out (T, H)."""
    scale = ONE / np.sqrt(np.float32(len(query_proj)))
    query = np.empty((len(normed), len(query_proj)), np.float32)
    linear(normed, active, query_proj, query)
    scores, mixture = np.empty(len(keys), np.float32), np.empty(len(values), np.float32)
    for t in range(len(normed)):
        if active[t]:
            for i in range(len(keys)):
                scores[i] = dot(keys[i], query[t]) * scale
            softmax(scores)
            for i in range(len(values)):
                mixture[i] = dot(values[i], scores)
            for i in range(normed.shape[1]):
                out[t, i] = normed[t, i] + dot(output_proj[i], mixture) + embedding[i]


@njit(nogil=True)
def add_embedding(normed, embedding, out):
    """What ReasoningMaster reads: out (T, H)."""
    for t in range(len(normed)):
        for i in range(normed.shape[1]):
            out[t, i] = normed[t, i] + embedding[i]


@njit(nogil=True, error_model="numpy", fastmath=SUMS)
def add_memory(normed, states, slot, decay_logits, scale, embedding, out):
    """What MemoryMaster reads: out (T, H). Every row is remembered."""
    for t in range(len(normed)):
        for i in range(normed.shape[1]):
            decay = sigmoid(decay_logits[i])
            states[t, slot, i] = decay * states[t, slot, i] + (ONE - decay) * normed[t, i]
            out[t, i] = normed[t, i] + scale[i] * states[t, slot, i] + embedding[i]


@njit(nogil=True, error_model="numpy", fastmath=SUMS)
def plain_ffn(rows, active, down_proj, up_proj, out):
    """`up(silu(down(x)))` of the active rows (T, H), zero for the others."""
    inner = np.empty((len(rows), len(down_proj)), np.float32)
    linear(rows, active, down_proj, inner)
    for t in range(len(rows)):
        out[t] = np.float32(0)
        if active[t]:
            for i in range(inner.shape[1]):
                inner[t, i] = silu(inner[t, i])
    linear(inner, active, up_proj, out)


@njit(nogil=True, error_model="numpy", fastmath=SUMS)
def deep_ffn(rows, active, gate_proj, up_proj, mid_proj, down_proj, out):
    """`down(silu(mid(silu(gate x) * up x)))` of the active rows (T, H), zero for the others."""
    gate = np.empty((len(rows), len(gate_proj)), np.float32)
    up = np.empty_like(gate)
    linear(rows, active, gate_proj, gate)
    linear(rows, active, up_proj, up)
    for t in range(len(rows)):
        out[t] = np.float32(0)
        if active[t]:
            for i in range(gate.shape[1]):
                up[t, i] *= silu(gate[t, i])
    linear(up, active, mid_proj, gate)
    for t in range(len(rows)):
        if active[t]:
            for i in range(gate.shape[1]):
                gate[t, i] = silu(gate[t, i])
    linear(gate, active, down_proj, out)


@njit(nogil=True, error_model="numpy", fastmath=SUMS)
def combine(masters, gates, active, states, decay, mean, context_weights, integrate_proj, blend, gamma, out):
    """From the Masters' outputs (N, T, H) and gates (T, N) to the contribution (T, H); moves the flow in `states`.

    mean: F = S / z with the flow's `decay`, otherwise S. Gated Masters and shared flow are blended by sigmoid(blend)
    if there is one (1), otherwise (0) added.
    """
    rows, size = out.shape
    context = np.zeros((rows, 2 * size), np.float32)  # and behind it the flow
    integrated, gated = np.empty((rows, size), np.float32), np.zeros(size, np.float32)
    for t in range(rows):
        if active[t]:
            for n in range(len(masters)):
                for i in range(size):
                    context[t, i] += context_weights[n] * masters[n, t, i]
        weight = ONE
        if mean:
            states[t, 1, 0] = decay * states[t, 1, 0] + np.float32(active[t])
            weight = max(states[t, 1, 0], SMALLEST_WEIGHT)
        for i in range(size):
            states[t, 0, i] = decay * states[t, 0, i] + context[t, i]
            context[t, size + i] = states[t, 0, i] / weight
    linear(context, active, integrate_proj, integrated)
    share = sigmoid(blend[0]) if len(blend) else ONE
    for t in range(rows):
        out[t] = np.float32(0)
        if active[t]:
            gated[:] = np.float32(0)
            for n in range(len(masters)):
                for i in range(size):
                    gated[i] += gates[t, n] * masters[n, t, i]
            for i in range(size):
                rest = ONE - share if len(blend) else ONE
                out[t, i] = gamma[i] * (share * integrated[t, i] + rest * gated[i])
