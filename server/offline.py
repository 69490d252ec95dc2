"""What `libration train` and `libration evaluate` do: data, model and blocks brought together without a server."""

import json
import os
from dataclasses import asdict
from pathlib import Path

import click
import torch

from model.blocks.base import BlockConfig
from model.checkpoints.blocks import load_blocks, shipped_folder
from model.checkpoints.load import BaseModel, find_base_file, load_base
from model.training.chat import conversations
from model.training.data import build, load, save
from model.training.evaluate import summarize, window_losses
from model.training.loop import TrainingConfig, train

MEASURING_TOKENS = {"validation": 8_192, "heldout": 24_576}
CHAT_MEASURING_TOKENS = 6_144
SOME_BLOCKS = BlockConfig(
    kind="some",
    layers=(17, 21, 25, 29),
    hidden_size=576,
    num_experts=64,
    num_experts_per_tok=4,
    expert_size=24,
    key_size=128,
    rms_norm_eps=1e-5,
)


def train_variant(
    variant: str,
    run: Path,
    data: Path,
    data_dir: Path,
    *,
    initial: Path | None,
    tokens_per_domain: int,
    chat_tokens: int,
    epochs: int,
    learning_rate: float,
    threads: int,
) -> None:
    """Train fresh blocks or those in `initial`, or resume `run`; the result is `run/blocks`."""
    assert variant == SOME_BLOCKS.kind, variant
    base = _open_base(data_dir, threads)
    build(data, base.tokenizer, {"train": tokens_per_domain})
    _build_chat(base, data, "train", chat_tokens)
    start = load_blocks(initial, SOME_BLOCKS.hidden_size)[1] if initial else None
    config = TrainingConfig(epochs=epochs, learning_rate=learning_rate)
    train(base.transformer, SOME_BLOCKS, config, load(data, "train"), run, data / "lower", start)
    click.echo(f"trained blocks are in {run / 'blocks'}")


def evaluate_some(
    data: Path, blocks: Path | None, data_dir: Path, *, split: str, threads: int, as_json: bool
) -> None:
    """Print the loss of every domain with and without the blocks."""
    base = _open_base(data_dir, threads)
    build(data, base.tokenizer, {split: MEASURING_TOKENS[split]})
    if split == "heldout":
        _build_chat(base, data, split, CHAT_MEASURING_TOKENS)
    _, loaded = load_blocks(blocks or shipped_folder("some"), base.transformer.config.hidden_size)
    windows = load(data, split)
    losses = window_losses(base.transformer, {"dense": {}, "some": loaded}, windows)
    results = [summarize(losses["dense"][d], losses["some"][d], windows[d]) for d in windows]
    if as_json:
        click.echo(json.dumps([asdict(result) for result in results]))
        return
    click.echo(
        "| domain | dense | some | change (95 % interval) | tokens | files |\n|---|---|---|---|---|---|"
    )
    for result in results:
        low, high = result.change_interval
        click.echo(
            f"| {result.domain} | {losses['dense'][result.domain].mean():.3f} | {result.loss:.3f} "
            f"| {result.change:+.1f} % ({low:+.1f} to {high:+.1f}) | {result.tokens} | {result.files} |"
        )


def _build_chat(base: BaseModel, data: Path, split: str, tokens: int) -> None:
    if tokens and not (data / f"chat-{split}.npz").is_file():
        save(data, split, conversations(base.transformer, base.tokenizer, split, tokens))


def _open_base(data_dir: Path, threads: int) -> BaseModel:
    torch.set_num_threads(threads or len(os.sched_getaffinity(0)))
    return load_base(find_base_file(), torch.bfloat16, data_dir / "cache")
