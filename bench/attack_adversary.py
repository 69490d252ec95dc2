"""The adversary of bench/attack.py: window after window of crafted tokens, each the best of several plans.

It knows the keys in force, the law and text of its own, not other people's requests. What it sends is what a
request could leave behind: queries as long as those of text, the experts that the keys in force select for them,
and credit after the server's own scaling and clamp. Inside that it chooses freely, which no real text can.
"""

# T tokens, M experts, D dimensions, K experts per token, C credit candidates, F favoured experts

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from keystore.gravity import consolidate_layer, credit_weights, scale_queries
from keystore.records import Float32Array, GravityConfig, Int64Array
from keystore.snapshot import KeySnapshot
from keystore.statistics import LayerStats, TokenCredit, TokenTrace

LEANS = (0.0, 0.1, 0.3, 1.0, 10.0)  # how far queries lean, over their length
MOST_AIMS = 256


@dataclass(frozen=True, slots=True, eq=False)
class Goal:
    """In one layer: the experts that are to win the traffic, and those that are to lose it."""

    favoured: Int64Array  # (F,)
    banished: Int64Array
    aims: Float32Array  # (A, D) queries like those to be won, from the adversary's own text


@dataclass(frozen=True, slots=True, eq=False)
class Adversary:
    """One layer's windows. Greedy: every plan's outcome is computed by the law, the best one is sent."""

    layer: int
    anchors: Float32Array  # (M, D)
    goal: Goal
    config: GravityConfig
    num_experts_per_tok: int
    effort: float = 1.0  # share of a window's tokens that carry credit: less of it is a smaller step

    def window(self, view: KeySnapshot) -> TokenTrace:
        """The tokens to send next, given the scope's version in force."""
        plans = [
            self._trace(view, queries, banishing=banishing)
            for queries in self._queries(view.keys_of(self.layer))
            for banishing in ((False,) if self.config.rule == "literal" else (False, True))
        ]
        return max(plans, key=lambda trace: self._outcome(view, trace))

    def _queries(self, keys: Float32Array) -> Iterator[Float32Array]:
        """Queries (A, D) like those to be won, leaning towards the favoured experts; then their rivals' own,
        leaning away, which under the literal rule is the only way to move a rival.
        """
        aims, favoured, rivals = _unit(self.goal.aims), _unit(keys[self.goal.favoured]), self._rivals(keys)
        lean = _unit(favoured.mean(axis=0) - _unit(keys[rivals]).mean(axis=0))
        lengths = np.linalg.norm(self.goal.aims, axis=1, keepdims=True)
        for strength in LEANS:
            yield (lengths * _unit(aims + strength * lean)).astype(np.float32)
        if self.config.rule == "literal":
            for strength in LEANS:
                repelling = _unit(_unit(keys[rivals]) - strength * _unit(aims.mean(axis=0)))
                yield (lengths.mean() * repelling).astype(np.float32)

    def _trace(self, view: KeySnapshot, queries: Float32Array, *, banishing: bool) -> TokenTrace:
        """A window of those queries that reach a favoured expert, or of all when none does."""
        keys, goal = view.keys_of(self.layer), self.goal
        reach = self.num_experts_per_tok
        if self.config.rule != "literal":
            reach = max(reach, self.config.credit_candidates or len(keys))
        found = view.search(self.layer, queries, min(reach, len(keys)))[1]  # (A, C), the K selected first
        favours = np.isin(found, goal.favoured)
        reached = np.flatnonzero(favours.any(axis=1))
        rows = np.resize(reached if len(reached) else np.arange(len(queries)), self.config.window_tokens)
        selected = np.ascontiguousarray(found[rows, : self.num_experts_per_tok])
        if self.config.rule == "literal":
            return TokenTrace(selected, queries[rows], len(keys))
        raw = (favours.astype(np.float32) - banishing * np.isin(found, goal.banished))[rows]
        raw[max(1, round(self.effort * len(raw))) :] = 0.0
        return TokenTrace(
            selected,
            scale_queries(queries[rows], float(np.linalg.norm(self.anchors, axis=1).mean())),
            len(keys),
            TokenCredit(found[rows], credit_weights(raw, self.config.credit_clamp)),
        )

    def _rivals(self, keys: Float32Array) -> Int64Array:
        """The K strongest of the other experts on the queries to be won."""
        strength = (self.goal.aims @ keys.T).mean(axis=0)
        strength[self.goal.favoured] = -np.inf
        return np.argsort(-strength)[: self.num_experts_per_tok]

    def _outcome(self, view: KeySnapshot, trace: TokenTrace) -> float:
        """Mean gate of the weakest favoured expert beside the strongest other one after this window."""
        stats = LayerStats.from_tokens(trace, coactivation=self.config.bonding_rate > 0)
        update = consolidate_layer(
            self.anchors,
            view.keys_of(self.layer),
            view.usage[self.layer],
            stats,
            self.config,
            num_experts_per_tok=self.num_experts_per_tok,
            window_tokens=len(trace.queries),
            learned_tokens=view.tokens,
        )
        scores = self.goal.aims @ update.keys.T  # (A, M)
        others = np.delete(scores, self.goal.favoured, axis=1)
        lead = scores[:, self.goal.favoured].min(axis=1) - others.max(axis=1)
        return float((0.5 + 0.5 * np.tanh(0.5 * lead)).mean())


def takeover(own: Float32Array, anchors: Float32Array) -> Goal:
    """Win the traffic of the expert with most of it, with the expert that comes closest to it already."""
    scores = own @ anchors.T
    victim = int(np.bincount(scores.argmax(axis=1), minlength=len(anchors)).argmax())
    aims = own[scores.argmax(axis=1) == victim]
    lead = (aims @ anchors.T).mean(axis=0)
    lead[victim] = -np.inf
    return Goal(np.array([lead.argmax()]), np.array([victim]), _some(aims))


def flood(own: Float32Array, anchors: Float32Array, experts: int) -> Goal:
    """Win everybody's traffic with the experts that have least of it."""
    load = np.bincount((own @ anchors.T).argmax(axis=1), minlength=len(anchors))
    order = np.argsort(load, kind="stable")
    return Goal(order[:experts], order[experts:], _some(own))


def share_taken(queries: Float32Array, keys: Float32Array, goal: Goal) -> NDArray[np.bool_]:
    """For each query (T) whether a favoured expert has the best score."""
    return np.isin((queries @ keys.T).argmax(axis=1), goal.favoured)


def common_direction(queries: Float32Array) -> tuple[Float32Array, float]:
    """The direction that queries have most in common, (D,), and its share of their energy."""
    unit = _unit(queries).astype(np.float64)
    values, vectors = np.linalg.eigh(unit.T @ unit / len(unit))
    return vectors[:, -1].astype(np.float32), float(values[-1])


def safe_radius(
    traffic: Float32Array, anchors: Float32Array, goal: Goal, spared: Float32Array | None = None
) -> float:
    """The radius up to which the straight move, favoured ones towards the aims and banished ones away from
    them, wins less than half of `traffic` (T, D); to 0.001, at most 4. `spared` (D,): a direction in which no
    key moves.
    """
    direction = _unit(goal.aims).mean(axis=0)
    if spared is not None:
        direction = direction - (direction @ spared) * spared
    sides = np.zeros((len(anchors), 1), np.float32)
    sides[goal.favoured], sides[goal.banished] = 1.0, -1.0
    move = sides * np.linalg.norm(anchors, axis=1, keepdims=True) * _unit(direction)
    low, high = 0.0, 4.0
    while high - low > 0.001:
        middle = (low + high) / 2
        half_is_taken = share_taken(traffic, anchors + middle * move, goal).mean() >= 0.5
        low, high = (low, middle) if half_is_taken else (middle, high)
    return low


def _some(rows: Float32Array) -> Float32Array:
    return rows[:: -(-len(rows) // MOST_AIMS)]


def _unit(rows: NDArray[np.floating]) -> Float32Array:
    return (rows / np.maximum(np.linalg.norm(rows, axis=-1, keepdims=True), 1e-12)).astype(np.float32)
