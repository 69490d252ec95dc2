"""Where a new expert belongs: the address that best predicts where it helps, by ridge regression. Pure functions.

An expert's utility for a token is the first-order loss decrease of mixing it in, u = -(y - o) . G. Its address is
the direction k that predicts utility from queries, the minimum of sum_t (q_t . k - u_t)^2 + ridge |k|^2, so
k = (A + ridge tr(A)/D I)^-1 b with A = sum q q^T and b = sum u q: sums over tokens, which merge like all
statistics and forget nothing. A is one for all: of an expert that came later it knows tokens that b does not, which
shortens (A + ...)^-1 b, whose length is not used, and turns it only as far as the queries have changed their shape since. Pulling a key by its credit follows the gradient of the loss along one direction of the
query space at a time and needs a rate; the regression takes the query space's shape into account and needs none.
M experts, S settling experts, D key dimensions.
"""

from dataclasses import dataclass

import numpy as np

from keystore.errors import InvalidStatistics
from keystore.records import Float32Array, Float64Array, GravityConfig, Int64Array
from keystore.statistics import LayerStats, UtilityStats


@dataclass(frozen=True, slots=True, eq=False)
class SettlingState:
    """What the tokens so far say about one layer's settling experts."""

    expert_ids: Int64Array  # (S,), rising
    moments: Float64Array  # A (D, D)
    utilities: Float64Array  # b (S, D)
    tokens: Float64Array  # (S,) that told of each expert, fewer than were seen once old ones fade

    @classmethod
    def empty(cls, expert_ids: Int64Array, dim: int) -> "SettlingState":
        return cls(
            expert_ids, np.zeros((dim, dim)), np.zeros((len(expert_ids), dim)), np.zeros(len(expert_ids))
        )

    def of(self, expert_ids: Int64Array) -> "SettlingState":
        """The same knowledge for another set of experts: new ones know nothing, the others forget nothing."""
        utilities, tokens = np.zeros((len(expert_ids), self.utilities.shape[1])), np.zeros(len(expert_ids))
        _, mine, theirs = np.intersect1d(expert_ids, self.expert_ids, return_indices=True)
        utilities[mine], tokens[mine] = self.utilities[theirs], self.tokens[theirs]
        return SettlingState(expert_ids, self.moments, utilities, tokens)


def advance_settling(
    state: SettlingState, stats: LayerStats, config: GravityConfig, window_tokens: int
) -> SettlingState:
    """The state after one window; one that has no utilities of an expert does not count for it.

    Raises InvalidStatistics when the window has no utilities.
    """
    if stats.utility is None:
        raise InvalidStatistics("the window has no utilities; allowed: those of the experts that settle")
    utility = _about(stats.utility, state.expert_ids)
    halflife = config.settling_halflife_tokens
    keep = 0.5 ** (window_tokens / halflife) if halflife else 1.0
    return SettlingState(
        state.expert_ids,
        keep * state.moments + utility.moments,
        keep * state.utilities + utility.weighted_queries,
        keep * state.tokens + window_tokens * np.isin(state.expert_ids, stats.utility.expert_ids),
    )


def _about(utility: UtilityStats, expert_ids: Int64Array) -> UtilityStats:
    if np.array_equal(utility.expert_ids, expert_ids):
        return utility
    sums = np.zeros((len(expert_ids), utility.weighted_queries.shape[1]))
    _, mine, theirs = np.intersect1d(expert_ids, utility.expert_ids, return_indices=True)
    sums[mine] = utility.weighted_queries[theirs]
    return UtilityStats(expert_ids, utility.moments, sums)


def settle(
    keys: Float32Array, state: SettlingState, config: GravityConfig, norm: float
) -> tuple[Float32Array, Int64Array]:
    """Keys (M, D) with the settling experts at the regression's addresses, of length `norm`; and who moved.

    An expert stays before enough tokens told of it, and when its utilities say nothing; when all stay `keys` itself
    comes back.
    """
    dim = len(state.moments)
    ridge = config.settling_ridge * np.trace(state.moments) / dim
    nobody = np.empty(0, np.int64)
    told = state.tokens >= config.settling_warmup_tokens
    if not told.any() or not ridge > 0:
        return keys, nobody
    solved = np.linalg.solve(state.moments + ridge * np.eye(dim), state.utilities.T).T  # (S, D)
    lengths = np.linalg.norm(solved, axis=1)
    told &= np.isfinite(lengths) & (lengths > 0)
    placed = (solved[told] * (norm / lengths[told])[:, None]).astype(np.float32)
    ids = state.expert_ids[told]
    moved = (placed.view(np.uint32) != keys[ids].view(np.uint32)).any(axis=1)
    if not moved.any():
        return keys, nobody
    settled = keys.copy()
    settled[ids[moved]] = placed[moved]
    return settled, ids[moved]
