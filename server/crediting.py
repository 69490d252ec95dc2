"""From a lesson to what each of its tokens says about each expert: plain selections, or credit.

`direct` credit reads the output head once more, `gradient` credit the upper layers, forward and backward. Both are computed
in a thread of their own at a low priority, so that no token waits for them.
T tokens, K selected experts, C candidates, D key size.
"""

import logging
from collections.abc import Mapping
from dataclasses import dataclass, replace
from weakref import WeakKeyDictionary

import numpy as np
import torch

from keystore.gravity import credit_weights, scale_queries
from keystore.records import Float32Array, GravityConfig, Int64Array
from keystore.statistics import TokenCredit, TokenTrace, TokenUtility
from model.blocks.base import ExpertBlock, LayerTrace
from model.blocks.some import SomeBlock
from model.credit import expert_credit, expert_utility, loss_gradient
from model.plastic_pass import PlasticPass, UpperPast
from model.transformer import Transformer
from server.engine.sequence import Lesson, Sequence

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, eq=False)
class LayerRows:
    """One layer's routing of T tokens, and the raw credit of some experts for each."""

    expert_ids: Int64Array  # (T, K)
    queries: Float32Array  # (T, D)
    candidate_ids: Int64Array  # (T, C), the selected first; (T, 0) under the literal rule
    credit: Float32Array  # (T, C)
    reward: Float32Array  # (T,): 1 for a prompt's tokens, an answer's by its reader's verdict
    settling_ids: Int64Array  # (S,): experts that are looking for their address
    utility: Float32Array  # (T, S), of those

    def __len__(self) -> int:
        return len(self.queries)

    def cut(self, rows: slice) -> "LayerRows":
        return LayerRows(
            self.expert_ids[rows],
            self.queries[rows],
            self.candidate_ids[rows],
            self.credit[rows],
            self.reward[rows],
            self.settling_ids,
            self.utility[rows],
        )

    @staticmethod
    def joined(pieces: "list[LayerRows]") -> "LayerRows":
        # Experts that came or went between two pieces change how many candidates there are: the best stay.
        width = min(piece.candidate_ids.shape[1] for piece in pieces)
        return LayerRows(
            np.concatenate([piece.expert_ids for piece in pieces]),
            np.concatenate([piece.queries for piece in pieces]),
            np.concatenate([piece.candidate_ids[:, :width] for piece in pieces]),
            np.concatenate([piece.credit[:, :width] for piece in pieces]),
            np.concatenate([piece.reward for piece in pieces]),
            pieces[-1].settling_ids,
            np.concatenate([piece._utility_of(pieces[-1].settling_ids) for piece in pieces]),
        )

    def _utility_of(self, expert_ids: Int64Array) -> Float32Array:
        """Utilities (T, S) of these experts; of those that came later, none."""
        if np.array_equal(expert_ids, self.settling_ids):
            return self.utility
        columns = np.zeros((len(self), len(expert_ids)), np.float32)
        _, mine, theirs = np.intersect1d(expert_ids, self.settling_ids, return_indices=True)
        columns[:, mine] = self.utility[:, theirs]
        return columns

    def trace(self, gravity: GravityConfig, anchor_norm: float, num_experts: int) -> TokenTrace:
        """As the key store wants it: credit over its mean, queries at the anchors' mean norm."""
        if gravity.rule == "literal":
            return TokenTrace(self.expert_ids, self.queries, num_experts)
        if len(self.settling_ids):
            # Nobody but the settling experts moves, and they go by their utility: queries stay as they are.
            nothing = TokenCredit(self.candidate_ids[:, :0], self.credit[:, :0])
            utility = TokenUtility(self.settling_ids, self.utility * self.reward[:, None])
            return TokenTrace(self.expert_ids, self.queries, num_experts, nothing, utility)
        weights = credit_weights(self.credit, gravity.credit_clamp, self.expert_ids.shape[1])
        credit = TokenCredit(self.candidate_ids, weights * self.reward[:, None])
        return TokenTrace(self.expert_ids, scale_queries(self.queries, anchor_norm), num_experts, credit)


RowsByLayer = Mapping[int, LayerRows]
Settling = Mapping[int, Int64Array]  # expert ids by layer
NO_EXPERTS: Int64Array = np.empty(0, np.int64)


def direct_gradient(model: Transformer, lesson: Lesson) -> torch.Tensor:
    """G (T, H) of direct credit, computed once for all that learn from the lesson, and with it its neighbours'.

    The head is read once for the step's lessons of an endpoint, which learn alike.
    """
    if lesson.gradient is None:
        alike = [e for e in lesson.beside if e.sequence.endpoint == lesson.sequence.endpoint] or [lesson]
        hidden = torch.cat([each.hidden for each in alike])
        gradients = loss_gradient(model, hidden, torch.cat([each.targets for each in alike]))
        for each, rows in zip(alike, gradients.split([len(a.targets) for a in alike]), strict=True):
            each.gradient, each.beside = rows, ()
    assert lesson.gradient is not None, lesson.sequence.sequence_id
    return lesson.gradient


class Crediting:
    """One endpoint's model, blocks and law, turning lessons into rows on the calling thread."""

    def __init__(
        self,
        model: Transformer,
        blocks: Mapping[int, ExpertBlock],
        plastic_layers: frozenset[int],
        gravity: GravityConfig,
    ):
        self._model, self._blocks, self._gravity = model, blocks, gravity
        self._pass = PlasticPass(model, blocks, plastic_layers)
        self._pasts: WeakKeyDictionary[Sequence, UpperPast] = WeakKeyDictionary()

    def rows(self, lesson: Lesson, reward: float, settling: Settling) -> RowsByLayer:
        """Rows of the lesson's tokens that have a target. `settling`: experts that look for an address, by layer."""
        rule = self._gravity.rule
        if rule == "literal":
            gradients: Mapping[int, torch.Tensor] = {}
        elif rule == "direct":
            gradients = dict.fromkeys(lesson.trace.by_layer, direct_gradient(self._model, lesson))
        else:
            gradients = self._true_gradients(lesson)
        return {
            layer: self._layer_rows(layer, lesson, gradients.get(layer), reward, settling)
            for layer in lesson.trace.by_layer
            if layer in self._pass.plastic_layers
        }

    def _true_gradients(self, lesson: Lesson) -> Mapping[int, torch.Tensor]:
        """Every plastic layer's G, through the layers above; earlier chunks of the prompt as constants.

        Raises LessonOutOfTurn when an earlier chunk is missing.
        """
        past = self._pasts.setdefault(lesson.sequence, UpperPast())
        if past.length != lesson.start:
            raise LessonOutOfTurn
        count, entry = len(lesson.targets), lesson.trace.entry
        assert entry is not None, "a plastic layer leaves the stream that enters it"
        device = entry.device
        result = self._pass.run(
            entry[None, :count],
            lesson.targets[None].to(device),
            {layer: _tensor(lesson.keys.keys_of(layer), device) for layer in self._plastic_and_above()},
            past=past,
            credit="gradient",
            offsets=lesson.offsets,
            visible_ids=self._visible_ids(lesson, device),
            # Clones: autograd takes no tensor that was made in inference mode.
            forced={layer: t.expert_ids[None, :count].clone() for layer, t in lesson.trace.by_layer.items()},
        )
        return result.gradients

    def _visible_ids(self, lesson: Lesson, device: torch.device) -> Mapping[int, torch.Tensor]:
        """Of the layers where the lesson's keys hide experts."""
        shown = {layer: lesson.keys.visible_ids(layer) for layer in self._plastic_and_above()}
        return {layer: torch.from_numpy(ids).to(device) for layer, ids in shown.items() if ids is not None}

    def _plastic_and_above(self) -> list[int]:
        return [
            layer
            for layer, block in self._blocks.items()
            if isinstance(block, SomeBlock) and layer >= self._pass.first
        ]

    def _layer_rows(
        self, layer: int, lesson: Lesson, gradient: torch.Tensor | None, reward: float, settling: Settling
    ) -> LayerRows:
        trace = lesson.trace.by_layer[layer]
        if gradient is None:
            return plain_rows(trace, len(lesson.targets), reward)
        block = self._blocks[layer]
        assert isinstance(block, SomeBlock), layer
        visible = lesson.keys.visible_ids(layer)
        return credited_rows(
            block,
            _tensor(lesson.keys.keys_of(layer), gradient.device),
            trace,
            gradient,
            self._gravity.credit_candidates,
            reward=reward,
            visible_ids=None if visible is None else torch.from_numpy(visible).to(gradient.device),
            settling_ids=settling.get(layer, NO_EXPERTS),
            offsets=None if lesson.offsets is None else lesson.offsets.get(layer),
            dtype=self._model.dtype,
        )


def plain_rows(trace: LayerTrace, tokens: int, reward: float = 1.0) -> LayerRows:
    """Selections without credit, for the literal rule."""
    return LayerRows(
        # Copies: a view of these rows would keep the whole step's in memory.
        trace.expert_ids[:tokens].numpy(force=True).copy(),
        trace.queries[:tokens].numpy(force=True).copy(),
        np.empty((tokens, 0), np.int64),
        np.empty((tokens, 0), np.float32),
        np.full(tokens, reward, np.float32),
        NO_EXPERTS,
        np.empty((tokens, 0), np.float32),
    )


def credited_rows(
    block: SomeBlock,
    keys: torch.Tensor,
    trace: LayerTrace,
    gradient: torch.Tensor,
    candidates: int,
    *,
    reward: float = 1.0,
    visible_ids: torch.Tensor | None = None,
    settling_ids: Int64Array | None = None,
    offsets: torch.Tensor | None = None,
    dtype: torch.dtype = torch.float32,
) -> LayerRows:
    """Credit of the leading tokens that `gradient` (T, H) is for, and the utility of settling experts, if any."""
    credit = expert_credit(block, keys, trace, gradient, candidates, visible_ids, offsets, dtype)
    rows = replace(
        plain_rows(trace, len(gradient), reward),
        candidate_ids=credit.expert_ids.numpy(force=True),
        credit=credit.values.numpy(force=True),
    )
    if settling_ids is None or not len(settling_ids):
        return rows
    ids = torch.from_numpy(settling_ids).to(gradient.device)
    utility = expert_utility(block, trace, gradient, ids, dtype)
    return replace(rows, settling_ids=settling_ids, utility=utility.numpy(force=True))


class LessonOutOfTurn(Exception):
    """An earlier chunk of the same prompt was dropped, so this one has no past to be computed behind."""


def _tensor(array: Float32Array, device: torch.device) -> torch.Tensor:
    return torch.tensor(array, device=device)
