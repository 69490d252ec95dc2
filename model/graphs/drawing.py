"""The next tokens of many rows at once, on the device that has their logits: model.sampling without its filters.

n rows, V vocabulary.
"""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from model.graphs.device import upload
from model.native.likeliest import likeliest


def pays(logits: Tensor) -> bool:
    """Whether rows had better be drawn together: on a GPU each of them would wait for the device."""
    return logits.device.type == "cuda"


def draw(logits: Tensor, temperatures: Sequence[float], uniforms: Sequence[float]) -> list[int]:
    """A token for each row of logits (n, V) float32, -1 where they are not finite. Waits for the device once.

    Temperature 0 takes the likeliest token; else the row's number from 0 to 1 is inverted on the cumulative distribution
    in the vocabulary's order, as model.sampling.sample does.
    """
    if logits.device.type == "cpu" and not any(temperatures):
        chosen = np.empty(len(logits), np.int64)
        likeliest(logits.numpy(), chosen)
        return chosen.tolist()
    tokens = logits.argmax(1)
    if any(temperatures):
        temperature, uniform = upload((temperatures, uniforms), torch.float64, logits.device).unsqueeze(-1)
        scaled = logits / temperature.float().masked_fill(temperature == 0, 1.0)
        probabilities = (scaled - scaled.logsumexp(1, keepdim=True)).exp()
        cumulative = probabilities.double().cumsum(1)
        drawn = torch.searchsorted(cumulative, uniform * cumulative[:, -1:], right=True)
        drawn = drawn.squeeze(1).clamp_max(logits.shape[1] - 1)
        tokens = torch.where(temperature.squeeze(1) > 0, drawn, tokens)
    finite = logits.sum(1).isfinite()  # a sum is finite only if every term is
    return tokens.masked_fill(~finite, -1).tolist()
