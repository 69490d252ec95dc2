"""Expert blocks: what a variant adds to a few layers of the frozen base."""

from collections.abc import Callable

from model.blocks.base import BlockConfig, ExpertBlock
from model.blocks.some import SomeBlock

BLOCKS: dict[str, Callable[[BlockConfig], ExpertBlock]] = {
    "some": SomeBlock,
}


def build_block(config: BlockConfig) -> ExpertBlock:
    """A fresh block of the configured kind, which contributes exactly zero until it is trained."""
    return BLOCKS[config.kind](config)
