"""A routed block whose weights compiled code reads as copies, which follow the experts that are added."""

from abc import abstractmethod

from model.blocks.base import BlockConfig, ExpertBlock
from model.blocks.compiled_weights import CompiledWeights, FoundKeys
from model.blocks.experts import Experts, Stacked
from model.keys import KeyView


class CompiledBlock(ExpertBlock):
    """Its experts are frozen when rows are written, and replaced by others only between two steps."""

    experts: Experts

    def __init__(self, config: BlockConfig):
        super().__init__(config)
        # The copies in force, and those that are about to be: of which experts, and None where there can be none.
        self._copies: tuple[tuple[Stacked, CompiledWeights | None], ...] = ()

    @abstractmethod
    def compiled(self, layer: int, keys: KeyView | None) -> tuple[CompiledWeights, FoundKeys] | None:
        """What compiled code needs for a row that sees these keys; None: such a row goes through `serve`."""

    @abstractmethod
    def copied(self, stacked: Stacked) -> CompiledWeights | None:
        """The block's weights for compiled code, with these experts; None: it does not take them."""

    def prepare_for(self, stacked: Stacked) -> None:
        """Copy experts that are about to be adopted, where copies are in use; on any thread."""
        if self._copies:
            self._copies = (*self._copies[-1:], (stacked, self.copied(stacked)))

    def compiled_weights(self) -> CompiledWeights | None:
        """The copies in force, the same as long as nobody adds experts."""
        stacked = self.experts.stacked
        for at, (of, weights) in enumerate(self._copies):
            if of is stacked:
                self._copies = self._copies[at:]
                return weights
        self._copies = ((stacked, self.copied(stacked)),)
        return self._copies[0][1]
