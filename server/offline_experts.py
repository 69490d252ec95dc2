"""What `libration train experts` does: a person's text, the base and its blocks brought together."""

import shutil
from dataclasses import dataclass
from pathlib import Path

import click

from model.blocks.some import SomeBlock
from model.checkpoints.blocks import load_blocks, shipped_folder
from model.checkpoints.experts import write_experts
from model.errors import CheckpointError, UnsupportedConfig
from model.training.new_experts import train_experts
from server import offline


@dataclass(frozen=True, slots=True)
class ExpertsJob:
    """What one `libration train experts` is asked for."""

    domain: Path
    out: Path
    count: int
    blocks: Path | None
    layers: tuple[int, ...]  # empty: the upper half of those that have blocks
    steps: int | None
    learning_rate: float
    with_keys: bool
    run: Path | None
    seed: int


def train_new_experts(job: ExpertsJob, data_dir: Path, device: str, threads: int) -> None:
    """Train or go on, print the held-out loss without and with the new experts, write the file."""
    base = offline.open_base(data_dir, device, threads)
    model = base.transformer
    path = job.blocks or shipped_folder("some")
    folder = load_blocks(path, model.config.hidden_size)
    blocks = {layer: b.to(model.device) for layer, b in folder.blocks.items() if isinstance(b, SomeBlock)}
    if not blocks:
        raise CheckpointError(f"{path} holds blocks of kind {folder.config.kind!r}; allowed: 'some'")
    layers = job.layers or folder.config.layers[len(folder.config.layers) // 2 :]
    if unknown := sorted(set(layers) - blocks.keys()):
        raise UnsupportedConfig(f"--layer {unknown} has no block; allowed: {list(blocks)}")
    text = offline.read_own_text(job.domain, base)
    config = offline.own_text_training(job.steps, job.learning_rate, job.seed)
    run = job.run or job.out.with_name(f"{job.out.name}.run")
    trained = train_experts(model, blocks, tuple(layers), job.count, config, text.train, text.heldout, run)
    write_experts(job.out, trained.matrices, trained.keys if job.with_keys else {})
    if job.run is None:
        shutil.rmtree(run)
    change = 100 * (trained.loss_after / trained.loss_before - 1)
    click.echo(
        f"held-out loss {trained.loss_before:.4f} -> {trained.loss_after:.4f} nats ({change:+.1f} %);"
        f" {job.count} experts for each of layers {', '.join(map(str, layers))} are in {job.out}"
    )
