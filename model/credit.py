"""How much each expert lowered, or would have lowered, the loss of each token.

Credit is the loss decrease per unit of score, exactly -d loss / d s_ti for a selected expert:
c_ti = -g_ti (y_ti - o_t) . G_t, with y the expert's output, o the block's output, G_t = d loss_t / d o_t.
An expert that was not selected gets the credit it would have had beside the K selected: with
g' = e^s / (sum_selected e^s + e^s), c = -g' (1 - g') (y - o) . G.

`direct` credit takes G at the final hidden state for every layer, as if nothing stood between the block and
the head: forward only, exact for a block behind the last layer, poorer the further below. `gradient` credit takes
the true G of each layer (model.plastic_pass).
T tokens, K selected experts, C candidates, E experts, H hidden, D key size.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from model.blocks.base import LayerTrace
from model.blocks.some import SomeBlock
from model.head import loss_and_gradient
from model.transformer import Transformer

MAX_OWN_GATE = 0.95


@dataclass(frozen=True, slots=True)
class Credit:
    """Credit of some experts for some tokens. The first K columns are the selected ones."""

    expert_ids: Tensor  # (T, C) int64
    values: Tensor  # (T, C) float32


@torch.inference_mode()
def loss_gradient(model: Transformer, hidden: Tensor, targets: Tensor) -> Tensor:
    """G (T, H) float32: derivative of the next-token loss by the final hidden state, per token.

    Compiled code takes rare tokens as one (model.native.likely).
    """
    if model.decoder is not None:
        return model.likely_head.gradient(hidden, targets)
    _, gradient = loss_and_gradient(
        hidden, model.final_norm, model.config.rms_norm_eps, model.head, targets.to(hidden.device)
    )
    return gradient


@torch.inference_mode()
def expert_utility(
    block: SomeBlock,
    trace: LayerTrace,
    gradient: Tensor,
    expert_ids: Tensor,
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """What mixing each of S experts in would lower the loss by, per unit of gate: (T, S) float32.

    To first order, -(y - o) . G. For an expert that is part of o already the mixture without it counts, which makes
    it -(y - o) . G / (1 - g); a gate above `MAX_OWN_GATE` counts as that. Products of experts are taken in `dtype`.
    """
    tokens = len(gradient)
    aligned = block.experts.alignments(trace.normed[:tokens], gradient, dtype)
    selected, gates = trace.expert_ids[:tokens], trace.gates[:tokens]
    of_output = _mixed(aligned, selected, gates)
    others_share = torch.ones_like(aligned).scatter_(1, selected, 1 - gates.clamp(max=MAX_OWN_GATE))
    return (-(aligned - of_output) / others_share)[:, expert_ids]


def expert_credit(
    block: SomeBlock,
    keys: Tensor,
    trace: LayerTrace,
    gradient: Tensor,
    candidates: int,
    visible_ids: Tensor | None = None,
    offsets: Tensor | None = None,
    dtype: torch.dtype = torch.float32,
) -> Credit:
    """Credit of each token's `candidates` best experts (0: all), the K selected first.

    keys (E, D) in force, gradient (T, H) for the trace's leading T rows; only `visible_ids`, if given, earn any.
    `offsets` (E, H) are what the session adds to the experts' outputs. Products of experts are taken in `dtype`: bfloat16
    moves the shipped blocks' credit by 0.23 %. Differentiable by the keys, the trace and the experts.
    """
    tokens = len(gradient)
    selected = trace.expert_ids[:tokens]
    # The block may have got more experts since these keys were in force.
    aligned = block.experts.alignments(trace.normed[:tokens], gradient, dtype)[
        :, : len(keys)
    ]  # (T, E): y . G
    if offsets is not None:
        aligned = aligned + gradient @ offsets.T
    gates = trace.gates[:tokens]
    of_output = _mixed(aligned, selected, gates)
    scores = trace.queries[:tokens] @ keys.T
    shown = len(keys)
    if visible_ids is not None:
        shown = len(visible_ids)
        scores = torch.full_like(scores, -torch.inf).index_copy_(1, visible_ids, scores[:, visible_ids])
    values = block.outside_credit(scores, selected, aligned, of_output)
    values.scatter_(1, selected, -gates * (aligned.gather(1, selected) - of_output))
    scores = scores.scatter(1, selected, torch.inf)
    ids = scores.topk(min(candidates or shown, shown), dim=1).indices
    return Credit(ids, values.gather(1, ids))


def _mixed(aligned: Tensor, selected: Tensor, gates: Tensor) -> Tensor:
    """o . G (T, 1) from y . G of every expert (T, E) and the K selected with their gates."""
    return (gates * aligned.gather(1, selected)).sum(1, keepdim=True)
