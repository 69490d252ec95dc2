"""Held-out loss per domain, and how sure one can be of a difference."""

import itertools
import statistics
import time
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from tqdm import tqdm

from model.blocks.base import ExpertBlock, ExpertUsage
from model.keys import AnchorKeys
from model.kv_cache import CacheBudget
from model.training.data import WindowSet
from model.training.upper import BlockPass, lower_states, upper_loss
from model.transformer import Segment, Transformer, Variant

RESAMPLES = 2000
SPEED_ROUNDS = 5

WindowLosses = NDArray[np.float32]  # (windows,) mean next-token loss in nats


@dataclass(frozen=True, slots=True)
class DomainResult:
    """One variant on one domain: mean loss in nats, and its change against the base in percent.

    Both with 95 % bootstrap intervals that resample files, since windows of one file are alike; the change is
    paired, so that files being hard or easy cancels out.
    """

    domain: str
    loss: float
    loss_interval: tuple[float, float]
    change: float
    change_interval: tuple[float, float]
    tokens: int
    files: int


@torch.inference_mode()
def window_losses(
    model: Transformer,
    variants: Mapping[str, Mapping[int, BlockPass]],
    windows: Mapping[str, WindowSet],
    windows_per_step: int = 4,
) -> dict[str, dict[str, WindowLosses]]:
    """Losses by variant and domain; no blocks means the base. The layers below every block run once for all."""
    first = min((min(blocks) for blocks in variants.values() if blocks), default=0)
    losses: dict[str, dict[str, list[WindowLosses]]] = {name: {d: [] for d in windows} for name in variants}
    with tqdm(total=sum(map(len, windows.values())), desc="evaluate", unit="window") as bar:
        for domain, window_set in windows.items():
            for start in range(0, len(window_set), windows_per_step):
                tokens = torch.from_numpy(window_set.tokens[start : start + windows_per_step]).long()
                shared = lower_states(model, tokens[:, :-1].to(model.device), first)
                for name, blocks in variants.items():
                    loss, _ = upper_loss(model, blocks, shared, tokens[:, 1:].to(model.device), first)
                    losses[name][domain].append(loss.mean(1).cpu().numpy())
                bar.update(len(tokens))
    return {name: {d: np.concatenate(parts) for d, parts in by.items()} for name, by in losses.items()}


def prompt_speeds(
    model: Transformer, variants: Mapping[str, Mapping[int, ExpertBlock]], windows: Mapping[str, WindowSet]
) -> dict[str, float]:
    """Prompt tokens per second of each variant as it is served: medians over rounds, the variants in turn."""
    tokens = next(iter(windows.values())).tokens[0, :-1].tolist()
    served = {name: _served(blocks) for name, blocks in variants.items()}
    seconds: dict[str, list[float]] = {name: [] for name in variants}
    for _, (name, (variant, keys)) in itertools.product(range(SPEED_ROUNDS + 1), served.items()):
        cache = CacheBudget(model.config, len(tokens) + 64, model.dtype, model.device).reserve(len(tokens))
        started = time.perf_counter()
        model.step([Segment(tokens, 0, cache, variant, keys)]).cpu()
        seconds[name].append(time.perf_counter() - started)
    return {name: len(tokens) / statistics.median(each[1:]) for name, each in seconds.items()}


def _served(blocks: Mapping[int, ExpertBlock]) -> tuple[Variant | None, AnchorKeys | None]:
    if not blocks:
        return None, None
    anchors = {
        layer: block.get_parameter("anchors").detach().float().numpy(force=True)
        for layer, block in blocks.items()
        if block.config.kind == "some"
    }
    usage = ExpertUsage.of(next(iter(blocks.values())).config)
    return Variant(blocks, usage), AnchorKeys(anchors) if anchors else None


def summarize(base: WindowLosses, mine: WindowLosses, windows: WindowSet) -> DomainResult:
    """A variant's result on a domain, beside the base model's losses on the same windows."""
    files = np.unique(windows.file_index)
    of_file = windows.file_index[None, :] == files[:, None]  # (files, windows)
    picks = np.random.default_rng(0).integers(len(files), size=(RESAMPLES, len(files)))
    counts = of_file.sum(1)[picks].sum(1)
    base_sums, my_sums = ((of_file * losses).sum(1)[picks].sum(1) for losses in (base, mine))
    return DomainResult(
        domain=windows.domain,
        loss=float(mine.mean()),
        loss_interval=_middle(my_sums / counts),
        change=float(100 * (mine.mean() / base.mean() - 1)),
        change_interval=_middle(100 * (my_sums / base_sums - 1)),
        tokens=len(mine) * (windows.tokens.shape[1] - 1),
        files=len(files),
    )


def _middle(samples: NDArray[np.float64]) -> tuple[float, float]:
    low, high = np.percentile(samples, [2.5, 97.5])
    return float(low), float(high)
