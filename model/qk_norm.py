"""RMSNorm of attention's queries and keys before they are rotated, as Qwen3 and OLMoE have it.

R rows, Q query heads, G key/value heads, D head_dim.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor


@dataclass(frozen=True, slots=True)
class QkNorm:
    """Weights of D norm every head by itself (Qwen3), of Q * D and G * D all heads of a row together (OLMoE)."""

    query: Tensor
    key: Tensor
    num_query_heads: int
    eps: float

    def __call__(self, heads: Tensor) -> Tensor:
        """Query heads followed by key heads (R, Q + G, D) -> the same shape and dtype, normed in float32."""
        query, key = heads[:, : self.num_query_heads], heads[:, self.num_query_heads :]
        return torch.cat((self._normed(query, self.query), self._normed(key, self.key)), dim=1)

    def _normed(self, heads: Tensor, weight: Tensor) -> Tensor:
        rows = heads if len(weight) == heads.shape[-1] else heads.flatten(1)
        normed = F.rms_norm(rows.float(), weight.shape, weight, self.eps)
        return normed.view_as(heads).to(heads.dtype)
