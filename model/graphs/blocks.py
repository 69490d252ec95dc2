"""Expert blocks over rows that are being written, in fixed shapes and without a look at the host.

R rows, E experts, K experts per token, F expert width, H hidden.
"""

import math
from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor

from model.blocks.experts import Experts
from model.blocks.moe import MoeBlock
from model.blocks.routing import top_k_of_softmax
from model.blocks.some import SomeBlock
from model.graphs.key_table import KeyTable
from model.transformer import Variant

KEY_NUMBERS = 1 << 16  # E * D of a layer up to which each row gets its version's keys copied
GATHER_COST = 3  # a selected expert's weights are read, copied and read again


class GraphExperts:
    """Experts whose weights stay where they are now."""

    def __init__(self, experts: Experts):
        self.stacked = experts.stacked  # held: what was recorded has the addresses
        self._activate = experts.activate
        *self.inner, self.last = (matrix.detach() for matrix in self.stacked.values())
        self._last_of_all = self.last.transpose(1, 2).flatten(0, 1)  # (E * F, H)

    def mix(self, rows: Tensor, expert_ids: Tensor, gates: Tensor) -> Tensor:
        """rows (R, H), expert_ids and gates (R, K) -> (R, H).

        Few rows take copies of just the experts that they selected, many rows all experts with zero gates for the others.
        """
        num_experts = len(self.last)
        if GATHER_COST * expert_ids.numel() <= num_experts:
            return self._of_selected(rows, expert_ids, gates)
        activations = self._activate(*(F.linear(rows, matrix.flatten(0, 1)) for matrix in self.inner))
        shares = gates.new_zeros(len(rows), num_experts).scatter(1, expert_ids, gates)
        weighted = activations.unflatten(1, (num_experts, -1)) * shares.unsqueeze(-1)  # (R, E, F)
        return weighted.flatten(1) @ self._last_of_all

    def _of_selected(self, rows: Tensor, expert_ids: Tensor, gates: Tensor) -> Tensor:
        selected = expert_ids.flatten()
        inputs = (
            rows.unsqueeze(1).expand(-1, expert_ids.shape[1], -1).reshape(len(selected), -1, 1)
        )  # (R * K, H, 1)
        products = (matrix.index_select(0, selected) @ inputs for matrix in self.inner)
        outputs = self.last.index_select(0, selected) @ self._activate(*products)
        return (outputs.view(*expert_ids.shape, -1) * gates.unsqueeze(-1)).sum(1)


class GraphVariant:
    """A variant's blocks, with the keys of the versions that its rows see."""

    def __init__(self, variant: Variant, slots: int, device: torch.device):
        self.variant = variant
        self._experts = {layer: GraphExperts(_experts_of(block)) for layer, block in variant.blocks.items()}
        sizes = {layer: size for layer, block in variant.blocks.items() if (size := _key_size(block))}
        self.keys = KeyTable(sizes, slots, device) if sizes else None

    @staticmethod
    def covers(variant: Variant) -> bool:
        """Whether all blocks are of a kind that fits. Masters, flows and checkpoints' own experts do not."""
        return all(
            type(block) is MoeBlock
            or (type(block) is SomeBlock and math.prod(_key_size(block) or ()) <= KEY_NUMBERS)
            for block in variant.blocks.values()
        )

    @property
    def current(self) -> bool:
        """Whether the blocks' weights are still the same: experts are added while serving."""
        blocks = self.variant.blocks
        return all(_experts_of(blocks[at]).stacked is mine.stacked for at, mine in self._experts.items())

    @property
    def layers(self) -> Mapping[int, GraphExperts]:
        return self._experts

    def run(self, layer: int, hidden: Tensor, slots: Tensor) -> tuple[Tensor, Tensor]:
        """hidden (R, H), the slots of the rows' keys (R) -> contribution (R, H), expert ids (R, K)."""
        block = self.variant.blocks[layer]
        normed = block.normed(hidden)
        if isinstance(block, MoeBlock):
            logits = F.linear(normed, block.router)
            renormalize = block.config.norm_topk_prob
            gates, ids = top_k_of_softmax(logits, block.config.num_experts_per_tok, renormalize=renormalize)
        else:
            assert isinstance(block, SomeBlock), block
            assert self.keys is not None, layer
            queries = normed if block.query_proj is None else F.linear(normed, block.query_proj)
            scores = self.keys.scores(layer, queries, slots)
            best, ids = scores.topk(block.config.num_experts_per_tok, dim=-1)
            gates = best.softmax(-1)
        return self._experts[layer].mix(normed, ids, gates), ids


def _experts_of(block: object) -> Experts:
    assert isinstance(block, MoeBlock | SomeBlock), block
    return block.experts


def _key_size(block: object) -> tuple[int, int] | None:
    """(E, key size) of a block with routing keys."""
    if not isinstance(block, SomeBlock):
        return None
    return block.experts.num_experts, block.config.key_size
