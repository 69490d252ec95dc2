"""From weights under our own names to a model in memory. Knows no files."""

from collections.abc import Mapping
from dataclasses import dataclass, field

from torch import Tensor

from model.blocks.routed_ffn import RoutedFfnBlock
from model.checkpoints.names import PACKED
from model.checkpoints.native import native_decoder
from model.config import ModelConfig
from model.graphs.decoder import GraphDecoder
from model.native.decoder import supported
from model.native.packed import bits_of
from model.projection import Int4Weight, Projection
from model.qk_norm import QkNorm
from model.tokenizer import TextTokenizer
from model.transformer import LayerWeights, Transformer


@dataclass(frozen=True, slots=True)
class BaseModel:
    """A base model and the tokenizer that belongs to it."""

    transformer: Transformer
    tokenizer: TextTokenizer
    blocks: Mapping[int, RoutedFfnBlock] = field(
        default_factory=dict[int, RoutedFfnBlock]
    )  # its own, by layer
    end_token_ids: frozenset[int] = frozenset()  # beside the configuration's eos_token_id
    fingerprint: str = ""  # of a checkpoint's files


def assemble(config: ModelConfig, weights: Mapping[str, Tensor]) -> Transformer:
    """A model from weights under our own names. Norm weights are float32, as the residual stream is."""
    layers = [_layer(config, weights, f"layers.{i}.") for i in range(config.num_hidden_layers)]
    final_norm = weights["final_norm"].float()
    decoder = native_decoder(config, weights, layers, final_norm)
    model = Transformer(config, weights["embedding"], layers, final_norm, weights.get("head"), decoder)
    if model.device.type == "cuda":
        model.graphs = GraphDecoder(model)
    return model


def _layer(config: ModelConfig, weights: Mapping[str, Tensor], prefix: str) -> LayerWeights:
    has_ffn = f"{prefix}down_proj" in weights
    return LayerWeights(
        input_norm=weights[f"{prefix}input_norm"].float(),
        qkv_proj=_projection(weights, f"{prefix}qkv_proj"),
        o_proj=_projection(weights, f"{prefix}o_proj"),
        post_attention_norm=weights[f"{prefix}post_attention_norm"].float() if has_ffn else None,
        gate_up_proj=_projection(weights, f"{prefix}gate_up_proj") if has_ffn else None,
        down_proj=_projection(weights, f"{prefix}down_proj") if has_ffn else None,
        qk_norm=_qk_norm(config, weights, prefix),
    )


def _projection(weights: Mapping[str, Tensor], name: str) -> Projection:
    weight, packed = weights[name], weights.get(f"{name}{PACKED}")
    if packed is None or bits_of(packed) != 4 or supported() or weight.device.type != "cpu":
        return Projection(weight, bias=weights.get(f"{name}.bias"))
    return Projection(weight, Int4Weight.of(packed))


def _qk_norm(config: ModelConfig, weights: Mapping[str, Tensor], prefix: str) -> QkNorm | None:
    query = weights.get(f"{prefix}q_norm")
    if query is None:
        return None
    key = weights[f"{prefix}k_norm"].float()
    return QkNorm(query.float(), key, config.num_attention_heads, config.rms_norm_eps)
