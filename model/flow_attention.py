"""FlowAttention: attention as a running, gated mean of values, with a state of constant size (Gomaa, section 2.1).

The paper names the mechanism and its linear cost; we resolve it with the forward flow's own recurrence, per channel:
S_t = d S_{t-1} + w_t v_t, z_t = d z_{t-1} + w_t, F_t = S_t / z_t, out = W_o (sigmoid(q_t) F_t), w_t = exp(k_t),
each head with a decay d of its own. Causal; the paper's backward flow has no causal form. H hidden.
"""

from collections.abc import Callable

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from model.blocks.experts import padded_linear
from model.native.masters import attend_flow
from model.recurrence import Memory

NUM_HEADS = 8
KEY_BOUND = 10.0  # exp(k) stays in float32's range over any context
FLOW_ATTENTION_SLOTS = 2  # S and z


class FlowAttention(nn.Module):
    """Mixes tokens in linear time. Contributes zero until trained."""

    def __init__(self, hidden: int):
        super().__init__()
        self.qkv_proj = nn.Parameter(torch.randn(3 * hidden, hidden) * hidden**-0.5)
        self.o_proj = nn.Parameter(torch.zeros(hidden, hidden))
        # Half-lives from about 1 to about 700 tokens.
        self.decay_logits = nn.Parameter(torch.linspace(0.0, 7.0, NUM_HEADS))

    def forward(self, hidden: Tensor, memory: Memory, slot: int) -> Tensor:
        """hidden (..., H) -> same shape; takes the memory's slots `slot` and `slot + 1`."""
        rows = hidden.reshape(-1, hidden.shape[-1])
        query, key, value = padded_linear(rows, self.qkv_proj).view(*hidden.shape[:-1], -1).chunk(3, dim=-1)
        weight = key.clamp(-KEY_BOUND, KEY_BOUND).exp()
        decay = self.decay_logits.sigmoid().repeat_interleave(hidden.shape[-1] // NUM_HEADS)
        flow = memory.run(slot, weight * value, decay) / memory.run(slot + 1, weight, decay)
        gated = query.sigmoid() * flow
        return padded_linear(gated.reshape(-1, hidden.shape[-1]), self.o_proj).view_as(hidden)

    def writer(self, slot: int) -> Callable[[NDArray[np.float32], NDArray[np.float32]], None]:
        """What adds the contribution to rows that are being written, (T, H); states (T, slots, H) go on: compiled."""
        qkv_proj, decay_logits, o_proj = (
            p.detach().numpy() for p in (self.qkv_proj, self.decay_logits, self.o_proj)
        )
        bound = np.float32(KEY_BOUND)
        return lambda rows, states: attend_flow(rows, states, slot, qkv_proj, decay_logits, bound, o_proj)
