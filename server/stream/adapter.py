"""B texts that adapt beside each other, each on its own: predict a window, then learn from it.

B texts, T tokens of a window, H hidden, E experts, V vocabulary.
"""

from collections.abc import Mapping

import numpy as np
import torch
from torch import Tensor

from keystore.records import Float32Array
from model.blocks.some import SomeBlock
from model.credit import loss_gradient
from model.plastic_pass import PassResult, PlasticPass, UpperPast
from model.transformer import Transformer
from model.value_offsets import directions, head_metric, updated
from server.crediting import LayerRows, credited_rows, plain_rows
from server.stream.learner import KeyLearner
from server.stream.rules import VALUE_BOUND, StreamRule


class Adapter:
    """Everything that one rule changes in B texts. Starts at the anchors, without offsets and bias."""

    def __init__(self, model: Transformer, blocks: Mapping[int, SomeBlock], rule: StreamRule, texts: int):
        self.rule = rule
        self._model, self._blocks = model, blocks
        self._pass = PlasticPass(model, blocks, frozenset(blocks))
        anchors = {layer: block.anchors.detach().float().numpy(force=True) for layer, block in blocks.items()}
        self._anchors: Mapping[int, Float32Array] = anchors
        self._moving = frozenset(blocks) if rule.layers is None else rule.layers
        per_token = next(iter(blocks.values())).config.num_experts_per_tok
        self.learners = (
            [KeyLearner(anchors, self._moving, rule.gravity, per_token) for _ in range(texts)]
            if rule.gravity is not None
            else []
        )
        shape = (texts, len(next(iter(anchors.values()))), model.config.hidden_size)
        self._offsets = {layer: torch.zeros(shape) for layer in sorted(blocks)} if rule.value_rate else None
        self._metric = head_metric(model.final_norm, model.head) if rule.value_rate else None
        self._bias = torch.zeros(texts, model.config.vocab_size) if rule.bias_rate else None
        self.load = {layer: np.zeros(len(rows), np.int64) for layer, rows in anchors.items()}

    def window(self, entry: Tensor, targets: Tensor, past: UpperPast | None) -> Tensor:
        """Losses (B, T) of one window under what was learned so far, which then learns from it.

        entry (B, T, H): the residual stream before the lowest block; `past` (None: no context) is extended.
        """
        result = self._pass.run(
            entry,
            targets,
            self._keys(),
            past=past,
            credit=self.rule.credit,
            offsets=self._offsets,
            bias=self._bias,
        )
        for layer, trace in result.traces.items():
            self.load[layer] += np.bincount(
                trace.expert_ids.flatten().numpy(), minlength=len(self.load[layer])
            )
        self._learn(result, targets)
        return result.losses

    def _keys(self) -> dict[int, Tensor]:
        if not self.learners:
            return {layer: torch.from_numpy(rows) for layer, rows in self._anchors.items()}
        each = [learner.tensors() for learner in self.learners]
        return {layer: torch.stack([keys[layer] for keys in each]) for layer in self._anchors}

    def _learn(self, result: PassResult, targets: Tensor) -> None:
        length = targets.shape[1]
        direct = result.gradients
        if self._offsets is not None and self.rule.credit == "gradient":
            final = loss_gradient(self._model, result.final.flatten(0, 1), targets.flatten())
            direct = dict.fromkeys(result.traces, final)
        for text, learner in enumerate(self.learners):
            rows = slice(text * length, (text + 1) * length)
            learner.learn({layer: self._rows(layer, result, text, rows) for layer in sorted(self._moving)})
        if self._offsets is not None and self._metric is not None:
            wanted = directions(next(iter(direct.values())), result.final.flatten(0, 1), self._metric)
            self._offsets = {
                layer: updated(
                    offsets,
                    trace.expert_ids.unflatten(0, targets.shape),
                    trace.gates.unflatten(0, targets.shape),
                    wanted.unflatten(0, targets.shape),
                    result.outputs[layer].norm(dim=-1),
                    self.rule.value_rate,
                    VALUE_BOUND,
                )
                for layer, offsets in self._offsets.items()
                for trace in [result.traces[layer]]
            }
        if self._bias is not None:
            assert result.by_bias is not None, self.rule.name
            self._bias = self._bias - self.rule.bias_rate / length * result.by_bias

    def _rows(self, layer: int, result: PassResult, text: int, rows: slice) -> LayerRows:
        trace = result.traces[layer].cut(rows)
        gravity = self.rule.gravity
        assert gravity is not None, self.rule.name
        if gravity.rule == "literal":
            return plain_rows(trace, len(trace.queries))
        keys = torch.from_numpy(self.learners[text].keys[layer])
        gradient = result.gradients[layer][rows]
        return credited_rows(self._blocks[layer], keys, trace, gradient, gravity.credit_candidates)

    def keys_of(self, text: int) -> dict[int, Tensor]:
        """One text's keys as they are now, by layer."""
        own = self.learners[text].keys if self.learners else self._anchors
        return {layer: torch.from_numpy(rows) for layer, rows in own.items()}

    def drift(self) -> float:
        """The longest way that any key is from its anchor, relative to the anchor's length."""
        furthest = 0.0
        for learner in self.learners:
            for layer, anchors in self._anchors.items():
                moved = np.linalg.norm(learner.keys[layer] - anchors, axis=1)
                furthest = max(furthest, float((moved / np.linalg.norm(anchors, axis=1)).max()))
        return furthest


def run_texts(adapter: Adapter, entry: Tensor, targets: Tensor, window: int, *, carry: bool) -> Tensor:
    """Losses (B, L) of whole texts, window by window. entry (B, L, H); without `carry` each has a fresh context."""
    past = UpperPast() if carry else None
    losses: list[Tensor] = []
    for first in range(0, targets.shape[1], window):
        rows = slice(first, first + window)
        losses.append(adapter.window(entry[:, rows].float(), targets[:, rows], past))
    return torch.cat(losses, 1)
