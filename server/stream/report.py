"""What a stream told, as a table and a picture."""

from dataclasses import dataclass
from pathlib import Path

import matplotlib as mpl
import numpy as np

mpl.use("Agg")
import matplotlib.pyplot as plt

SMOOTHED_WINDOWS = 8  # of the plot's running mean
INTERVAL_RESAMPLES = 2000


@dataclass(frozen=True, slots=True)
class RuleReport:
    """One rule on the whole stream."""

    name: str
    losses: list[float]  # mean of every window, nats
    held_out_loss: float  # on other text, under the keys that the rule ended with
    drift: float  # the furthest key, relative to its anchor's length
    effective_rank: float  # of the keys
    load_entropy: float  # 1: every expert equally used


@dataclass(frozen=True, slots=True)
class StreamReport:
    """All rules on the same windows; the first is the frozen model."""

    text: str
    endpoint: str
    window: int
    tokens: int
    files: int
    rules: list[RuleReport]

    def gain(self, rule: RuleReport) -> tuple[float, float, float]:
        """Percent of the frozen loss saved, with a 95 % bootstrap interval over windows."""
        frozen, mine = np.array(self.rules[0].losses), np.array(rule.losses)
        picks = np.random.default_rng(0).integers(len(mine), size=(INTERVAL_RESAMPLES, len(mine)))
        resampled = 100 * (1 - mine[picks].sum(1) / frozen[picks].sum(1))
        low, high = np.percentile(resampled, [2.5, 97.5])
        return float(100 * (1 - mine.sum() / frozen.sum())), float(low), float(high)

    def forgotten(self, rule: RuleReport) -> float:
        """Percent that the loss on other text rose by."""
        return 100 * (rule.held_out_loss / self.rules[0].held_out_loss - 1)


def markdown(report: StreamReport) -> str:
    """A table for people."""
    lines = [
        f"{report.tokens:,} tokens of {report.files} files in windows of {report.window}, endpoint {report.endpoint}",
        "",
        "| rule | loss (nats) | saved against frozen (95 % interval) | other text's loss | furthest key | effective rank"
        " | load entropy |",
        "|---|---|---|---|---|---|---|",
    ]
    for rule in report.rules:
        gain, low, high = report.gain(rule)
        lines.append(
            f"| {rule.name} | {np.mean(rule.losses):.4f} | {gain:+.2f} % ({low:+.2f} to {high:+.2f}) "
            f"| {report.forgotten(rule):+.3f} % | {rule.drift:.3f} | {rule.effective_rank:.1f} | {rule.load_entropy:.3f} |"
        )
    return "\n".join(lines)


def draw(report: StreamReport, path: Path) -> None:
    """Saved loss along the stream, smoothed."""
    figure, axis = plt.subplots(figsize=(9, 4))
    frozen = np.array(report.rules[0].losses)
    seen = report.window * np.arange(1, len(frozen) + 1)
    kernel = np.ones(min(SMOOTHED_WINDOWS, len(frozen)))
    for rule in report.rules[1:]:
        saved = np.convolve(frozen - np.array(rule.losses), kernel, "same") / np.convolve(
            frozen, kernel, "same"
        )
        axis.plot(seen, 100 * saved, label=rule.name)
    axis.axhline(0, color="grey", linewidth=0.5)
    axis.set(xlabel="tokens", ylabel="loss saved, %", title=f"{report.endpoint} on {report.text}")
    axis.legend()
    figure.tight_layout()
    figure.savefig(path, dpi=120)
    plt.close(figure)
