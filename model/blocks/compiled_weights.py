"""A routed block's weights as compiled code reads them (model.native.routed).

E experts, F expert width, H hidden, N outputs of the router or query.
"""

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from model.blocks.base import ExpertBlock
from model.blocks.experts import Experts, Stacked
from model.keys import KeyView

LARGEST_KEYS = 65_536  # numbers of a layer's keys that are all looked at
FoundKeys = tuple[int, int, int]  # addresses of keys and of the ids that may be found, and their number


@dataclass(frozen=True, slots=True)
class CompiledWeights:
    """Copies in half the memory, one expert's matrices beside each other; their addresses and sizes are `about` them."""

    about: tuple[int, ...]
    arrays: tuple[NDArray[np.generic], ...]
    experts: Experts
    stacked: Stacked

    @property
    def in_force(self) -> bool:
        """Whether the experts still have the matrices that were copied."""
        return self.experts.stacked is self.stacked

    @classmethod
    def of(
        cls,
        block: ExpertBlock,
        matrix: Tensor,
        experts: Experts,
        stacked: Stacked,
        *,
        over_all: bool,
    ) -> "CompiledWeights | None":
        """Of a block's norm, its matrix (N, H), and matrices that its experts have or are about to have.

        `over_all`: gates are shares of all experts, not of the K that were chosen.

        None: they train, are elsewhere, or bfloat16 cannot hold them as they are.
        """
        norm, config = block.norm, block.config
        *inner, last = stacked.values()
        given = (norm, matrix, *inner, last)
        if any(p.requires_grad or p.dtype != torch.float32 or p.device.type != "cpu" for p in given):
            return None
        rounded = [matrix.detach().bfloat16(), experts.side_by_side(stacked, torch.bfloat16).detach()]
        parts = zip(rounded[1].unbind(2), (*inner, last.transpose(1, 2)), strict=True)
        if not all(torch.equal(own.float(), exact) for own, exact in ((rounded[0], matrix), *parts)):
            return None
        weight = norm.detach().numpy().copy()
        outputs, matrices = (bits.view(torch.int16).numpy().view(np.uint16) for bits in rounded)
        about = (
            weight.ctypes.data,
            int(np.float32(config.rms_norm_eps).view(np.uint32)),
            outputs.ctypes.data,
            len(outputs),
            matrices.ctypes.data,
            *matrices.shape[1:3],
            config.num_experts_per_tok,
            int(over_all),
        )
        return cls(about, (weight, outputs, matrices), experts, stacked)


def found_keys(keys: KeyView, layer: int, per_token: int) -> FoundKeys | None:
    """Where a version's keys are, as long as it is there. None: too many, or too few."""
    rows, ids = keys.keys_of(layer), keys.visible_ids(layer)
    found = len(rows) if ids is None else len(ids)
    if rows.size > LARGEST_KEYS or found < per_token:
        return None
    return rows.ctypes.data, 0 if ids is None else ids.ctypes.data, found
