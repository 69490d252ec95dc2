"""The choices of a Mixture of Masters (model.blocks.mom)."""

from dataclasses import dataclass

from model.blocks.base import BlockConfig, check_choice
from model.errors import UnsupportedConfig

CHOICES = {
    "flow": ("mean", "sum"),
    "temperature": ("softplus", "sigmoid"),
    "routing": ("soft", "topk", "hybrid"),
    "attention": ("none", "flow"),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class MomConfig(BlockConfig):
    """`num_experts` Masters of width `expert_size`; `num_experts_per_tok` is k of top-k routing and of usage counts.

    flow: "mean" (F = S / z) or the literal "sum". temperature: "softplus" or the literal "sigmoid".
    routing: "soft" (gates over all Masters) and "topk" (the k best, renormalised) add the shared flow to the gated
    Masters (eq. 13); "hybrid" has soft gates and blends the two by a learned share (eq. 10).
    attention: "flow" puts FlowAttention before the Masters. backward_flow: refused in a causal model.
    """

    flow: str = "mean"
    flow_decay: float = 0.99  # lambda
    temperature: str = "softplus"
    routing: str = "hybrid"
    bypass_threshold: float = 0.5
    attention: str = "none"
    backward_flow: bool = False


def check(config: MomConfig) -> None:
    """Raises UnsupportedConfig for a choice that does not exist, or that a causal model cannot have."""
    if config.backward_flow:
        raise UnsupportedConfig(
            "backward flow (eq. 9) sees later tokens: a causal model cannot have it, and scores from it are void"
        )
    for name, allowed in CHOICES.items():
        check_choice(config, name, allowed)
    if not 0 < config.flow_decay <= 1:
        raise UnsupportedConfig(f"mom: flow_decay is {config.flow_decay}; allowed: above 0, at most 1")
