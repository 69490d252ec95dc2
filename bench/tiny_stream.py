"""The prequential loop: test a window with the keys it begins with, then learn from it.

Rules that need the same passes read the same windows side by side. R rules, L tokens of a window, K experts per token,
M experts, D key size, V vocabulary.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from tiny_model import Routed, TinyModel
from tiny_rules import BACKWARD, Learner, Rule
from torch import Tensor
from tqdm import tqdm


@dataclass(frozen=True, slots=True)
class StreamResult:
    """What every rule did with one stream of N sessions; rules in the order given."""

    losses: NDArray[np.float64]  # (R, N) mean of each session
    heldout: NDArray[
        np.float64
    ]  # (R, W) mean of each held-out context, with the keys at the end of the stream
    effective_rank: NDArray[np.float64]  # (R) of those keys, mean of the layers


def stream(
    model: TinyModel, rules: Sequence[Rule], sessions: Tensor, heldout: Tensor, seed: int, bar: tqdm
) -> StreamResult:
    """sessions (N, S + 1), heldout (W, C + 1). `bar` counts sessions of each rule. What a session learned ends with it."""
    losses = np.zeros((len(rules), len(sessions)))
    original = np.zeros((len(rules), len(heldout)))
    rank = np.zeros(len(rules))
    frozen = heldout_losses(model, model.anchors(), heldout)
    for rows in passes(rules):
        reader = Reader(model, [rules[row] for row in rows], seed)
        for number, session in enumerate(sessions):
            losses[rows, number] = reader.read_session(session).mean(1)
            bar.update(len(rows))
        for row, learner in zip(rows, reader.learners, strict=True):
            rank[row] = np.mean([effective_rank(each) for each in learner.keys])
            moved = learner.rule.law is not None and not learner.rule.per_session
            keys = [torch.from_numpy(each).unsqueeze(0) for each in learner.keys]
            original[row] = heldout_losses(model, keys, heldout) if moved else frozen
    return StreamResult(losses, original, rank)


def passes(rules: Sequence[Rule]) -> list[list[int]]:
    """Rows of rules that can share a pass: of one window, dear ones apart from cheap ones."""
    rows: dict[tuple[int, bool, bool], list[int]] = {}
    for row, rule in enumerate(rules):
        plain = rule.signal == "none" and not rule.bias_rate
        rows.setdefault((rule.window, rule.signal in BACKWARD, plain), []).append(row)
    return list(rows.values())


@dataclass(frozen=True, slots=True)
class Pass:
    """What the rules made of one window."""

    hidden: Tensor  # (B, T, H) before the final norm
    routed: list[Routed]
    nudges: list[Tensor]  # (R, L, K) zeros added to the selected scores, to take the gradient at
    logits: Tensor  # (R, L, V)
    losses: Tensor  # (R, L)


class Reader:
    """A model and some rules that need the same passes, reading one text together."""

    def __init__(self, model: TinyModel, rules: Sequence[Rule], seed: int):
        self.model, self.rules = model, rules
        anchors = [layer.anchors.numpy() for layer in model.layers]
        self.biases = torch.zeros(len(rules), 1, model.config.vocabulary)
        self.learners = [Learner(rule, anchors, self.biases[row, 0]) for row, rule in enumerate(rules)]
        self.generator = torch.Generator().manual_seed(seed)
        self.backward = any(rule.signal in BACKWARD for rule in rules)
        self.learns_from_credit = any(rule.signal != "none" for rule in rules)

    def read_session(self, tokens: Tensor) -> NDArray[np.float64]:
        """Test and learn window by window: tokens (S + 1) -> loss of each rule and token (R, S)."""
        for learner in self.learners:
            if learner.rule.per_session:
                learner.reset()
        context, window = self.model.config.context, self.rules[0].window
        losses = []
        for first in range(0, len(tokens) - 1, window):
            piece = tokens[first : first + window + 1]
            losses.append(self._window(piece[:-1].view(-1, context), piece[1:].view(-1, context)))
        return np.concatenate(losses, axis=1)

    def keys(self) -> list[Tensor]:
        """(R, M, D) per layer."""
        layers = range(self.model.config.layers)
        return [torch.from_numpy(np.stack([each.keys[i] for each in self.learners])) for i in layers]

    def _window(self, tokens: Tensor, targets: Tensor) -> NDArray[np.float64]:
        """tokens and targets (B, T) of one rule -> losses (R, B T)."""
        rules, config = len(self.rules), self.model.config
        nudges: list[Tensor] = []
        if self.backward:
            shape = (rules, targets.numel(), config.num_experts_per_tok)
            nudges = [torch.zeros(shape, requires_grad=True) for _ in self.model.layers]
        hidden, routed = self.model(tokens.repeat(rules, 1), self._keys(), nudges)
        if self.learns_from_credit and not self.backward:
            hidden.requires_grad_()
        logits = self.model.logits(hidden).view(rules, -1, config.vocabulary)
        if any(rule.bias_rate for rule in self.rules):
            logits = logits + self.biases
        losses = _losses(logits, targets.flatten().expand(rules, -1))
        self._learn(Pass(hidden, routed, nudges, logits, losses), targets.flatten())
        return losses.detach().double().numpy()

    def _keys(self) -> list[Tensor]:
        """(R, M, D) per layer."""
        layers = range(self.model.config.layers)
        return [torch.from_numpy(np.stack([each.keys[i] for each in self.learners])) for i in layers]

    def _learn(self, seen: Pass, targets: Tensor) -> None:
        earned = self._credit(seen)
        for row, learner in enumerate(self.learners):
            if learner.rule.law is not None:
                for layer, each in enumerate(seen.routed):
                    learner.learn(layer, each, row, earned[layer][row] if earned else None)
                learner.tokens += len(targets)
            if learner.rule.bias_rate:
                missed = F.one_hot(targets, self.biases.shape[-1]) - seen.logits[row].detach().softmax(-1)
                learner.bias += learner.rule.bias_rate * missed.sum(0)

    def _credit(self, seen: Pass) -> list[Tensor]:
        """Raw credit of the selected experts (R, L, K) per layer; empty when no rule asks for it."""
        if self.backward:
            return self._gradient_credit(seen)
        if not self.learns_from_credit:
            return []
        (gradient,) = torch.autograd.grad(seen.losses.sum(), seen.hidden)
        gradient = gradient.view(len(self.rules), -1, 1, gradient.shape[-1])
        earned = [-each.gates * (each.deviations * gradient).sum(-1) for each in seen.routed]
        for row, rule in enumerate(self.rules):
            for each in earned:
                if rule.signal == "shuffled":
                    order = torch.randperm(each[row].numel(), generator=self.generator)
                    each[row] = each[row].flatten()[order].view_as(each[row])
                elif rule.signal == "advantage":
                    losses = seen.losses[row].detach()
                    each[row] = (losses.mean() - losses).unsqueeze(-1)
        return earned

    def _gradient_credit(self, seen: Pass) -> list[Tensor]:
        """-d loss / d score, the loss being that of the text, or of tokens drawn from the model."""
        own = torch.tensor([rule.signal == "own samples" for rule in self.rules])
        losses = seen.losses
        if own.any():
            chances = seen.logits.detach().softmax(-1)
            drawn = torch.multinomial(chances.flatten(0, 1), 1, generator=self.generator).view_as(losses)
            losses = torch.where(own.unsqueeze(1), _losses(seen.logits, drawn), losses)
        return [-each for each in torch.autograd.grad(losses.sum(), seen.nudges)]


@torch.inference_mode()
def heldout_losses(model: TinyModel, keys: Sequence[Tensor], contexts: Tensor) -> NDArray[np.float64]:
    """Mean loss of each context (W)."""
    made = []
    for batch in contexts.split(32):
        hidden, _ = model(batch[:, :-1], keys)
        made.append(_losses(model.logits(hidden), batch[:, 1:]).mean(1).double().numpy())
    return np.concatenate(made)


def effective_rank(keys: NDArray[np.float32]) -> float:
    """exp of the entropy of the normalised singular values (Roy and Vetterli 2007)."""
    values = np.linalg.svd(keys.astype(np.float64), compute_uv=False)
    shares = values[values > 0] / values.sum()
    return float(np.exp(-(shares * np.log(shares)).sum()))


def _losses(logits: Tensor, targets: Tensor) -> Tensor:
    """(R, L, V), (R, L) -> (R, L)."""
    return F.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="none").view_as(targets)
