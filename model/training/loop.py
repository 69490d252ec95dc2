"""Train the expert blocks of one variant on the frozen base: equal data, equal order, checkpoint and resume."""

import json
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from tqdm import tqdm

from model.blocks import build_block
from model.blocks.base import BlockConfig, ExpertBlock
from model.checkpoints.blocks import save_blocks
from model.training.data import WindowSet
from model.training.upper import LowerStates, upper_loss
from model.transformer import Transformer


@dataclass(frozen=True, slots=True)
class TrainingConfig:
    """How long and how fast to train. The order of windows depends on the seed alone."""

    epochs: int = 1
    windows_per_step: int = 2
    max_steps: int | None = None  # None: until every window has been seen `epochs` times
    learning_rate: float = 1e-3
    warmup_steps: int = 40
    final_rate_ratio: float = 0.1
    max_gradient_norm: float = 1.0
    checkpoint_every: int = 50
    seed: int = 2026


def train(
    model: Transformer,
    block_config: BlockConfig,
    config: TrainingConfig,
    windows: Mapping[str, WindowSet],
    run: Path,
    cache: Path,
    initial: Mapping[int, ExpertBlock] | None = None,
) -> dict[int, ExpertBlock]:
    """Train fresh blocks or `initial` ones, or go on where `run` left off.

    The loss curve is appended to `run/curve.jsonl`; the trained blocks are also left in `run/blocks`.
    """
    torch.manual_seed(config.seed)
    fresh = {layer: build_block(block_config) for layer in block_config.layers}
    blocks = {layer: b.to(model.device).requires_grad_() for layer, b in (initial or fresh).items()}
    fit(model, blocks, parameter_groups(blocks), config, windows, run, cache, f"train {block_config.kind}")
    save_blocks(run / "blocks", block_config, blocks, torch.bfloat16)
    return blocks


def fit(
    model: Transformer,
    blocks: Mapping[int, nn.Module],
    groups: list[dict[str, Any]],
    config: TrainingConfig,
    windows: Mapping[str, WindowSet],
    run: Path,
    cache: Path,
    title: str,
) -> None:
    """Train those parameters of `blocks` that learn; `groups` are all of them, each with its `rate_scale`.

    Goes on where `run` left off; the loss curve is appended to `run/curve.jsonl`.
    """
    parameters = {
        f"{layer}.{name}": parameter
        for layer, block in blocks.items()
        for name, parameter in block.named_parameters()
        if parameter.requires_grad
    }
    optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.95), weight_decay=0.0)
    tokens = torch.from_numpy(np.concatenate([w.tokens for w in windows.values()])).long()
    first = min(blocks)
    lower = LowerStates(model, tokens[:, :-1], first, cache)
    order = _order(len(tokens), config)
    steps = min(len(order) // config.windows_per_step, config.max_steps or len(order))
    run.mkdir(parents=True, exist_ok=True)
    (run / "training.json").write_text(json.dumps(asdict(config), indent=1))
    start = resume(run, parameters, optimizer)
    bar = tqdm(range(start, steps), initial=start, total=steps, desc=title, unit="step")
    with (run / "curve.jsonl").open("a") as curve:
        for step in bar:
            for group in optimizer.param_groups:
                group["lr"] = group["rate_scale"] * learning_rate(step, steps, config)
            batch = order[step * config.windows_per_step : (step + 1) * config.windows_per_step]
            targets = tokens[batch, 1:].to(model.device)
            losses, auxiliary = upper_loss(model, blocks, lower.of(batch), targets, first)
            loss = losses.mean()
            optimizer.zero_grad()
            (loss + auxiliary).backward()
            torch.nn.utils.clip_grad_norm_(parameters.values(), config.max_gradient_norm)
            optimizer.step()
            curve.write(json.dumps({"step": step, "loss": loss.item(), "auxiliary": auxiliary.item()}) + "\n")
            bar.set_postfix(loss=f"{loss.item():.3f}")
            if (step + 1) % config.checkpoint_every == 0 or step + 1 == steps:
                curve.flush()
                checkpoint(run, step + 1, parameters, optimizer)


def parameter_groups(blocks: Mapping[int, ExpertBlock]) -> list[dict[str, Any]]:
    """Parameters by how fast they learn."""
    by_scale: dict[float, list[Tensor]] = {}
    for block in blocks.values():
        for name, parameter in block.named_parameters():
            by_scale.setdefault(block.rate_scale.get(name, 1.0), []).append(parameter)
    return [{"params": parameters, "rate_scale": scale} for scale, parameters in by_scale.items()]


def learning_rate(step: int, steps: int, config: TrainingConfig) -> float:
    """Linear warm-up, then cosine to `final_rate_ratio` of the peak."""
    if step < config.warmup_steps:
        return config.learning_rate * (step + 1) / config.warmup_steps
    progress = (step - config.warmup_steps) / max(1, steps - config.warmup_steps)
    floor = config.final_rate_ratio
    return config.learning_rate * (floor + (1 - floor) * 0.5 * (1 + math.cos(math.pi * progress)))


def _order(count: int, config: TrainingConfig) -> Tensor:
    generator = torch.Generator().manual_seed(config.seed)
    return torch.cat([torch.randperm(count, generator=generator) for _ in range(config.epochs)])


def checkpoint(
    run: Path, step: int, parameters: Mapping[str, Tensor], optimizer: torch.optim.Optimizer
) -> None:
    tensors = {f"parameter.{name}": p.detach().contiguous() for name, p in parameters.items()}
    for name, parameter in parameters.items():
        state = optimizer.state[parameter]
        tensors |= {f"{part}.{name}": state[part].contiguous() for part in ("exp_avg", "exp_avg_sq")}
    partial = run / "checkpoint.partial"
    save_file(tensors, partial, metadata={"step": str(step)})
    partial.replace(run / "checkpoint.safetensors")
    (run / "step.json").write_text(json.dumps({"step": step}))


def resume(run: Path, parameters: Mapping[str, Tensor], optimizer: torch.optim.Optimizer) -> int:
    """Put back the last checkpoint, if there is one; returns the step to go on with."""
    path = run / "checkpoint.safetensors"
    if not path.is_file():
        return 0
    step = int(json.loads((run / "step.json").read_text())["step"])
    stored = load_file(path)
    for name, parameter in parameters.items():
        parameter.data.copy_(stored[f"parameter.{name}"])
        optimizer.state[parameter] = {
            "step": torch.tensor(float(step)),
            "exp_avg": stored[f"exp_avg.{name}"].to(parameter.device),
            "exp_avg_sq": stored[f"exp_avg_sq.{name}"].to(parameter.device),
        }
    return step
