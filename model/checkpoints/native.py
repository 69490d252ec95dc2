"""The way of written rows through compiled code, where a checkpoint and this processor allow it."""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from model.attention import rope_table
from model.checkpoints.names import PACKED
from model.config import ModelConfig
from model.native.decoder import Decoder, supported
from model.native.packed import stacked
from model.transformer import LayerWeights

MATRICES = ("qkv_proj", "o_proj", "gate_up_proj", "down_proj")
HEAD_DIM_STEP = 64


def native_decoder(
    config: ModelConfig, weights: Mapping[str, Tensor], layers: Sequence[LayerWeights], final_norm: Tensor
) -> Decoder | None:
    """None unless every matrix has a packed form, of one width over the layers, and the processor the instructions."""
    names = {matrix: [f"layers.{i}.{matrix}{PACKED}" for i in range(len(layers))] for matrix in MATRICES}
    head = weights.get(f"embedding{PACKED}")
    if head is None or head.device.type != "cpu" or not supported() or config.head_dim % HEAD_DIM_STEP:
        return None
    if not all(name in weights for each in names.values() for name in each):
        return None
    parts = {matrix: [weights[name] for name in each] for matrix, each in names.items()}
    if any(len({part.shape for part in each}) > 1 for each in parts.values()):
        return None
    norms: list[Tensor] = []
    for layer in layers:
        assert layer.post_attention_norm is not None, "a packed layer has an FFN"
        norms.append(torch.stack((layer.input_norm, layer.post_attention_norm)))
    matrices = {matrix: stacked(each) for matrix, each in parts.items()}
    rope = rope_table(config, head.device)
    return Decoder(config, matrices, torch.stack(norms), stacked([head])[0], final_norm, rope)
