"""What `libration train` trains: four variants and two controls on the same layers of SmolLM2-135M.

All but the smaller control have the same number of trainable parameters within 2 %
(tests/model/test_variants.py). `ffn-active` has what a token passes through in a routed variant, `ffn-total` what a
variant holds: a router that does not beat the first is not routing.
"""

from collections.abc import Mapping

from model.blocks.base import BlockConfig
from model.blocks.fm_moe import FmMoeConfig
from model.blocks.moe import MoeConfig
from model.blocks.mom import MomConfig
from model.blocks.some import SomeConfig

LAYERS = (17, 21, 25, 29)
HIDDEN = 576

VARIANTS: Mapping[str, BlockConfig] = {
    "some": SomeConfig(
        kind="some",
        layers=LAYERS,
        hidden_size=HIDDEN,
        num_experts=64,
        num_experts_per_tok=4,
        expert_size=24,
        key_size=96,
    ),
    "moe": MoeConfig(
        kind="moe",
        layers=LAYERS,
        hidden_size=HIDDEN,
        num_experts=64,
        num_experts_per_tok=4,
        expert_size=16,  # three matrices an expert where `some` has two
    ),
    "mom": MomConfig(
        kind="mom", layers=LAYERS, hidden_size=HIDDEN, num_experts=4, num_experts_per_tok=2, expert_size=232
    ),
    "fm-moe": FmMoeConfig(
        kind="fm-moe",
        layers=LAYERS,
        hidden_size=HIDDEN,
        num_experts=8,
        num_experts_per_tok=2,
        expert_size=168,
        time_embed_size=32,
    ),
    "ffn-active": BlockConfig(
        kind="ffn", layers=LAYERS, hidden_size=HIDDEN, num_experts=1, num_experts_per_tok=1, expert_size=152
    ),
    "ffn-total": BlockConfig(
        kind="ffn", layers=LAYERS, hidden_size=HIDDEN, num_experts=1, num_experts_per_tok=1, expert_size=1584
    ),
}
