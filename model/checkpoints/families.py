"""What the model families of Hugging Face checkpoints have in common with Llama, and what not: one table.

Knows names of configuration fields and of tensors; reads no file.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

Flag = (
    bool | tuple[str, bool]
)  # always so, or as this field of the configuration says, with what its absence means


@dataclass(frozen=True, slots=True)
class RoutedFfnNames:
    """How a family calls the parts of a routed FFN."""

    num_experts: tuple[str, ...]  # configuration fields, any of which may hold it
    expert_size: str  # configuration field
    norm_topk_prob: Flag
    prefix: str  # of its tensors, within a layer
    experts: Mapping[str, str]  # ours -> theirs, behind `experts.N.`
    shared_size: str | None = None  # configuration field
    may_skip_layers: bool = False  # `decoder_sparse_step` and `mlp_only_layers` leave some layers a dense FFN


@dataclass(frozen=True, slots=True)
class Family:
    """One `model_type`."""

    qkv_bias: Flag = False
    o_bias: Flag = False
    mlp_bias: Flag = False
    qk_norm: Literal["head", "all heads"] | None = None  # what one norm runs over
    windows: Literal["always", "if used"] | None = (
        None  # `sliding_window` counts always, or with use_sliding_window
    )
    rope_theta: float = 10_000.0  # where the configuration names none
    routed_ffn: RoutedFfnNames | None = None


_SWIGLU = {
    "gate_proj": "gate_proj.weight",
    "up_proj": "up_proj.weight",
    "down_proj": "down_proj.weight",
}
_ATTENTION_BIAS = ("attention_bias", False)
_NUM_EXPERTS = ("num_experts", "num_local_experts")

FAMILIES: Mapping[str, Family] = {
    "llama": Family(qkv_bias=_ATTENTION_BIAS, o_bias=_ATTENTION_BIAS, mlp_bias=("mlp_bias", False)),
    "mistral": Family(windows="always"),
    "qwen2": Family(qkv_bias=True, windows="if used"),
    "qwen3": Family(qkv_bias=_ATTENTION_BIAS, o_bias=_ATTENTION_BIAS, qk_norm="head", windows="if used"),
    "mixtral": Family(
        windows="always",
        rope_theta=1_000_000.0,
        routed_ffn=RoutedFfnNames(
            num_experts=_NUM_EXPERTS,
            expert_size="intermediate_size",
            norm_topk_prob=True,
            prefix="block_sparse_moe",
            experts={"gate_proj": "w1.weight", "up_proj": "w3.weight", "down_proj": "w2.weight"},
        ),
    ),
    "olmoe": Family(
        qkv_bias=_ATTENTION_BIAS,
        o_bias=_ATTENTION_BIAS,
        qk_norm="all heads",
        routed_ffn=RoutedFfnNames(
            num_experts=_NUM_EXPERTS,
            expert_size="intermediate_size",
            norm_topk_prob=("norm_topk_prob", False),
            prefix="mlp",
            experts=_SWIGLU,
        ),
    ),
    "qwen2_moe": Family(
        qkv_bias=("qkv_bias", True),
        windows="if used",
        routed_ffn=RoutedFfnNames(
            num_experts=_NUM_EXPERTS,
            expert_size="moe_intermediate_size",
            norm_topk_prob=("norm_topk_prob", False),
            prefix="mlp",
            experts=_SWIGLU,
            shared_size="shared_expert_intermediate_size",
            may_skip_layers=True,
        ),
    ),
    "qwen3_moe": Family(
        qkv_bias=_ATTENTION_BIAS,
        o_bias=_ATTENTION_BIAS,
        qk_norm="head",
        windows="if used",
        routed_ffn=RoutedFfnNames(
            num_experts=_NUM_EXPERTS,
            expert_size="moe_intermediate_size",
            norm_topk_prob=("norm_topk_prob", False),
            prefix="mlp",
            experts=_SWIGLU,
            may_skip_layers=True,
        ),
    ),
}
