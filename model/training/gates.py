"""What a variant's routers choose on whole windows, layer by layer. For looking at it, not for serving.

B windows, T tokens of each, H hidden, E experts, N Masters.
"""

from collections.abc import Iterator, Mapping
from typing import cast

import torch
from torch import Tensor

from model.blocks.base import ExpertBlock
from model.blocks.experts import padded_linear
from model.blocks.fm_moe import FmMoeBlock
from model.blocks.masters import Master
from model.blocks.moe import MoeBlock
from model.blocks.mom import MomBlock
from model.blocks.routing import top_k_of_softmax
from model.blocks.some import SomeBlock
from model.recurrence import WholeWindows
from model.training.upper import run_layers
from model.transformer import Transformer

ATTENTION_SLOT = 2  # behind the flow's sum and weight


def block_inputs(
    model: Transformer, blocks: Mapping[int, ExpertBlock], hidden: Tensor, first: int
) -> Iterator[tuple[int, Tensor]]:
    """Each block's layer and the hidden states (B, T, H) that reach it, from those behind layer `first`.

    The blocks contribute to what the next one gets. Call it without gradients.
    """
    at = first
    for layer in sorted(blocks):
        hidden = run_layers(model, hidden, at + 1, layer + 1)
        yield layer, hidden
        hidden = hidden + blocks[layer](hidden)[0]
        at = layer


def dense_gates(block: ExpertBlock, normed: Tensor) -> Tensor:
    """The share that every expert has in every token's mixture: normed (B, T, H) -> (B, T, E) float32.

    Sums to 1 over the experts, or to 0 where a token passes by the Masters. `some` is routed by its anchors.
    """
    rows = normed.flatten(0, 1)
    match block:
        case MomBlock():
            normed = _attended(block, normed)
            temperatures = block.temperatures(normed)
            return block.gates(normed, temperatures) * (temperatures >= block.config.bypass_threshold)
        case SomeBlock():
            queries = rows if block.query_proj is None else padded_linear(rows, block.query_proj)
            scores, ids = (queries @ block.anchors.T).topk(block.config.num_experts_per_tok, dim=-1)
            gates = scores.softmax(-1)
        case MoeBlock():
            gates, ids = top_k_of_softmax(
                padded_linear(rows, block.router),
                block.config.num_experts_per_tok,
                renormalize=block.config.norm_topk_prob,
            )
        case FmMoeBlock():
            gates, ids, _ = block.route(rows)
        case _:
            raise AssertionError(f"{type(block).__name__} does not route")
    dense = torch.zeros(len(rows), block.config.num_experts, device=rows.device)
    return dense.scatter(1, ids, gates).unflatten(0, normed.shape[:2])


def master_outputs(block: MomBlock, normed: Tensor) -> Tensor:
    """M_i of every token, before any gate: normed (B, T, H) -> (B, T, N, H)."""
    normed = _attended(block, normed)
    positions = torch.arange(normed.shape[1], device=normed.device)
    outputs: list[Tensor] = []
    for module in block.masters:
        master = cast(Master, module)
        inputs = master.prepare(normed, positions, WholeWindows(), 0)
        outputs.append(master.ffn(inputs.flatten(0, 1)).view_as(normed))
    return torch.stack(outputs, dim=2)


def _attended(block: MomBlock, normed: Tensor) -> Tensor:
    if block.attention is None:
        return normed
    return normed + block.attention(normed, WholeWindows(), ATTENTION_SLOT)
