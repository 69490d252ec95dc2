"""Flow-matching experts of written rows (model.blocks.fm_moe): each integrates its velocity field, one row after another.

Float32 throughout. T rows, K experts per row, E experts, F expert width, H hidden, S stages of a step, N steps.
"""

# pyright: reportUntypedFunctionDecorator=false, reportUnknownParameterType=false, reportMissingParameterType=false

import numpy as np
from numba import njit

from model.native.experts import dot, silu
from model.native.rows import ONE, SUMS


@njit(error_model="numpy", fastmath=SUMS)
def normalise(values, weight, bias, eps):
    """LayerNorm of (F), in place."""
    total, square = np.float32(0), np.float32(0)
    for i in range(len(values)):
        total += values[i]
    mean = total / np.float32(len(values))
    for i in range(len(values)):
        square += (values[i] - mean) * (values[i] - mean)
    scale = ONE / np.sqrt(square / np.float32(len(values)) + eps)
    for i in range(len(values)):
        values[i] = (values[i] - mean) * scale * weight[i] + bias[i]


@njit(error_model="numpy", fastmath=SUMS)
def velocity(position, time_bias, expert, eps, networks, first, second, out):
    """v(x, t) of one expert at `position` (H) -> out (H); first and second (F) are scratch.

    networks: three matrices with what follows each, of all experts.
    """
    inputs, input_norm, input_norm_bias, inner, bias, norm, norm_bias, outputs, last_bias = networks
    for i in range(len(first)):
        first[i] = silu(dot(inputs[expert, i], position) + time_bias[i])
    normalise(first, input_norm[expert], input_norm_bias[expert], eps)
    for i in range(len(second)):
        second[i] = silu(dot(inner[expert, i], first) + bias[expert, i])
    normalise(second, norm[expert], norm_bias[expert], eps)
    for i in range(len(out)):
        out[i] = dot(outputs[expert, i], second) + last_bias[expert, i]


@njit(nogil=True, error_model="numpy", fastmath=SUMS)
def mix_flows(rows, expert_ids, gates, time_biases, weights, result, eps, networks, out):
    """sum_k g (x_k(1) - x): rows and out (T, H), expert_ids and gates (T, K), time_biases (N, S, E, F).

    weights (S, S) and result (S): the solver's tableau (model.blocks.solvers).
    """
    steps, stages, size = time_biases.shape[0], time_biases.shape[1], rows.shape[1]
    step_size = ONE / np.float32(steps)
    first, second = np.empty(time_biases.shape[3], np.float32), np.empty(time_biases.shape[3], np.float32)
    displacement, position = np.empty(size, np.float32), np.empty(size, np.float32)
    velocities = np.empty((stages, size), np.float32)
    for t in range(len(rows)):
        out[t] = np.float32(0)
        for k in range(expert_ids.shape[1]):
            expert = expert_ids[t, k]
            displacement[:] = np.float32(0)
            for step in range(steps):
                for stage in range(stages):
                    for i in range(size):
                        position[i] = rows[t, i] + displacement[i]
                    for before in range(stage):
                        if weights[stage, before] != 0:
                            for i in range(size):
                                position[i] += velocities[before, i] * (weights[stage, before] * step_size)
                    time_bias = time_biases[step, stage, expert]
                    velocity(position, time_bias, expert, eps, networks, first, second, velocities[stage])
                for stage in range(stages):
                    for i in range(size):
                        displacement[i] += velocities[stage, i] * (result[stage] * step_size)
            for i in range(size):
                out[t, i] += gates[t, k] * displacement[i]
