"""Expert blocks: what a variant adds to a few layers of the frozen base."""

from collections.abc import Callable
from typing import Any

from model.blocks.base import BlockConfig, ExpertBlock
from model.blocks.ffn import FfnBlock
from model.blocks.fm_moe import FmMoeBlock, FmMoeConfig
from model.blocks.moe import MoeBlock, MoeConfig
from model.blocks.mom import MomBlock, MomConfig
from model.blocks.some import SomeBlock, SomeConfig

# kind -> its configuration, its block. A block is built from its own kind's configuration only.
BLOCKS: dict[str, tuple[type[BlockConfig], Callable[[Any], ExpertBlock]]] = {
    "some": (SomeConfig, SomeBlock),
    "moe": (MoeConfig, MoeBlock),
    "mom": (MomConfig, MomBlock),
    "fm-moe": (FmMoeConfig, FmMoeBlock),
    "ffn": (BlockConfig, FfnBlock),
}


def build_block(config: BlockConfig) -> ExpertBlock:
    """A fresh block of the configured kind, which contributes exactly zero until it is trained.

    Raises UnsupportedConfig when the configuration names a choice that does not exist.
    """
    config_type, block = BLOCKS[config.kind]
    assert isinstance(config, config_type), (config.kind, type(config))
    return block(config)
