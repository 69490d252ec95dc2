"""The next-token loss's derivative at the output head, by way of the tokens that are likely.

Through the head it is sum_v p_v w_v - w_target. A few hundred of the vocabulary's tokens hold nearly all of p; the rest
enter as one, by the mean of all rows of the head. On text that changes the derivative by 1 to 2 % of its length, which is
what bfloat16 rounds away (docs/gravity.md). T rows, H hidden, V vocabulary.
"""

# pyright: reportUntypedFunctionDecorator=false, reportUnknownParameterType=false, reportMissingParameterType=false

import math
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import torch
import torch.nn.functional as F
from numba import njit
from torch import Tensor

from model.native.rows import SUMS, exp
from model.native.sharing import unbind
from model.native.simd import LANES, float_of_bits

LEAST = np.float32(-14 * math.log(2))  # log-probability below which a token is one of the rest: p = 6.1e-5
TILE = 512  # rows of the head, 576 KiB: what a core's own cache holds
LOGIT_ROWS = 128  # rows of logits alive at once: 12 MiB of bfloat16


@njit(error_model="numpy", fastmath=SUMS)
def widened(bits):
    """bfloat16 as float32."""
    return float_of_bits(np.uint32(bits) << np.uint32(16))


@njit(error_model="numpy", fastmath=SUMS)
def log_total(logits):
    """log sum_v exp(logits_v) of the bits (V); not a number when a logit was none."""
    top, total, strange = widened(logits[0]), np.float32(0), np.float32(0)
    for v in range(len(logits)):
        top = max(top, widened(logits[v]))
    for v in range(len(logits)):
        logit = widened(logits[v])
        total += exp(logit - top)
        strange += logit * np.float32(0)
    return top + np.log(total) + strange


@njit(error_model="numpy", fastmath=SUMS)
def add_likely(logits, total, least, head, out):
    """Add the likely of some tokens to out (H): logits (N) and head (N, H); returns their probability."""
    found = np.float32(0)
    for first in range(0, len(logits), LANES):
        last = min(first + LANES, len(logits))
        top = widened(logits[first])
        for v in range(first, last):
            top = max(top, widened(logits[v]))
        if top - total > least:
            for v in range(first, last):
                logarithm = widened(logits[v]) - total
                if logarithm > least:
                    share = exp(logarithm)
                    found += share
                    for i in range(len(out)):
                        out[i] += share * widened(head[v, i])
    return found


@njit(nogil=True, error_model="numpy", fastmath=SUMS)
def expect_rows(logits, head, mean, least, out):
    """sum_v softmax(logits)_v head_v: logits (T, V) and head (V, H) the bits of bfloat16, mean (H), out (T, H).

    A tile of the head is read once for all rows.
    """
    totals, rest = np.empty(len(out), np.float32), np.ones(len(out), np.float32)
    for t in range(len(out)):
        totals[t] = log_total(logits[t])
        out[t] = totals[t] * np.float32(0)
    for first in range(0, len(head), TILE):
        tile = slice(first, min(first + TILE, len(head)))
        for t in range(len(out)):
            rest[t] -= add_likely(logits[t, tile], totals[t], least, head[tile], out[t])
    for t in range(len(out)):
        for i in range(out.shape[1]):
            out[t, i] += rest[t] * mean[i]


class LikelyHead:
    """A frozen head of bfloat16 in main memory. Thread-safe."""

    def __init__(self, norm: Tensor, eps: float, head: Tensor):
        """norm (H): of the final state; head (V, H)."""
        self._norm, self._eps, self._head = norm.float(), eps, head
        sums = [part.float().sum(0) for part in head.split(TILE)]  # never all of the head in float32
        self._mean = torch.stack(sums).sum(0) / len(head)
        self._helper = ThreadPoolExecutor(1, "credit", unbind)

    def gradient(self, hidden: Tensor, targets: Tensor) -> Tensor:
        """Derivative (T, H) float32 of each token's loss by its hidden state (T, H) before the final norm.

        As `model.head.loss_and_gradient` computes it, but for rare tokens. targets (T) int64.
        """
        pieces = zip(hidden.split(LOGIT_ROWS), targets.split(LOGIT_ROWS), strict=True)
        return torch.cat([self._gradient(rows.float(), wanted) for rows, wanted in pieces])

    def _gradient(self, hidden: Tensor, targets: Tensor) -> Tensor:
        scale = torch.rsqrt(hidden.square().mean(-1, keepdim=True) + self._eps)
        normed = hidden * scale
        logits = F.linear((normed * self._norm).to(self._head.dtype), self._head)
        by_normed = (self._expected(logits) - self._head[targets].float()) * self._norm
        mean_product = (by_normed * normed).mean(-1, keepdim=True)
        return scale * (by_normed - normed * mean_product)

    def _expected(self, logits: Tensor) -> Tensor:
        """The head's rows (T, H) at the mean over what each of logits (T, V) makes likely."""
        out = torch.empty(len(logits), self._head.shape[1])
        mine = len(logits) if torch.get_num_threads() == 1 else (len(logits) + 1) // 2
        bits, head, mean, means = _bits(logits), _bits(self._head), self._mean.numpy(), out.numpy()
        others = self._helper.submit(expect_rows, bits[mine:], head, mean, LEAST, means[mine:])
        expect_rows(bits[:mine], head, mean, LEAST, means[:mine])
        others.result()
        return out


def _bits(tensor: Tensor) -> np.ndarray[tuple[int, int], np.dtype[np.uint16]]:
    return tensor.view(torch.int16).numpy().view(np.uint16)
