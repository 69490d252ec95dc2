"""How much routing knows of where a text comes from, beside what chance alone would show.

Plain statistics over gate mass: no model, no text. U units that may be relabelled as a whole (files: tokens of one
file are alike, so permuting tokens would call any routing significant), D domains, E experts, P permutations.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Float64Array = NDArray[np.float64]
Statistic = Callable[[Float64Array], Float64Array]  # shares (..., D, E) -> (...)

PERMUTATIONS_AT_ONCE = 64


@dataclass(frozen=True, slots=True)
class PermutationTest:
    """A statistic beside its values under permuted labels; `p_value` is one-sided."""

    observed: float
    null_mean: float
    null_95: float  # 95 % quantile
    p_value: float


def gate_shares(mass: Float64Array, labels: NDArray[np.int64], domains: int) -> Float64Array:
    """p(e | d): gate mass (U, E) of units with labels (..., U) -> (..., D, E), each domain summing to 1."""
    member = (labels[..., None, :] == np.arange(domains)[:, None]).astype(np.float64)  # (..., D, U)
    by_domain = member @ mass
    return by_domain / by_domain.sum(-1, keepdims=True)


def mutual_information(shares: Float64Array) -> Float64Array:
    """I(expert; domain) in bits, every domain weighing alike: sum_d 1/D sum_e p(e|d) log2(p(e|d) / p(e)).

    Between 0 and log2 D. Cover and Thomas, Elements of Information Theory, eq. 2.28. The plug-in estimate is above 0
    for independent ones too: compare it with its permutation null.
    """
    return entropy(shares.mean(-2)) - entropy(shares).mean(-1)


def specialisation_index(shares: Float64Array) -> Float64Array:
    """Mean over experts with any mass of 1 - H(domain | expert) / log2 D: 0 impartial, 1 one domain each.

    p(d|e) = p(e|d) / sum_d p(e|d): every domain weighs alike, and so does every expert, while in the mutual
    information an expert weighs as much as it is used.
    """
    totals = shares.sum(-2)  # (..., E)
    used = totals > 0
    of_expert = np.swapaxes(shares / np.where(used, totals, 1.0)[..., None, :], -1, -2)  # (..., E, D)
    purity = 1 - entropy(of_expert) / np.log2(shares.shape[-2])
    return (purity * used).sum(-1) / used.sum(-1)


def load_entropy_ratio(shares: Float64Array) -> Float64Array:
    """H(expert) / log2 E over all domains: 1 when every expert gets as much, 0 when one gets everything."""
    return entropy(shares.mean(-2)) / np.log2(shares.shape[-1])


def entropy(probabilities: Float64Array) -> Float64Array:
    """-sum p log2 p over the last dimension, in bits."""
    safe = np.where(probabilities > 0, probabilities, 1.0)
    return -(safe * np.log2(safe)).sum(-1)


def permutation_test(
    statistic: Statistic,
    mass: Float64Array,
    labels: NDArray[np.int64],
    domains: int,
    permutations: int,
    seed: int = 0,
) -> PermutationTest:
    """Is a statistic of the shares larger than with the units' labels (U) permuted?

    p = (1 + number of permutations that reach the observed value) / (1 + P), which is never 0 (Phipson and Smyth
    2010).
    """
    generator = np.random.default_rng(seed)
    observed = float(statistic(gate_shares(mass, labels, domains)))
    parts: list[Float64Array] = []
    for start in range(0, permutations, PERMUTATIONS_AT_ONCE):
        count = min(PERMUTATIONS_AT_ONCE, permutations - start)
        permuted = generator.permuted(np.tile(labels, (count, 1)), axis=1)
        parts.append(statistic(gate_shares(mass, permuted, domains)))
    null = np.concatenate(parts)
    reached = int((null >= observed - 1e-12).sum())
    return PermutationTest(
        observed, float(null.mean()), float(np.quantile(null, 0.95)), (1 + reached) / (1 + permutations)
    )


def mean_cosine_similarity(outputs: NDArray[np.floating]) -> Float64Array:
    """Cosine between experts' outputs on the same token, averaged over tokens: (T, N, H) -> (N, N)."""
    values = outputs.astype(np.float64)
    unit = values / np.maximum(np.linalg.norm(values, axis=-1, keepdims=True), 1e-12)
    return np.einsum("tnh,tmh->nm", unit, unit) / len(unit)
