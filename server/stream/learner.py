"""One scope's keys in memory, moved by the key store's own law.

M experts, D key size.
"""

from collections.abc import Mapping

import numpy as np
import torch

from keystore.gravity import consolidate_layer, initial_usage
from keystore.records import Float32Array, GravityConfig, Int64Array
from keystore.settling import SettlingState, advance_settling, settle
from keystore.statistics import LayerStats
from server.crediting import RowsByLayer


class KeyLearner:
    """Keys of one scope, which start at `start` (None: the anchors) and are measured from the anchors.

    Rows with the utility of settling experts move those by regression; without, all of `movable` (None: everybody)
    are pulled, inside the trust radius or, when `free`, anywhere.
    """

    def __init__(
        self,
        anchors: Mapping[int, Float32Array],
        plastic: frozenset[int],
        gravity: GravityConfig,
        num_experts_per_tok: int,
        start: Mapping[int, Float32Array] | None = None,
        movable: Mapping[int, Int64Array] | None = None,
        free: bool = False,
    ):
        self.keys = {layer: rows.copy() for layer, rows in (start or anchors).items()}
        self.tokens = 0
        self._anchors, self._gravity, self._per_token = anchors, gravity, num_experts_per_tok
        self._usage = {layer: initial_usage(len(anchors[layer]), gravity) for layer in plastic}
        self._norms = {layer: float(np.linalg.norm(anchors[layer], axis=1).mean()) for layer in plastic}
        self._movable = {
            layer: np.isin(np.arange(len(anchors[layer])), ids) for layer, ids in (movable or {}).items()
        }
        self._free = free
        self._settling: dict[int, SettlingState] = {}

    def learn(self, rows: RowsByLayer) -> None:
        """One window."""
        tokens = len(next(iter(rows.values())))
        for layer, each in rows.items():
            trace = each.trace(self._gravity, self._norms[layer], len(self.keys[layer]))
            stats = LayerStats.from_tokens(trace, coactivation=self._gravity.bonding_rate > 0)
            if stats.utility is not None:
                self._settle(layer, stats, tokens)
            else:
                self._pull(layer, stats, tokens)
        self.tokens += tokens

    def tensors(self) -> dict[int, torch.Tensor]:
        """Keys (M, D) by layer."""
        return {layer: torch.from_numpy(rows) for layer, rows in self.keys.items()}

    def _settle(self, layer: int, stats: LayerStats, tokens: int) -> None:
        assert stats.utility is not None, layer
        ids = stats.utility.expert_ids
        known = self._settling.get(layer) or SettlingState.empty(ids, self.keys[layer].shape[1])
        self._settling[layer] = advance_settling(known, stats, self._gravity, tokens)
        self.keys[layer], _ = settle(
            self.keys[layer], self._settling[layer], self._gravity, self._norms[layer]
        )

    def _pull(self, layer: int, stats: LayerStats, tokens: int) -> None:
        update = consolidate_layer(
            self._anchors[layer],
            self.keys[layer],
            self._usage[layer],
            stats,
            self._gravity,
            num_experts_per_tok=self._per_token,
            window_tokens=tokens,
            learned_tokens=self.tokens,
            radius=np.full(len(self.keys[layer]), np.inf) if self._free else None,
            movable=self._movable.get(layer),
        )
        self.keys[layer], self._usage[layer] = update.keys, update.usage
