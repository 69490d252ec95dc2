"""What `libration adapt` does: a dense checkpoint and a person's text, and blocks of `some` trained between the two."""

import os
import shutil
from dataclasses import dataclass
from pathlib import Path

import click
import torch

from model.blocks.some import SomeConfig
from model.checkpoints.load import load_checkpoint
from model.config import ModelConfig
from model.errors import UnsupportedConfig
from model.training.evaluate import window_losses
from model.training.folder import WINDOW
from model.training.loop import train
from server import offline

MOST_LAYERS = 4  # that get blocks when none are named


@dataclass(frozen=True, slots=True)
class AdaptJob:
    """What one `libration adapt` is asked for."""

    model: Path
    text: Path
    out: Path
    layers: tuple[int, ...]  # empty: some of the upper half, the last one always
    experts: int
    per_token: int
    expert_size: int
    key_size: int
    steps: int | None
    learning_rate: float
    run: Path | None
    seed: int


def adapt(job: AdaptJob, data_dir: Path, device: str, threads: int) -> None:
    """Train or go on, print the held-out loss without and with the blocks, write their folder.

    Raises ModelError, TrainingDataMissing.
    """
    torch.set_num_threads(threads or len(os.sched_getaffinity(0)))
    base = load_checkpoint(job.model, torch.bfloat16, data_dir / "cache", device)
    model = base.transformer
    if base.blocks:
        raise UnsupportedConfig(f"{job.model} has experts of its own: serve it with `plastic = true`")
    if model.config.max_position_embeddings < WINDOW:
        raise UnsupportedConfig(
            f"{job.model} reads {model.config.max_position_embeddings} tokens at once; allowed: {WINDOW} or more"
        )
    config = _blocks_for(model.config, job)
    text = offline.read_own_text(job.text, base)
    training = offline.own_text_training(job.steps, job.learning_rate, job.seed)
    run = job.run or job.out.with_name(f"{job.out.name}.run")
    blocks = train(model, config, training, {text.train.domain: text.train}, run, run / "lower")
    losses = window_losses(model, {"without": {}, "with": blocks}, {text.heldout.domain: text.heldout})
    before, after = (float(losses[name][text.heldout.domain].mean()) for name in ("without", "with"))
    shutil.copytree(run / "blocks", job.out, dirs_exist_ok=True)
    if job.run is None:
        shutil.rmtree(run)
    click.echo(
        f"held-out loss {before:.4f} -> {after:.4f} nats ({100 * (after / before - 1):+.1f} %);"
        f" the blocks of layers {', '.join(map(str, config.layers))} are in {job.out}"
    )


def _blocks_for(model: ModelConfig, job: AdaptJob) -> SomeConfig:
    layers = tuple(sorted(set(job.layers))) or _upper_layers(model.num_hidden_layers)
    if layers[-1] >= model.num_hidden_layers:
        raise UnsupportedConfig(f"--layer {layers[-1]}: allowed are 0 to {model.num_hidden_layers - 1}")
    return SomeConfig(
        kind="some",
        layers=layers,
        hidden_size=model.hidden_size,
        num_experts=job.experts,
        num_experts_per_tok=job.per_token,
        expert_size=job.expert_size,
        key_size=job.key_size,
    )


def _upper_layers(count: int) -> tuple[int, ...]:
    """At most MOST_LAYERS of the upper half, evenly apart, down from the last."""
    chosen = min(MOST_LAYERS, max(1, count // 2))
    return tuple(sorted(count - 1 - i * (count // 2) // chosen for i in range(chosen)))
