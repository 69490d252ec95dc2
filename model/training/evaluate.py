"""Held-out loss per domain, and how sure one can be of a difference."""

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
    variants: Mapping[str, Mapping[int, ExpertBlock]],
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
