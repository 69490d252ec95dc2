"""Experiment 1, address discovery: experts whose keys were replaced by random ones, as if just added, in mixed traffic.

How much of the loss they cost is recovered, against tokens seen, and what happens to everybody else.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import numpy as np
import torch
from plasticity_texts import TRAINED, UNTRAINED, Entered, Texts, shuffled
from torch import Tensor
from tqdm import tqdm

from keystore.records import Float32Array, GravityConfig, Int64Array
from model.blocks.some import SomeBlock
from model.plastic_pass import PassResult, PlasticPass
from model.transformer import Transformer
from server.crediting import LayerRows, credited_rows, plain_rows
from server.stream.learner import KeyLearner

WINDOW = 512
WINDOWS_A_STEP = 2  # one of the target domain, one of the others in turn
ORPHANS = 16  # experts a layer
EVALUATED = 6  # windows a domain
USUAL_SHARE = 0.5  # of a fair share: who is used less than this in the target domain is nobody's expert there


@dataclass(frozen=True, slots=True)
class Discovery:
    """One way to find addresses."""

    name: str
    gravity: GravityConfig
    regression: bool = False
    adam_rate: float = 0.0  # the ceiling: the keys trained by Adam on the true derivative


@dataclass(frozen=True, slots=True)
class Reading:
    """Losses by domain after some tokens."""

    tokens: int
    losses: Mapping[str, float]


class DiscoveryRun:
    """One target domain: its orphans, its traffic, its evaluation."""

    def __init__(
        self,
        model: Transformer,
        blocks: Mapping[int, SomeBlock],
        texts: Texts,
        target: str,
        split: str,
        tokens: int,
    ):
        self.target, self._blocks = target, blocks
        self._pass = PlasticPass(model, blocks, frozenset(blocks))
        self.steps = tokens // (WINDOW * WINDOWS_A_STEP)
        others = [name for name in TRAINED if name != target]
        each = -(-self.steps // len(others))
        self._target = _stream(texts, target, split, self.steps)
        self._others = [_stream(texts, name, split, each) for name in others]
        self._evaluated = {
            name: texts.of(name, split, WINDOW, EVALUATED, per_file=1, half=1) for name in TRAINED + UNTRAINED
        }
        self.anchors = {
            layer: block.anchors.detach().float().numpy(force=True) for layer, block in blocks.items()
        }
        self.orphans = self._most_used()
        self.start = self._random_keys()

    def evaluate(self, keys: Mapping[int, Float32Array]) -> dict[str, float]:
        tensors = {layer: torch.from_numpy(rows) for layer, rows in keys.items()}
        losses: dict[str, float] = {}
        for name, entered in self._evaluated.items():
            parts = [
                self._pass.run(
                    *entered.batch(range(first, min(first + 2, len(entered.pieces)))), tensors
                ).losses
                for first in range(0, len(entered.pieces), 2)
            ]
            losses[name] = float(torch.cat(parts).mean())
        return losses

    def run(self, rule: Discovery, checkpoints: list[int]) -> Iterator[Reading]:
        """Losses whenever a checkpoint of tokens is passed."""
        per_token = next(iter(self._blocks.values())).config.num_experts_per_tok
        learner = KeyLearner(
            self.anchors,
            frozenset(self._blocks),
            rule.gravity,
            per_token,
            start=self.start,
            movable=self.orphans,
            free=True,
        )
        adam = _Adam(rule.adam_rate) if rule.adam_rate else None
        credit = "none" if rule.gravity.rule == "literal" else rule.gravity.rule
        due = sorted(checkpoints)
        for step in tqdm(range(self.steps), desc=f"{self.target}: {rule.name}", unit="window"):
            entry, targets = self._traffic(step)
            result = self._pass.run(entry, targets, learner.tensors(), credit=credit)
            rows = {layer: self._rows(rule, layer, result, learner) for layer in self._blocks}
            if adam is None:
                learner.learn(rows)
            else:
                adam.step(learner, rows, self.orphans)
            tokens = (step + 1) * WINDOW * WINDOWS_A_STEP
            while due and tokens >= due[0]:
                yield Reading(due.pop(0), self.evaluate(learner.keys))

    def _traffic(self, step: int) -> tuple[Tensor, Tensor]:
        others = self._others[step % len(self._others)]
        pairs = [self._target.batch([step]), others.batch([step // len(self._others)])]
        return torch.cat([entry for entry, _ in pairs]), torch.cat([targets for _, targets in pairs])

    def _rows(self, rule: Discovery, layer: int, result: PassResult, learner: KeyLearner) -> LayerRows:
        trace = result.traces[layer]
        if rule.gravity.rule == "literal":
            return plain_rows(trace, len(trace.queries))
        return credited_rows(
            self._blocks[layer],
            torch.from_numpy(learner.keys[layer]),
            trace,
            result.gradients[layer],
            rule.gravity.credit_candidates,
            settling_ids=self.orphans[layer] if rule.regression else None,
        )

    def _most_used(self) -> dict[int, Int64Array]:
        """The experts that the target domain uses most, compared with all domains."""
        keys = {layer: torch.from_numpy(rows) for layer, rows in self.anchors.items()}
        used = {
            layer: {name: np.zeros(len(rows)) for name in TRAINED} for layer, rows in self.anchors.items()
        }
        for name in TRAINED:
            entered = self._evaluated[name]
            for first in range(0, len(entered.pieces), 2):
                result = self._pass.run(
                    *entered.batch(range(first, min(first + 2, len(entered.pieces)))), keys
                )
                for layer, trace in result.traces.items():
                    used[layer][name] += np.bincount(
                        trace.expert_ids.flatten(), minlength=len(self.anchors[layer])
                    )
        chosen: dict[int, Int64Array] = {}
        for layer, by_domain in used.items():
            share = {name: counts / counts.sum() for name, counts in by_domain.items()}
            others = np.mean([share[name] for name in TRAINED if name != self.target], axis=0)
            lift = share[self.target] / (others + 1 / (20 * len(others)))
            lift[share[self.target] < USUAL_SHARE / len(lift)] = 0
            chosen[layer] = np.sort(np.argsort(-lift, kind="stable")[:ORPHANS])
        return chosen

    def _random_keys(self) -> dict[int, Float32Array]:
        """The anchors, with random directions of the layer's mean length for the orphans."""
        rng = np.random.default_rng(7)
        keys = {layer: rows.copy() for layer, rows in self.anchors.items()}
        for layer, ids in self.orphans.items():
            drawn = rng.standard_normal((len(ids), keys[layer].shape[1]))
            length = np.linalg.norm(self.anchors[layer], axis=1).mean()
            keys[layer][ids] = drawn * (length / np.linalg.norm(drawn, axis=1, keepdims=True))
        return keys


class _Adam:
    """Adam on the rows that may move, from the true derivative of the loss: what training would do."""

    def __init__(self, rate: float):
        self._rate, self._steps = rate, 0
        self._first: dict[int, np.ndarray] = {}
        self._second: dict[int, np.ndarray] = {}

    def step(
        self, learner: KeyLearner, rows: Mapping[int, LayerRows], movable: Mapping[int, Int64Array]
    ) -> None:
        self._steps += 1
        for layer, each in rows.items():
            keys, ids = learner.keys[layer], movable[layer]
            dense = np.zeros((len(each), len(keys)))
            selected = each.expert_ids.shape[1]  # the derivative by the scores exists for the selected only
            np.put_along_axis(dense, each.candidate_ids[:, :selected], each.credit[:, :selected], axis=1)
            gradient = -(dense.T @ each.queries)[ids] / len(each)
            first = self._first.get(layer, np.zeros_like(gradient)) * 0.9 + 0.1 * gradient
            second = self._second.get(layer, np.zeros_like(gradient)) * 0.95 + 0.05 * gradient**2
            self._first[layer], self._second[layer] = first, second
            unbiased = first / (1 - 0.9**self._steps)
            scale = np.sqrt(second / (1 - 0.95**self._steps)) + 1e-12
            keys[ids] -= (self._rate * unbiased / scale).astype(np.float32)


def _stream(texts: Texts, domain: str, split: str, windows: int) -> Entered:
    """Windows in random order; from the start again when the split has too few."""
    pieces = shuffled(texts.of(domain, split, WINDOW, 100_000, per_file=24, half=0).pieces, seed=1)
    return texts.enter(pieces.take(np.arange(windows) % len(pieces)))
