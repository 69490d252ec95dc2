"""What training and evaluation show a person: tables for a README, pictures of curves and losses."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from model.training.evaluate import DomainResult

SMOOTHING_STEPS = 20


@dataclass(frozen=True, slots=True)
class VariantReport:
    """One row of the comparison; the base is a variant without parameters."""

    name: str
    parameters: int
    active_parameters: int
    prompt_tokens_per_s: float
    domains: tuple[DomainResult, ...]


def markdown_table(reports: Sequence[VariantReport]) -> str:
    """Losses in nats, variants side by side, with the 95 % interval of the change against the base."""
    names = [report.name for report in reports]
    lines = ["| domain | " + " | ".join(names) + " |", "|---" * (len(names) + 1) + "|"]
    for i, domain in enumerate(reports[0].domains):
        cells = [_cell(report.domains[i]) for report in reports]
        lines.append(
            f"| {domain.domain} ({domain.tokens} tokens, {domain.files} files) | {' | '.join(cells)} |"
        )
    for title, values in (
        ("parameters added, M", [f"{r.parameters / 1e6:.2f}" for r in reports]),
        ("of them active for a token, M", [f"{r.active_parameters / 1e6:.2f}" for r in reports]),
        ("prompt tokens/s", [f"{r.prompt_tokens_per_s:.0f}" for r in reports]),
    ):
        lines.append(f"| {title} | {' | '.join(values)} |")
    return "\n".join(lines)


def draw_losses(reports: Sequence[VariantReport], path: Path) -> None:
    """Change of the loss against the base, by domain and variant, with 95 % intervals."""
    shown = [report for report in reports if report.parameters]
    domains = [result.domain for result in reports[0].domains]
    figure = Figure(figsize=(1.5 + 1.1 * len(domains), 4.2))
    axes = figure.add_subplot()
    width = 0.8 / max(1, len(shown))
    for i, report in enumerate(shown):
        changes = np.array([result.change for result in report.domains])
        low, high = np.array([result.change_interval for result in report.domains]).T
        at = np.arange(len(domains)) + (i - (len(shown) - 1) / 2) * width
        axes.bar(at, changes, width, yerr=[changes - low, high - changes], label=report.name)
    axes.axhline(0, color="black", linewidth=0.8)
    axes.set_xticks(np.arange(len(domains)), domains, rotation=20)
    axes.set_ylabel("held-out loss against the base, %")
    axes.legend(ncols=3, fontsize="small")
    _save(figure, path)


def draw_curve(curve: Path, path: Path, title: str) -> None:
    """Training loss by step, raw and smoothed, from the lines of a `curve.jsonl`."""
    rows = [json.loads(line) for line in curve.read_text().splitlines()]
    by_step = {
        row["step"]: row["loss"] for row in rows
    }  # a resumed run repeats the steps after its checkpoint
    steps = np.array(sorted(by_step))
    losses = np.array([by_step[step] for step in steps.tolist()])
    figure = Figure(figsize=(7, 4))
    axes = figure.add_subplot()
    axes.plot(steps, losses, color="0.8", linewidth=0.7)
    if len(losses) >= SMOOTHING_STEPS:
        smooth = np.convolve(losses, np.full(SMOOTHING_STEPS, 1 / SMOOTHING_STEPS), mode="valid")
        axes.plot(steps[SMOOTHING_STEPS - 1 :], smooth)
    axes.set_xlabel("step")
    axes.set_ylabel("training loss, nats per token")
    axes.set_title(title)
    _save(figure, path)


def _cell(result: DomainResult) -> str:
    if result.change == 0 and result.change_interval == (0, 0):
        return f"{result.loss:.3f}"
    low, high = result.change_interval
    return f"{result.loss:.3f} ({low:+.1f} to {high:+.1f} %)"


def _save(figure: Figure, path: Path) -> None:
    figure.tight_layout()
    FigureCanvasAgg(figure).print_png(path)
