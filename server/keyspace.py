"""The key space in numbers, for people and metrics: where each key is, how loaded each expert.

M experts, D key size.
"""

import threading
from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from keystore.errors import KeyVersionUnavailable
from keystore.projection import (
    LoadBalance,
    layer_drift,
    load_balance,
    min_pairwise_distance,
    nearest_neighbours,
)
from keystore.records import Float32Array, ScopeId
from keystore.snapshot import KeySnapshot
from keystore.store import KeyStore
from server.registry import Endpoint

IDLE_SHARE = 0.1  # of a fair share
READINGS_KEPT = 256

SortField = Literal["expert", "usage", "drift", "norm", "distance"]


@dataclass(frozen=True, slots=True)
class LayerReading:
    """One layer of one version. Drift as a fraction of the trust radius."""

    drift_max: float
    drift_mean: float
    moved: int
    min_distance: float


class DriftReadings:
    """Readings of versions, each computed once: a version never changes. Thread-safe."""

    def __init__(self) -> None:
        self._known: OrderedDict[str, Mapping[int, LayerReading]] = OrderedDict()
        self._lock = threading.Lock()

    def of(self, store: KeyStore, view: KeySnapshot) -> Mapping[int, LayerReading]:
        with self._lock:
            known = self._known.get(view.checksum)
        if known is not None:
            return known
        made = read_layers(store, view)
        with self._lock:
            self._known[view.checksum] = made
            while len(self._known) > READINGS_KEPT:
                self._known.popitem(last=False)
        return made


def read_layers(store: KeyStore, view: KeySnapshot) -> Mapping[int, LayerReading]:
    """Every layer of a version, measured against the anchors."""
    anchors, radius = anchors_of(store), store.gravity.trust_radius
    readings: dict[int, LayerReading] = {}
    for layer, keys in view.keys.items():
        drift = layer_drift(anchors[layer], keys, radius)
        closest = min_pairwise_distance(keys) if len(keys) > 1 else 0.0
        readings[layer] = LayerReading(drift.max, drift.mean, drift.moved, closest)
    return readings


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
    changed = {layer: (before[layer] != keys).any(axis=1) for layer, keys in view.keys.items()}
    return {layer: np.flatnonzero(rows).tolist() for layer, rows in changed.items() if rows.any()}


def idle_experts(load: NDArray[np.int64]) -> int:
    """Experts with less than a tenth of a fair share; none before anything was routed."""
    total = int(load.sum())
    return int((load < IDLE_SHARE * total / len(load)).sum()) if total else 0


def usage_share(load: NDArray[np.int64]) -> NDArray[np.float64]:
    """Each expert's share of a layer's load."""
    return load / max(1, int(load.sum()))


def load_of_layer(endpoint: Endpoint, layer: int) -> tuple[NDArray[np.int64], LoadBalance]:
    """Tokens per expert (M,) of both phases, and how even they are."""
    assert endpoint.usage is not None, endpoint.name
    load: NDArray[np.int64] = endpoint.usage.counts[:, endpoint.usage.layers.index(layer)].sum(axis=0)
    return load, load_balance(load.astype(np.float32))


@dataclass(frozen=True, slots=True, eq=False)
class LayerColumns:
    """Per-expert numbers of one layer of one version, (M,) each."""

    usage: NDArray[np.int64]  # (phases, M)
    share: NDArray[np.float64]
    drift: NDArray[np.float64]  # relative to the anchor's norm
    drift_of_radius: NDArray[np.float64]
    norm: NDArray[np.float64]


def layer_columns(endpoint: Endpoint, store: KeyStore, view: KeySnapshot, layer: int) -> LayerColumns:
    """Usage is the endpoint's since its start, whoever asked; the rest is the version's."""
    keys = view.keys_of(layer)
    drift = layer_drift(anchors_of(store)[layer], keys, store.gravity.trust_radius)
    assert endpoint.usage is not None, endpoint.name
    usage = endpoint.usage.counts[:, endpoint.usage.layers.index(layer)].copy()
    norm = np.linalg.norm(keys.astype(np.float64), axis=1)
    return LayerColumns(usage, usage_share(usage.sum(axis=0)), drift.relative, drift.of_radius, norm)


def ranked_experts(columns: LayerColumns, keys: Float32Array, sort: SortField, *, falling: bool) -> list[int]:
    """Expert ids in the order asked for; equal ones by rising id."""
    expert_ids = np.arange(len(keys))
    by: NDArray[np.float64]
    match sort:
        case "distance":
            _, by = nearest_neighbours(keys, range(len(keys)))
        case "expert":
            by = expert_ids.astype(np.float64)
        case "usage":
            by = columns.share
        case "drift":
            by = columns.drift
        case "norm":
            by = columns.norm
    return np.lexsort((expert_ids, -by if falling else by)).tolist()
