"""The layers over rows that are being written, in kernels: five a layer, six where positions are split, four a block.

R rows, H hidden.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from model.blocks.moe import MoeBlock
from model.blocks.some import SomeBlock
from model.graphs.batch import Batch
from model.graphs.blocks import GraphVariant
from model.graphs.kernels.attention import attend
from model.graphs.kernels.experts import add_selected
from model.graphs.kernels.products import product
from model.graphs.kernels.routing import choose
from model.graphs.kv_pool import PooledBudget
from model.transformer import LayerWeights, Transformer


def run_layers(model: Transformer, pool: PooledBudget, batch: Batch) -> None:
    """Fill the batch's hidden states and expert ids."""
    tokens, positions, first_blocks, slots, numbers = batch.inputs.unbind(1)
    own = {number: numbers == number for number in batch.variants}
    hidden = batch.hidden.copy_(F.embedding(tokens, model.embedding))
    first_column = _first_columns(batch)
    for index, layer in enumerate(model.layers):
        attended = attend(
            _projections(hidden, layer, model),
            (model.cos, model.sin),
            positions,
            first_blocks,
            pool.keys[index],
            pool.values[index],
            batch.length,
            model.config,
        )
        product(attended, layer.o_proj.weight, bias=layer.o_proj.bias, add_to=hidden)
        _add_ffn(hidden, layer, model.config.rms_norm_eps)
        for number, variant in batch.variants.items():
            if index in variant.layers:
                first = first_column[number, index]
                per_row = variant.variant.blocks[index].config.num_experts_per_tok
                expert_ids = batch.expert_ids[:, first : first + per_row]
                _add_block(hidden, variant, index, slots, expert_ids, own[number])


def logits(model: Transformer, hidden: Tensor) -> Tensor:
    """Next-token logits: hidden (R, H) float32 before the final norm -> (R, V) float32, all of them exact."""
    return product(hidden, model.head, norm=(model.final_norm, model.config.rms_norm_eps), exact=True)


def try_out(device: torch.device) -> None:
    """Compile and run something small. Raises what stands in the way."""
    rows = torch.zeros(1, 16, device=device)
    product(rows, rows)


def _first_columns(batch: Batch) -> dict[tuple[int, int], int]:
    """Where the expert ids of a variant's layer begin: layers rise, as they are run."""
    first: dict[tuple[int, int], int] = {}
    column = 0
    for number, variant in batch.variants.items():
        for layer in sorted(variant.layers):
            first[number, layer] = column
            column += variant.variant.blocks[layer].config.num_experts_per_tok
    return first


def _projections(hidden: Tensor, layer: LayerWeights, model: Transformer) -> Tensor:
    """Query, key and value heads side by side, (R, (Q + 2 G) * D), not rotated."""
    config = model.config
    norm = layer.input_norm, config.rms_norm_eps
    qkv = product(hidden, layer.qkv_proj.weight, norm=norm, bias=layer.qkv_proj.bias)
    if layer.qk_norm is None:
        return qkv
    qk, value = qkv.split([config.query_size + config.key_value_size, config.key_value_size], dim=1)
    return torch.cat((layer.qk_norm(qk.unflatten(1, (-1, config.head_dim))).flatten(1), value), dim=1)


def _add_ffn(hidden: Tensor, layer: LayerWeights, eps: float) -> None:
    """A layer's own FFN, if it has one, on top of hidden (R, H)."""
    if layer.post_attention_norm is None or layer.gate_up_proj is None or layer.down_proj is None:
        return
    norm = layer.post_attention_norm, eps
    gated = product(hidden, layer.gate_up_proj.weight, norm=norm, gated=True)
    product(gated, layer.down_proj.weight, bias=layer.down_proj.bias, add_to=hidden)


def _add_block(
    hidden: Tensor, variant: GraphVariant, layer: int, slots: Tensor, expert_ids: Tensor, own: Tensor
) -> None:
    """A block's contribution on top of its `own` (R) rows of hidden (R, H); fills expert_ids (R, K) of all."""
    block, experts = variant.variant.blocks[layer], variant.layers[layer]
    norm = block.norm, block.config.rms_norm_eps
    if isinstance(block, MoeBlock):
        logits = product(hidden, block.router, norm=norm)
        gates = choose(logits, expert_ids, None, renormalize=block.config.norm_topk_prob)
    else:
        assert isinstance(block, SomeBlock), block
        assert variant.keys is not None, layer
        projection = block.query_proj
        queries = block.normed(hidden) if projection is None else product(hidden, projection, norm=norm)
        gates = choose(queries, expert_ids, (variant.keys.keys[layer], variant.keys.shown[layer], slots))
    add_selected(hidden, norm, experts.inner, experts.last, expert_ids, gates, own)
