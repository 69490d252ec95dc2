"""What `libration train` and `libration evaluate` do: data, model and blocks brought together without a server."""

import json
import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import click
import torch

from model.checkpoints.blocks import BlockFolder, load_blocks, shipped_folder, shipped_variants
from model.checkpoints.load import BaseModel, find_base_file, load_base
from model.training.chat import conversations
from model.training.data import build, load, save
from model.training.evaluate import prompt_speeds, summarize, window_losses
from model.training.folder import FolderText, read_folder
from model.training.loop import TrainingConfig, train
from model.training.report import VariantReport, draw_curve, draw_losses, markdown_table
from model.training.sweep import choose_learning_rate
from model.training.variants import VARIANTS

MEASURING_TOKENS = {"validation": 8_192, "heldout": 12_288}
CHAT_MEASURING_TOKENS = 6_144
OWN_TEXT_EPOCHS = 3


@dataclass(frozen=True, slots=True)
class TrainingJob:
    """What one `libration train` is asked for. Paths are folders."""

    run: Path
    data: Path
    initial: Path | None
    learning_rates: tuple[float, ...]
    tokens_per_domain: int
    chat_tokens: int
    epochs: int
    steps: int | None
    sweep_steps: int
    seed: int


def train_variant(variant: str, job: TrainingJob, data_dir: Path, device: str, threads: int) -> None:
    """Choose a learning rate if several are given, then train or resume; the result is `run/blocks`."""
    base = open_base(data_dir, device, threads)
    build(job.data, base.tokenizer, {"train": job.tokens_per_domain})
    _build_chat(base, job.data, "train", job.chat_tokens)
    windows, cache = load(job.data, "train"), job.data / "lower"
    job.run.mkdir(parents=True, exist_ok=True)
    rate = job.learning_rates[0]
    if len(job.learning_rates) > 1:
        build(job.data, base.tokenizer, {"validation": MEASURING_TOKENS["validation"]})
        trained = {domain: each for domain, each in load(job.data, "validation").items() if domain in windows}
        short = TrainingConfig(max_steps=job.sweep_steps, warmup_steps=job.sweep_steps // 8, seed=job.seed)
        rate = choose_learning_rate(
            base.transformer,
            VARIANTS[variant],
            short,
            job.learning_rates,
            windows,
            trained,
            job.run,
            cache,
        )
        click.echo(f"learning rate {rate:g} had the lowest validation loss")
    config = TrainingConfig(learning_rate=rate, epochs=job.epochs, max_steps=job.steps, seed=job.seed)
    start = load_blocks(job.initial, VARIANTS[variant].hidden_size).blocks if job.initial else None
    train(base.transformer, VARIANTS[variant], config, windows, job.run, cache, start)
    draw_curve(job.run / "curve.jsonl", job.run / "curve.png", variant)
    click.echo(f"trained blocks are in {job.run / 'blocks'}")


def evaluate_blocks(
    data: Path,
    folders: Sequence[Path],
    data_dir: Path,
    *,
    every_variant: bool,
    split: str,
    out: Path | None,
    threads: int,
    device: str,
    as_json: bool,
) -> None:
    """Print the loss of every domain with and without each folder's blocks."""
    base = open_base(data_dir, device, threads)
    build(data, base.tokenizer, {split: MEASURING_TOKENS[split]})
    if split == "heldout":
        _build_chat(base, data, split, CHAT_MEASURING_TOKENS)
    measured = _blocks_to_measure(base, folders, every_variant=every_variant)
    windows = load(data, split)
    variants = {"dense": {}} | {name: folder.blocks for name, folder in measured.items()}
    losses = window_losses(base.transformer, variants, windows)
    speeds = prompt_speeds(base.transformer, variants, windows)
    reports = [
        VariantReport(
            name=name,
            parameters=sum(sum(p.numel() for p in block.parameters()) for block in blocks.values()),
            active_parameters=sum(block.active_parameters() for block in blocks.values()),
            prompt_tokens_per_s=speeds[name],
            domains=tuple(summarize(losses["dense"][d], losses[name][d], windows[d]) for d in windows),
        )
        for name, blocks in variants.items()
    ]
    described = json.dumps([asdict(report) for report in reports], indent=1)
    if out is not None:
        out.mkdir(parents=True, exist_ok=True)
        (out / "evaluation.json").write_text(described + "\n")
        draw_losses(reports, out / "evaluation.png")
    click.echo(described if as_json else markdown_table(reports))


def _blocks_to_measure(
    base: BaseModel, folders: Sequence[Path], *, every_variant: bool
) -> dict[str, BlockFolder]:
    hidden = base.transformer.config.hidden_size
    chosen = {name: shipped_folder(name) for name in shipped_variants()} if every_variant else {}
    chosen |= {folder.parent.name if folder.name == "blocks" else folder.name: folder for folder in folders}
    loaded = {name: load_blocks(folder, hidden) for name, folder in chosen.items()}
    for folder in loaded.values():
        for block in folder.blocks.values():
            block.to(base.transformer.device)
    return loaded


def _build_chat(base: BaseModel, data: Path, split: str, tokens: int) -> None:
    if tokens and not (data / f"chat-{split}.npz").is_file():
        save(data, split, conversations(base.transformer, base.tokenizer, split, tokens))


def read_own_text(folder: Path, base: BaseModel) -> FolderText:
    """A person's own text, and a line about it. Raises TrainingDataMissing."""
    text = read_folder(folder, base.tokenizer, base.transformer.config.eos_token_id)
    passed_over = f"; {text.passed_over} files are no UTF-8 text" if text.passed_over else ""
    click.echo(f"{len(text.train)} windows to train on, {len(text.heldout)} held out{passed_over}")
    return text


def own_text_training(steps: int | None, learning_rate: float, seed: int) -> TrainingConfig:
    """So many steps on a person's own text; None: until it was seen OWN_TEXT_EPOCHS times."""
    epochs = OWN_TEXT_EPOCHS if steps is None else steps
    return TrainingConfig(
        epochs=epochs, max_steps=steps, warmup_steps=5, learning_rate=learning_rate, seed=seed
    )


def open_base(data_dir: Path, device: str, threads: int) -> BaseModel:
    torch.set_num_threads(threads or len(os.sched_getaffinity(0)))
    return load_base(find_base_file(), torch.bfloat16, data_dir / "cache", device)
