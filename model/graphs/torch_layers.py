"""The layers over rows that are being written, in torch's operations: the way on a CPU, and what kernels must equal.

R rows, H hidden, K experts per token.
"""

import torch
from torch import Tensor

from model.graphs.attention import Places, attend_pooled
from model.graphs.batch import Batch
from model.graphs.kv_pool import PooledBudget
from model.transformer import Transformer


def run_layers(model: Transformer, pool: PooledBudget, batch: Batch) -> None:
    """Fill the batch's hidden states and expert ids."""
    tokens, positions, first_blocks, slots, numbers = batch.inputs.unbind(1)
    places = Places.of(positions, first_blocks, batch.length, model.dtype)
    own = {number: (numbers == number).unsqueeze(1) for number in batch.variants}
    rope = model.rope_at(positions)
    hidden = model.embed(tokens)
    selected: dict[int, list[Tensor]] = {number: [] for number in batch.variants}
    for index, layer in enumerate(model.layers):
        hidden = model.layer(
            hidden,
            layer,
            rope,
            lambda q, k, v, index=index: attend_pooled(q, k, v, pool.keys[index], pool.values[index], places),
        )
        for number, variant in batch.variants.items():
            if index in variant.layers:
                contribution, expert_ids = variant.run(index, hidden, slots)
                with_block = hidden + contribution
                hidden = with_block if batch.alike else torch.where(own[number], with_block, hidden)
                selected[number].append(expert_ids)
    batch.hidden.copy_(hidden)
    if batch.variants:
        every = [expert_ids for of_variant in selected.values() for expert_ids in of_variant]
        torch.cat(every, 1, out=batch.expert_ids)
