"""Held-out loss per domain, with an interval over files."""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from tqdm import tqdm

from model.blocks.base import ExpertBlock
from model.training.data import WindowSet
from model.training.upper import lower_states, upper_loss
from model.transformer import Transformer

RESAMPLES = 2000


@dataclass(frozen=True, slots=True)
class DomainLoss:
    """Mean next-token loss in nats, its 95 % bootstrap interval over files, and what it was measured on."""

    domain: str
    mean: float
    low: float
    high: float
    tokens: int
    files: int


@torch.inference_mode()
def evaluate(
    model: Transformer,
    variants: Mapping[str, Mapping[int, ExpertBlock]],
    windows: Mapping[str, WindowSet],
    windows_per_step: int = 4,
) -> dict[str, dict[str, DomainLoss]]:
    """Losses by variant and domain; no blocks means the base. The layers below every block run once for all."""
    first = min((min(blocks) for blocks in variants.values() if blocks), default=0)
    results: dict[str, dict[str, DomainLoss]] = {name: {} for name in variants}
    total = sum(len(w) for w in windows.values())
    with tqdm(total=total, desc="evaluate", unit="window") as bar:
        for domain, window_set in windows.items():
            losses: dict[str, list[NDArray[np.float32]]] = {name: [] for name in variants}
            for start in range(0, len(window_set), windows_per_step):
                tokens = torch.from_numpy(window_set.tokens[start : start + windows_per_step]).long()
                shared = lower_states(model, tokens[:, :-1], first)
                for name, blocks in variants.items():
                    loss, _ = upper_loss(model, blocks, shared, tokens[:, 1:], first)
                    losses[name].append(loss.mean(1).numpy())
                bar.update(len(tokens))
            for name, parts in losses.items():
                results[name][domain] = summarize(domain, np.concatenate(parts), window_set)
    return results


def summarize(domain: str, losses: NDArray[np.float32], windows: WindowSet) -> DomainLoss:
    """Mean over windows (W), with a bootstrap interval that resamples files: windows of one file are alike."""
    files = np.unique(windows.file_index)
    sums = np.array([losses[windows.file_index == f].sum() for f in files])
    counts = np.array([(windows.file_index == f).sum() for f in files])
    picks = np.random.default_rng(0).integers(len(files), size=(RESAMPLES, len(files)))
    low, high = np.percentile(sums[picks].sum(1) / counts[picks].sum(1), [2.5, 97.5])
    tokens = len(losses) * (windows.tokens.shape[1] - 1)
    return DomainLoss(domain, float(losses.mean()), float(low), float(high), tokens, len(files))
