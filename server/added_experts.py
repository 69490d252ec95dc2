"""Experts added to an endpoint while it serves: the engine's blocks and the key store grow together.

Experts first, then addresses: what nobody has a key for is never chosen. Both change under one lock, so that the
ids that the key store hands out are the rows that the blocks got.
"""

import threading
from collections.abc import Mapping
from concurrent.futures import TimeoutError as NotDone
from pathlib import Path

import torch
from torch import Tensor

from keystore.errors import StoreCorrupted
from keystore.pool import ExpertGroup
from keystore.records import ScopeId
from keystore.store import KeyStore
from model.blocks.base import ExpertUsage
from model.blocks.experts import Stacked
from model.blocks.some import SomeBlock
from model.checkpoints.experts import read_experts
from server.engine.runner import EngineRunner
from server.expert_files import addresses, keep, read_kept
from server.refusals import NotServing

ENGINE_WAIT_S = 30.0  # a step takes far less


class AddedExperts:
    """The expert groups of one endpoint. Methods may be called from any thread but the engine's and the loop's."""

    def __init__(
        self,
        store: KeyStore,
        blocks: Mapping[int, SomeBlock],
        usage: ExpertUsage,
        runner: EngineRunner,
        folder: Path,
    ):
        self._store = store
        self._blocks = blocks  # of the layers whose keys may move
        self._usage = usage
        self._runner = runner
        self._folder = folder  # of kept files
        self._lock = threading.Lock()

    def put_back(self) -> None:
        """Give the blocks every expert that the key store knows, before the engine starts.

        Retired ones are zeros: nobody finds them, but later ids count on from theirs. Raises CheckpointError for a
        file that is missing or another one, StoreCorrupted when it does not fit the key store.
        """
        for group in self._store.experts.all():
            matrices = self._matrices_of(group)
            for layer, ids in group.expert_ids.items():
                first, count = self._blocks[layer].experts.num_experts, _count(matrices.get(layer, {}))
                if ids[0] != first or len(ids) != count:
                    raise StoreCorrupted(
                        f"expert group {group.name!r} has {len(ids)} keys of layer {layer} from {ids[0]} on;"
                        f" its file has {count} experts, which come from {first} on"
                    )
            self._adopt(self._grown({layer: matrices[layer] for layer in group.expert_ids}))

    def add(self, path: Path, name: str, scope: ScopeId, seed: int) -> ExpertGroup:
        """Add the experts in a file as a group that settles in `scope`; between two steps, pausing nobody.

        Without keys in the file their addresses are random, drawn by `seed`. When anything fails, nothing is added.
        Raises InvalidExpertFile, InvalidExperts, ExpertGroupExists, NotServing, EngineDraining; OSError passes
        through.
        """
        with self._lock:
            file = read_experts(path, self._blocks)
            keys = addresses(file, self._blocks, seed)
            known = len(self._store.experts.all())
            keep(file, self._folder)
            before = {layer: self._blocks[layer].experts.stacked for layer in file.matrices}
            self._adopt_between_steps(self._grown(file.matrices))
            try:
                return self._store.experts.add(name, scope, keys, file.digest)
            except BaseException:
                if len(self._store.experts.all()) == known:
                    self._adopt_between_steps(before)
                raise

    def _matrices_of(self, group: ExpertGroup) -> Mapping[int, Mapping[str, Tensor]]:
        if group.state != "retired":
            return read_kept(group.name, group.digest, self._folder, self._blocks).matrices
        return {
            layer: {
                name: torch.zeros(len(ids), *matrix.shape[1:])
                for name, matrix in self._blocks[layer].experts.stacked.items()
            }
            for layer, ids in group.expert_ids.items()
        }

    def _grown(self, added: Mapping[int, Mapping[str, Tensor]]) -> dict[int, Stacked]:
        grown = {layer: self._blocks[layer].experts.appended(matrices) for layer, matrices in added.items()}
        for layer, stacked in grown.items():
            self._blocks[layer].prepare_for(stacked)
        return grown

    def _adopt_between_steps(self, stacked: Mapping[int, Stacked]) -> None:
        done = self._runner.between_steps(lambda: self._adopt(stacked))
        try:
            done.result(ENGINE_WAIT_S)
        except NotDone:
            if done.cancel():
                raise NotServing("the engine does not answer: nothing was changed") from None
            done.result()

    def _adopt(self, stacked: Mapping[int, Stacked]) -> None:
        for layer, matrices in stacked.items():
            self._blocks[layer].experts.adopt(matrices)
        self._usage.resize({layer: _count(matrices) for layer, matrices in stacked.items()})


def _count(matrices: Mapping[str, Tensor]) -> int:
    return len(next(iter(matrices.values()), ()))
