"""The key space in numbers, for people and metrics: where each key is, how loaded each expert.

M experts, D key size.
"""

import threading
from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from keystore.errors import KeyVersionUnavailable
from keystore.pool import GroupState
from keystore.projection import (
    LoadBalance,
    layer_drift,
    load_balance,
    min_pairwise_distance,
    nearest_neighbours,
)
from keystore.records import Float32Array, Int64Array, ScopeId
from keystore.snapshot import KeySnapshot
from keystore.store import KeyStore
from server.registry import Endpoint

IDLE_SHARE = 0.1  # of a fair share
READINGS_KEPT = 256

SortField = Literal["expert", "usage", "drift", "norm", "distance", "idle"]


@dataclass(frozen=True, slots=True)
class LayerReading:
    """The experts of one layer that one version sees. Drift as a fraction of the trust radius, of those that have one."""

    drift_max: float
    drift_mean: float
    moved: int
    min_distance: float


class DriftReadings:
    """Readings of versions, each computed once: a version never changes. Thread-safe."""

    def __init__(self) -> None:
        self._known: OrderedDict[tuple[str, int, float], Mapping[int, LayerReading]] = OrderedDict()
        self._lock = threading.Lock()

    def of(self, store: KeyStore, view: KeySnapshot) -> Mapping[int, LayerReading]:
        name = view.checksum, view.generation, store.gravity.for_scope(view.scope).trust_radius
        with self._lock:
            known = self._known.get(name)
        if known is not None:
            return known
        made = read_layers(store, view)
        with self._lock:
            self._known[name] = made
            while len(self._known) > READINGS_KEPT:
                self._known.popitem(last=False)
        return made


def read_layers(store: KeyStore, view: KeySnapshot) -> Mapping[int, LayerReading]:
    """Every layer of a version, measured against the anchors."""
    anchors, radius = anchors_of(store), store.gravity.for_scope(view.scope).trust_radius
    readings: dict[int, LayerReading] = {}
    for layer, keys in view.keys.items():
        ids = visible_experts(view, layer)
        drift = layer_drift(anchors[layer][ids], keys[ids], radius)
        bounded = drift.of_radius[~settles(store, ids, layer)]
        closest = min_pairwise_distance(keys[ids]) if len(ids) > 1 else 0.0
        readings[layer] = LayerReading(float(bounded.max()), float(bounded.mean()), drift.moved, closest)
    return readings


def visible_experts(view: KeySnapshot, layer: int) -> Int64Array:
    """Rising ids of the experts of a layer that a version sees."""
    visible = view.visible_ids(layer)
    return np.arange(len(view.keys_of(layer))) if visible is None else visible


def settles(store: KeyStore, expert_ids: Int64Array, layer: int) -> NDArray[np.bool_]:
    """Which of these experts have no anchor to stay near yet."""
    return np.isin(expert_ids, _ids_in(store, layer, "settling"))


def retired_experts(store: KeyStore, layer: int) -> Int64Array:
    """Ids that nobody sees any more."""
    return _ids_in(store, layer, "retired")


def born_experts(store: KeyStore, layer: int) -> int:
    """How many experts the layer had before any were added."""
    groups = store.experts.all()
    return len(anchors_of(store)[layer]) - sum(len(group.expert_ids.get(layer, ())) for group in groups)


def _ids_in(store: KeyStore, layer: int, state: GroupState) -> Int64Array:
    groups = [group for group in store.experts.all() if group.state == state and layer in group.expert_ids]
    return np.concatenate([np.empty(0, np.int64), *(group.expert_ids[layer] for group in groups)])


def anchors_of(store: KeyStore) -> Mapping[int, Float32Array]:
    """Where the keys of every layer started."""
    return store.view(ScopeId("anchor")).keys


def moved_experts(store: KeyStore, view: KeySnapshot) -> dict[int, list[int]] | None:
    """Experts whose keys differ from the parent version's, by layer; None when that is no longer kept."""
    if view.parent is None:
        return {}
    try:
        before = store.view(view.scope, view.parent).keys
    except KeyVersionUnavailable:
        return None
    known = {layer: min(len(before[layer]), len(keys)) for layer, keys in view.keys.items()}
    changed = {
        layer: (before[layer][:n] != view.keys_of(layer)[:n]).any(axis=1) for layer, n in known.items()
    }
    return {layer: np.flatnonzero(rows).tolist() for layer, rows in changed.items() if rows.any()}


def idle_experts(load: NDArray[np.int64]) -> int:
    """Experts with less than a tenth of a fair share; none before anything was routed."""
    total = int(load.sum())
    return int((load < IDLE_SHARE * total / len(load)).sum()) if total else 0


def usage_share(load: NDArray[np.int64]) -> NDArray[np.float64]:
    """Each expert's share of a layer's load."""
    return load / max(1, int(load.sum()))


def load_of_layer(
    endpoint: Endpoint, layer: int, expert_ids: Int64Array
) -> tuple[NDArray[np.int64], LoadBalance]:
    """Tokens of both phases for each of these experts, and how even they are."""
    assert endpoint.usage is not None, endpoint.name
    load: NDArray[np.int64] = endpoint.usage.of_layer(layer).sum(axis=0)[expert_ids]
    return load, load_balance(load.astype(np.float32))


@dataclass(frozen=True, slots=True, eq=False)
class LayerColumns:
    """Per-expert numbers of one layer of one version, (M,) each."""

    usage: NDArray[np.int64]  # (phases, M)
    share: NDArray[np.float64]
    drift: NDArray[np.float64]  # relative to the anchor's norm
    drift_of_radius: NDArray[np.float64]  # NaN for an expert that settles: it has no radius
    norm: NDArray[np.float64]
    idle_s: NDArray[np.float64]  # since the expert was last selected; NaN if it never was

    def row(self, expert: int) -> dict[str, Any]:
        """One expert's numbers, as JSON tells them."""
        prefill, decode = self.usage[:, expert].tolist()
        return {
            "expert": expert,
            "usage": {"prefill": prefill, "decode": decode},
            "share": float(self.share[expert]),
            "drift": float(self.drift[expert]),
            "drift_of_radius": float(self.drift_of_radius[expert]),
            "norm": float(self.norm[expert]),
            "idle_s": float(self.idle_s[expert]),
        }


def layer_columns(endpoint: Endpoint, store: KeyStore, view: KeySnapshot, layer: int) -> LayerColumns:
    """Usage and idle time are the endpoint's since its start, whoever asked; the rest is the version's."""
    keys = view.keys_of(layer)
    radius = store.gravity.for_scope(view.scope).trust_radius
    drift = layer_drift(anchors_of(store)[layer], keys, radius)
    assert endpoint.usage is not None, endpoint.name
    usage = endpoint.usage.of_layer(layer)[:, : len(keys)]
    norm = np.linalg.norm(keys.astype(np.float64), axis=1)
    of_radius = np.where(settles(store, np.arange(len(keys)), layer), np.nan, drift.of_radius)
    idle_s = endpoint.usage.recent[layer].idle_s()[: len(keys)]
    return LayerColumns(usage, usage_share(usage.sum(axis=0)), drift.relative, of_radius, norm, idle_s)


def ranked_experts(
    columns: LayerColumns, keys: Float32Array, expert_ids: Int64Array, sort: SortField, *, falling: bool
) -> Int64Array:
    """These experts of a layer with keys (M, D) in the order asked for; equal ones by rising id."""
    by: NDArray[np.float64]
    match sort:
        case "distance":
            _, by = nearest_neighbours(keys[expert_ids], range(len(expert_ids)))
        case "expert":
            by = expert_ids.astype(np.float64)
        case "usage":
            by = columns.share[expert_ids]
        case "drift":
            by = columns.drift[expert_ids]
        case "norm":
            by = columns.norm[expert_ids]
        case "idle":
            by = np.nan_to_num(columns.idle_s[expert_ids], nan=np.inf)
    return expert_ids[np.lexsort((expert_ids, -by if falling else by))]
