"""Does training *for* plasticity make moving keys and values pay?

    python bench/plastic_training.py --arm plastic   --out /tmp/plastic     (sessions simulated inside the loop)
    python bench/plastic_training.py --arm control   --out /tmp/plastic     (the same texts and steps, keys at rest)
    python bench/plastic_training.py --report        --out /tmp/plastic

Both arms start from the shipped `some` blocks and go on training the two upper ones (experts, queries, anchors) on
texts of 2,048 tokens from the training files, in the same order. In the plastic arm every text is a session: windows of
256 tokens, each read with the keys and value offsets that the windows before it led to, and the loss is that of the
session. The derivative goes through the updates (bench/plastic_law.py), with G and the choice of experts held.
Every EVALUATE_EVERY steps both are measured on sessions of the validation files, with the law of the server itself.
Interrupted runs go on at the last evaluation.
"""

import argparse
import json
import math
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import torch
from plastic_law import LayerState, learn
from plasticity import DIRECT, OFFSETS, TOP
from plasticity_report import curve_plot, curve_table
from plasticity_sessions import LENGTH, WINDOW, run_sessions
from plasticity_texts import SEED, TRAINED, Entered, Texts, shuffled
from platformdirs import user_data_path
from torch import Tensor
from tqdm import tqdm

from model.blocks.routing import switch_auxiliary_loss
from model.blocks.some import Mixture, SomeBlock
from model.checkpoints.blocks import load_blocks, save_blocks, shipped_folder
from model.checkpoints.load import find_base_file, load_base
from model.head import NextTokenLoss
from model.plastic_pass import PlasticPass, UpperPast
from model.training.loop import TrainingConfig, checkpoint, learning_rate, parameter_groups, resume
from model.training.upper import run_layers
from model.transformer import Transformer
from model.value_offsets import directions, head_metric
from server.stream.rules import FROZEN, StreamRule
from server.stream.text import Pieces

TEXTS_A_DOMAIN = 100
TEXTS_A_STEP = 1
EVALUATE_EVERY = 50
EVALUATED = {"german": 4, "spanish": 4, "javascript": 4}  # sessions of the validation files
RULES = [
    FROZEN,
    StreamRule("direct", DIRECT),
    StreamRule("value offsets", value_rate=OFFSETS),
    StreamRule("direct + offsets", DIRECT, value_rate=OFFSETS),
]
SCHEDULE = TrainingConfig(learning_rate=3e-4, warmup_steps=20, seed=SEED)


class Session:
    """The upper layers over B whole texts, each of them a session or each at the anchors."""

    def __init__(self, model: Transformer, blocks: Mapping[int, SomeBlock], *, plastic: bool):
        self._model, self._blocks, self._plastic = model, blocks, plastic
        self._pass = PlasticPass(model, blocks, frozenset(blocks))
        self._metric = head_metric(model.final_norm, model.head)

    def loss(self, entry: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        """entry (B, L, H), targets (B, L) -> losses (B, L) and the auxiliary loss, both differentiable."""
        lessons = self._first_reading(entry, targets) if self._plastic else []
        hidden, at = entry, min(self._blocks)
        auxiliary = torch.zeros(())
        for layer in sorted(self._blocks):
            hidden = run_layers(self._model, hidden, at + 1, layer + 1)
            contribution, balance = self._block(layer, hidden, lessons)
            hidden, auxiliary, at = hidden + contribution, auxiliary + balance, layer
        hidden = run_layers(self._model, hidden, at + 1, len(self._model.layers))
        head = (self._model.final_norm, self._model.config.rms_norm_eps, self._model.head)
        losses = NextTokenLoss.apply(hidden.flatten(0, 1), *head, targets.flatten())
        assert isinstance(losses, Tensor)
        return losses.view_as(targets), auxiliary

    def _first_reading(self, entry: Tensor, targets: Tensor) -> list[tuple[Tensor, Tensor]]:
        """Of every window, under the keys and offsets that the session had there: G, and its directions for offsets,
        both (B * T, H).
        """
        past = UpperPast()
        states = {layer: self._start(layer, len(entry)) for layer in self._blocks}
        lessons: list[tuple[Tensor, Tensor]] = []
        with torch.no_grad():
            for rows in windows():
                keys = {layer: state.keys for layer, state in states.items()}
                offsets = {layer: state.offsets for layer, state in states.items()}
                result = self._pass.run(
                    entry[:, rows], targets[:, rows], keys, past=past, credit="direct", offsets=offsets
                )
                gradient = next(iter(result.gradients.values()))
                lessons.append((gradient, directions(gradient, result.final.flatten(0, 1), self._metric)))
                for layer, block in self._blocks.items():
                    norms = result.outputs[layer].norm(dim=-1)
                    trace = result.traces[layer]
                    states[layer] = learn(states[layer], block, trace, *lessons[-1], norms, DIRECT, OFFSETS)
        return lessons

    def _start(self, layer: int, sessions: int) -> LayerState:
        return LayerState.at_anchors(self._blocks[layer], sessions)

    def _block(
        self, layer: int, hidden: Tensor, lessons: list[tuple[Tensor, Tensor]]
    ) -> tuple[Tensor, Tensor]:
        block = self._blocks[layer]
        if not self._plastic:
            mixture = block.mix(block.normed(hidden), block.anchors)
            return mixture.combined, _balance(mixture)
        state = self._start(layer, len(hidden))
        contributions: list[Tensor] = []
        balance = torch.zeros(())
        for rows, lesson in zip(windows(), lessons, strict=True):
            mixture = block.mix(block.normed(hidden[:, rows]), state.keys, state.offsets)
            contributions.append(mixture.combined)
            balance = balance + _balance(mixture) / len(lessons)
            norms = (hidden[:, rows] + mixture.combined).detach().norm(dim=-1)
            state = learn(state, block, mixture.trace, *lesson, norms, DIRECT, OFFSETS)
        return torch.cat(contributions, 1), balance


def windows() -> list[slice]:
    """The windows of a text."""
    return [slice(first, first + WINDOW) for first in range(0, LENGTH, WINDOW)]


def main() -> None:
    arguments = parse()
    torch.set_num_threads(arguments.threads)
    arguments.out.mkdir(parents=True, exist_ok=True)
    if arguments.report:
        curves = {
            arm: json.loads((arguments.out / f"{arm}.json").read_text()) for arm in ("control", "plastic")
        }
        print(curve_table(curves))
        curve_plot(curves, arguments.out / "plastic-training.png")
        return
    base = load_base(find_base_file(), torch.bfloat16, arguments.data_dir / "cache")
    folder = load_blocks(shipped_folder("some"), base.transformer.config.hidden_size)
    all_blocks: dict[int, SomeBlock] = {}
    for layer, block in folder.blocks.items():
        assert isinstance(block, SomeBlock), f"layer {layer} has no routing keys"
        all_blocks[layer] = block.requires_grad_(False)
    texts = Texts(base.transformer, base.tokenizer, all_blocks, min(TOP), arguments.cache)
    blocks = {layer: all_blocks[layer] for layer in sorted(TOP)}
    run = Run(arguments, base.transformer, blocks, texts)
    run.train()
    save_blocks(arguments.out / arguments.arm, folder.config, all_blocks, torch.bfloat16)


def parse() -> argparse.Namespace:
    made = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("--arm", choices=["plastic", "control"], default="plastic")
    made.add_argument(
        "--report", action="store_true", help="print the table of both arms and draw their curves"
    )
    made.add_argument("--steps", type=int, default=100, help="of one text each")
    made.add_argument("--out", type=Path, required=True)
    made.add_argument("--cache", type=Path, default=Path("data/plasticity"), help="lower layers' outputs")
    made.add_argument("--threads", type=int, default=1)
    made.add_argument(
        "--data-dir", type=Path, default=user_data_path("libration"), help="converted base weights"
    )
    return made.parse_args()


class Run:
    """One arm."""

    def __init__(
        self,
        arguments: argparse.Namespace,
        model: Transformer,
        blocks: Mapping[int, SomeBlock],
        texts: Texts,
    ):
        self._steps, self._model, self._blocks, self._texts = arguments.steps, model, blocks, texts
        self._session = Session(model, blocks, plastic=arguments.arm == "plastic")
        self._curve_path = arguments.out / f"{arguments.arm}.json"
        self._folder = arguments.out / f"{arguments.arm}-run"
        self._title = arguments.arm
        self._parameters = {
            f"{layer}.{name}": p for layer, block in blocks.items() for name, p in block.named_parameters()
        }
        self._optimizer = torch.optim.AdamW(parameter_groups(blocks), betas=(0.9, 0.95), weight_decay=0.0)
        self._curve: list[dict[str, object]] = []

    def train(self) -> None:
        entered = self._training_texts()
        start = self._resume()
        if not self._curve:
            self._evaluate(0, None)
        recent: list[float] = []
        for step in tqdm(
            range(start, self._steps), initial=start, total=self._steps, desc=self._title, unit="step"
        ):
            loss = self._step(step, entered)
            recent.append(loss)
            if (step + 1) % EVALUATE_EVERY == 0 or step + 1 == self._steps:
                self._evaluate(step + 1, float(np.mean(recent)))
                recent.clear()
                checkpoint(self._folder, step + 1, self._parameters, self._optimizer)

    def _step(self, step: int, entered: Entered) -> float:
        for group in self._optimizer.param_groups:
            group["lr"] = group["rate_scale"] * learning_rate(step, self._steps, SCHEDULE)
        first = step * TEXTS_A_STEP
        entry, targets = entered.batch((first + i) % len(entered.pieces) for i in range(TEXTS_A_STEP))
        for parameter in self._parameters.values():
            parameter.requires_grad_(True)
        losses, auxiliary = self._session.loss(entry.float(), targets)
        self._optimizer.zero_grad()
        (losses.mean() + auxiliary).backward()
        norm = torch.nn.utils.clip_grad_norm_(self._parameters.values(), SCHEDULE.max_gradient_norm)
        assert math.isfinite(norm), (step, norm)
        self._optimizer.step()
        for parameter in self._parameters.values():
            parameter.requires_grad_(False)
        return losses.mean().item()

    def _training_texts(self) -> Entered:
        """Texts of all trained domains in one random order."""
        parts = [
            self._texts.of(name, "training", LENGTH, TEXTS_A_DOMAIN, per_file=4).pieces for name in TRAINED
        ]
        tokens = np.concatenate([part.tokens for part in parts])
        joined = Pieces(tokens, np.zeros(len(tokens), np.int64), ())
        return self._texts.enter(shuffled(joined, SEED))

    def _evaluate(self, step: int, training_loss: float | None) -> None:
        by_domain = {
            name: run_sessions(
                self._model, self._blocks, self._texts, name, "tuning", LENGTH, RULES, count, batch=4
            )
            for name, count in EVALUATED.items()
        }
        self._curve.append(
            {
                "step": step,
                "training loss": training_loss,
                "losses": {
                    name: {rule: each.losses[rule].tolist() for rule in each.losses}
                    for name, each in by_domain.items()
                },
            }
        )
        self._curve_path.write_text(json.dumps(self._curve, indent=1) + "\n")

    def _resume(self) -> int:
        self._folder.mkdir(exist_ok=True)
        step = resume(self._folder, self._parameters, self._optimizer)
        if self._curve_path.exists():
            known = json.loads(self._curve_path.read_text())
            self._curve = [reading for reading in known if reading["step"] <= step]
        return step


def _balance(mixture: Mixture) -> Tensor:
    return switch_auxiliary_loss(mixture.all_scores.flatten(0, 1), mixture.trace.expert_ids)


if __name__ == "__main__":
    main()
