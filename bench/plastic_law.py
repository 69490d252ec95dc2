"""The law of `direct` credit as differentiable functions, for training experts that are meant to be moved.

The same arithmetic as keystore/gravity.py (tests/bench/test_plastic_law.py compares them), in torch: the derivative goes
through credit, queries, pull and bound; G, the usage and who was selected are taken as constants.
B sessions, T tokens of a window, E experts, D key size, H hidden.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from keystore.records import GravityConfig
from model.blocks.base import LayerTrace
from model.blocks.some import SomeBlock
from model.credit import expert_credit
from model.value_offsets import updated
from server.stream.rules import VALUE_BOUND


@dataclass(slots=True)
class LayerState:
    """What B sessions have made of one plastic layer so far; starts at the anchors, without offsets."""

    keys: Tensor  # (B, E, D)
    usage: Tensor  # (B, E)
    offsets: Tensor  # (B, E, H)

    @classmethod
    def at_anchors(cls, block: SomeBlock, sessions: int) -> "LayerState":
        keys = block.anchors.expand(sessions, -1, -1)
        shape = keys.shape[:2]
        return cls(keys, keys.new_ones(shape), keys.new_zeros(*shape, block.config.hidden_size))


def learn(
    state: LayerState,
    block: SomeBlock,
    trace: LayerTrace,
    gradient: Tensor,
    wanted: Tensor,
    output_norms: Tensor,
    gravity: GravityConfig,
    value_rate: float,
) -> LayerState:
    """The layer after one more window.

    trace of B * T rows, gradient (B * T, H): G of direct credit, and `wanted` its directions for value offsets;
    output_norms (B, T) of the stream behind the block.
    """
    sessions = len(state.keys)
    length = len(gradient) // sessions
    keys: list[Tensor] = []
    for b in range(sessions):
        rows = slice(b * length, (b + 1) * length)
        keys.append(pulled(state.keys[b], state.usage[b], block, trace.cut(rows), gradient[rows], gravity))
    ids = trace.expert_ids.unflatten(0, (sessions, length))
    shape = (sessions, length)
    gates, asked = trace.gates.unflatten(0, shape), wanted.unflatten(0, shape)
    offsets = updated(state.offsets, ids, gates, asked, output_norms, value_rate, VALUE_BOUND)
    return LayerState(torch.stack(keys), _usage(state.usage, ids, gravity), offsets)


def pulled(
    keys: Tensor, usage: Tensor, block: SomeBlock, trace: LayerTrace, gradient: Tensor, gravity: GravityConfig
) -> Tensor:
    """One session's keys (E, D) after a window: `k += alpha_i S_i / c_i`, inside the trust radius of the anchors."""
    credit = expert_credit(block, keys, trace, gradient, gravity.credit_candidates)
    selected = trace.expert_ids.shape[1]
    mean = credit.values[:, :selected].abs().mean()
    weights = (credit.values / mean).clamp(-gravity.credit_clamp, gravity.credit_clamp)
    anchors = block.anchors
    norms = anchors.norm(dim=1, keepdim=True)
    queries = trace.queries / trace.queries.norm(dim=1, keepdim=True) * norms.mean()
    spread = torch.zeros(len(queries), len(keys)).scatter(1, credit.expert_ids, weights)
    credited = torch.zeros(len(keys)).index_add(
        0, credit.expert_ids.flatten(), torch.ones(credit.expert_ids.numel())
    )
    rates = gravity.plasticity_rate / (1 + usage)
    moved = keys + (rates / credited.clamp_min(1)).unsqueeze(1) * (spread.T @ queries)
    away = moved - anchors
    distance = away.norm(dim=1, keepdim=True).clamp_min(torch.finfo(away.dtype).tiny)
    return anchors + away * (gravity.trust_radius * norms / distance).clamp_max(1.0)


def _usage(usage: Tensor, ids: Tensor, gravity: GravityConfig) -> Tensor:
    """The load average (B, E) after a window that selected ids (B, T, K)."""
    sessions, length, _ = ids.shape
    events = torch.zeros_like(usage).scatter_add_(1, ids.flatten(1), torch.ones(sessions, ids[0].numel()))
    keep = 0.5 ** (length / gravity.usage_halflife_tokens)
    return keep * usage + (1 - keep) * events * (usage.shape[1] / ids[0].numel())
