"""Numbers that show where keys went and how load spreads. Reads snapshots' arrays, changes nothing."""

# M experts, D dimensions

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from keystore.records import Float32Array, Float64Array, Int64Array

ROWS_AT_ONCE = 256  # bounds the scratch of a distance search to 256 * M * 8 bytes


@dataclass(frozen=True, slots=True, eq=False)
class LayerDrift:
    """How far one layer's keys are from home."""

    relative: Float64Array  # (M,), |k - k0| / |k0|
    of_radius: Float64Array  # (M,), the same over the trust radius: 1 is the edge

    @property
    def mean(self) -> float:
        """Mean fraction of the trust radius used."""
        return float(self.of_radius.mean())

    @property
    def max(self) -> float:
        """Largest fraction of the trust radius used."""
        return float(self.of_radius.max())

    @property
    def moved(self) -> int:
        """Number of keys that are not at their anchor."""
        return int(np.count_nonzero(self.relative))


@dataclass(frozen=True, slots=True, eq=False)
class Plane:
    """The two directions in which a layer's anchors differ most, for drawing (principal components).

    Fitted to the anchors alone, so a picture of any version of any scope has the same axes.
    """

    centre: Float64Array  # (D,)
    axes: Float64Array  # (2, D), orthonormal
    explained: float  # share of the anchors' variance that the plane shows

    @classmethod
    def of(cls, anchors: Float32Array) -> "Plane":
        """Needs two dimensions or more. The largest component of each axis is positive: the sign is arbitrary."""
        wide = anchors.astype(np.float64)
        centre = wide.mean(axis=0)
        _, lengths, rows = np.linalg.svd(wide - centre, full_matrices=True)
        axes = rows[:2]
        largest = axes[np.arange(2), np.abs(axes).argmax(axis=1)]
        variance = (lengths**2).sum()
        shown = (lengths[:2] ** 2).sum()
        return cls(centre, axes * np.sign(largest)[:, None], float(shown / variance) if variance else 1.0)

    def project(self, keys: Float32Array) -> Float64Array:
        """Coordinates of keys (M, D) in the plane: (M, 2)."""
        return (keys.astype(np.float64) - self.centre) @ self.axes.T


@dataclass(frozen=True, slots=True)
class LoadBalance:
    """How evenly experts are used."""

    entropy_ratio: float  # entropy / log M; 1 is uniform
    jain_index: float  # (sum u)^2 / (M sum u^2); 1 is uniform, 1/M is one expert
    imbalance: float  # max load / mean load


def layer_drift(anchors: Float32Array, keys: Float32Array, trust_radius: float) -> LayerDrift:
    """Drift of every key of a layer.

    A zero anchor, and radius 0, count as 0 at home and infinity elsewhere.
    """
    distance = np.linalg.norm(keys.astype(np.float64) - anchors, axis=1)
    relative = _ratio(distance, np.linalg.norm(anchors.astype(np.float64), axis=1))
    return LayerDrift(relative, _ratio(relative, np.full(len(relative), trust_radius)))


def drift_of_layers(
    anchors: Mapping[int, Float32Array], keys: Mapping[int, Float32Array], trust_radius: float
) -> tuple[float, float]:
    """Largest and mean fraction of the trust radius used over the layers of `keys`; zeros when there are
    none.
    """
    of_radius = [layer_drift(anchors[layer], keys[layer], trust_radius).of_radius for layer in keys]
    if not of_radius:
        return 0.0, 0.0
    everything = np.concatenate(of_radius)
    return float(everything.max()), float(everything.mean())


def nearest_neighbours(keys: Float32Array, expert_ids: Sequence[int]) -> tuple[Int64Array, Float64Array]:
    """For some experts the closest other key and its Euclidean distance; -1 and 0 where there is no other."""
    nearest = np.full(len(expert_ids), -1, dtype=np.int64)
    distances = np.zeros(len(expert_ids))
    if len(keys) < 2:
        return nearest, distances
    wide = keys.astype(np.float64)
    squared = (wide**2).sum(axis=1)
    for first in range(0, len(expert_ids), ROWS_AT_ONCE):
        rows = np.asarray(expert_ids[first : first + ROWS_AT_ONCE])
        away = squared - 2.0 * (wide[rows] @ wide.T)  # (rows, M), short of each row's own square
        away[np.arange(len(rows)), rows] = np.inf
        closest = away.argmin(axis=1)
        nearest[first : first + len(rows)] = closest
        distances[first : first + len(rows)] = np.linalg.norm(wide[rows] - wide[closest], axis=1)
    return nearest, distances


def min_pairwise_distance(keys: Float32Array) -> float:
    """Smallest Euclidean distance between two keys: a take-over shows here first. Needs two keys or more.

    The pair is found through the Gram matrix, whose cancellation blurs close pairs, and measured directly.
    """
    wide = keys.astype(np.float64)
    squared = (wide**2).sum(axis=1)
    gram = squared[:, None] + squared[None, :] - 2.0 * (wide @ wide.T)
    np.fill_diagonal(gram, np.inf)
    first, second = np.unravel_index(int(gram.argmin()), gram.shape)
    return float(np.linalg.norm(wide[first] - wide[second]))


def load_balance(usage: Float32Array) -> LoadBalance:
    """Balance of a usage vector (M,); no load at all counts as uniform."""
    load = usage.astype(np.float64)
    total = load.sum()
    if total <= 0:
        return LoadBalance(1.0, 1.0, 1.0)
    share = load / total
    used = share[share > 0]
    entropy = float(-(used * np.log(used)).sum())
    return LoadBalance(
        entropy_ratio=entropy / float(np.log(len(load))) if len(load) > 1 else 1.0,
        jain_index=float(1.0 / (len(load) * (share**2).sum())),
        imbalance=float(share.max() * len(load)),
    )


def _ratio(above: Float64Array, below: Float64Array) -> Float64Array:
    return np.divide(above, below, out=np.where(above > 0, np.inf, 0.0), where=below > 0)
