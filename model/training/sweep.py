"""A learning rate for a variant: short runs at each candidate, judged on the validation split."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import torch

from model.blocks.base import BlockConfig
from model.training.data import WindowSet
from model.training.evaluate import window_losses
from model.training.loop import TrainingConfig, train
from model.transformer import Transformer

WINDOWS_PER_DOMAIN = 4  # candidates are compared on the same windows, so few tell them apart


def choose_learning_rate(
    model: Transformer,
    block_config: BlockConfig,
    config: TrainingConfig,
    rates: Sequence[float],
    windows: Mapping[str, WindowSet],
    validation: Mapping[str, WindowSet],
    run: Path,
    cache: Path,
) -> float:
    """The rate with the lowest validation loss, domains weighted alike; `run/sweep.json` keeps every figure.

    Each candidate trains `config.max_steps` steps with a schedule of its own. Interrupted, it goes on where it was.
    """
    result = run / "sweep.json"
    few = {domain: _spread(windows) for domain, windows in validation.items()}
    known: dict[str, dict[str, float]] = json.loads(result.read_text()) if result.is_file() else {}
    for rate in rates:
        if f"{rate:g}" in known:
            continue
        blocks = train(
            model, block_config, replace(config, learning_rate=rate), windows, run / f"sweep-{rate:g}", cache
        )
        with torch.no_grad():
            losses = window_losses(model, {"trained": blocks}, few)["trained"]
        known[f"{rate:g}"] = {domain: float(each.mean()) for domain, each in losses.items()}
        result.write_text(json.dumps(known, indent=1))
    return min(rates, key=lambda rate: sum(known[f"{rate:g}"].values()))


def _spread(windows: WindowSet) -> WindowSet:
    step = max(1, len(windows) // WINDOWS_PER_DOMAIN)
    return WindowSet(windows.domain, windows.tokens[::step], windows.file_index[::step])
