"""How experts settle, for people: where their keys are by now, and what the last window did to them.

Only the last window of each scope is kept, in memory. Changes nothing.
"""

# n experts of a group in one layer

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType

import numpy as np

from keystore.learning import Progress
from keystore.pool import ExpertGroup, ExpertPool
from keystore.projection import layer_drift
from keystore.records import Float64Array, Int64Array, ScopeId
from keystore.statistics import RoutingStats


@dataclass(frozen=True, slots=True, eq=False)
class LayerSettling:
    """One layer of a settling group; every array is (n,), in the order of `expert_ids`."""

    expert_ids: Int64Array
    drift: Float64Array  # from where each key started, relative to its length there
    window_drift: Float64Array  # the same, of the last window alone
    usage_share: Float64Array  # of the layer's usage in the scope; adds up to 1 over all its experts
    credited_tokens: Int64Array  # of the last window: tokens that told what the expert is worth to them


@dataclass(frozen=True, slots=True, eq=False)
class _LayerWindow:
    expert_ids: Int64Array
    moved: Float64Array  # length of the step
    credited: Int64Array


class SettlingWatch:
    """Remembers the last window of every scope in which experts settle. Readers need no lock."""

    def __init__(self) -> None:
        self._windows: Mapping[ScopeId, Mapping[int, _LayerWindow]] = {}

    def note(self, pool: ExpertPool, stats: RoutingStats, before: Progress, after: Progress) -> None:
        """One window that a scope has learned. Sessions are not watched."""
        if stats.scope.kind == "session" or not pool.settling(stats.scope):
            return
        seen: dict[int, _LayerWindow] = {}
        for layer, sums in stats.layers.items():
            ids = pool.settling_ids(stats.scope, layer)
            old, new = (each.snapshot.keys_of(layer)[ids].astype(np.float64) for each in (before, after))
            credited = np.zeros(len(ids), np.int64)
            known = ids < len(sums.credited)  # an early window knows nothing of the newest
            credited[known] = sums.credited[ids[known]]
            if sums.utility is not None:
                credited[np.isin(ids, sums.utility.expert_ids)] = stats.tokens
            seen[layer] = _LayerWindow(ids, np.linalg.norm(new - old, axis=1), credited)
        self._windows = {**self._windows, stats.scope: seen}

    def read(self, pool: ExpertPool, group: ExpertGroup, latest: Progress) -> Mapping[int, LayerSettling]:
        """The group by layer, as its scope stands in `latest`."""
        windows = self._windows.get(group.scope, {})
        return MappingProxyType(
            {
                layer: _reading(pool, ids, layer, latest, windows.get(layer))
                for layer, ids in group.expert_ids.items()
            }
        )


def _reading(
    pool: ExpertPool, ids: Int64Array, layer: int, latest: Progress, window: _LayerWindow | None
) -> LayerSettling:
    start, keys = pool.keys[layer][ids], latest.snapshot.keys_of(layer)[ids]
    usage = latest.usage[layer].astype(np.float64)
    shown = latest.snapshot.visible_ids(layer)
    total = (usage if shown is None else usage[shown]).sum()
    lengths = np.linalg.norm(start.astype(np.float64), axis=1)
    moved, credited = np.zeros(len(ids)), np.zeros(len(ids), np.int64)
    if window is not None:
        _, mine, theirs = np.intersect1d(ids, window.expert_ids, return_indices=True)
        moved[mine], credited[mine] = window.moved[theirs], window.credited[theirs]
    return LayerSettling(
        expert_ids=ids,
        drift=layer_drift(start, keys, 1.0).relative,
        window_drift=np.divide(moved, lengths, out=np.where(moved > 0, np.inf, 0.0), where=lengths > 0),
        usage_share=usage[ids] / total if total else np.zeros(len(ids)),
        credited_tokens=credited,
    )
