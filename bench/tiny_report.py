"""Gains and forgetting with their intervals, as a table and as a picture.

S seeds, R rules (the first is frozen), N sessions, W held-out contexts.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from numpy.typing import NDArray

DRAWS = 5_000
Interval = tuple[float, float]


@dataclass(frozen=True, slots=True)
class RuleResult:
    """One rule on one stream. Percentages against frozen keys on the same windows, mean of the seeds' losses."""

    rule: str
    loss: float  # nats per token of the stream
    gain: float  # % lower loss on the stream
    gain_interval: Interval  # 95 %, over files
    sessions_improved: int
    sessions: int  # of all seeds
    forgetting: float  # % higher loss on the original mixture, with the keys at the end of the stream
    forgetting_interval: Interval  # 95 %, over files
    effective_rank: float  # of those keys


def summarize(
    names: Sequence[str],
    losses: NDArray[np.float64],
    heldout: NDArray[np.float64],
    heldout_files: NDArray[np.int64],
    effective_rank: NDArray[np.float64],
) -> list[RuleResult]:
    """losses (S, R, N), heldout (S, R, W), heldout_files (W), effective_rank (S, R)."""
    by_session = losses.mean(0)  # (R, N): the seeds read the same files
    files = np.unique(heldout_files)
    by_file = np.stack([heldout[:, :, heldout_files == file].sum(-1).mean(0) for file in files], axis=1)
    return [
        RuleResult(
            rule=name,
            loss=float(by_session[row].mean()),
            gain=0.0 - change(by_session[row], by_session[0]),
            gain_interval=_negated(interval(by_session[row], by_session[0])),
            sessions_improved=int((losses[:, row] < losses[:, 0]).sum()),
            sessions=losses[:, row].size,
            forgetting=change(by_file[row], by_file[0]),
            forgetting_interval=interval(by_file[row], by_file[0]),
            effective_rank=float(effective_rank[:, row].mean()),
        )
        for row, name in enumerate(names)
    ]


def change(mine: NDArray[np.float64], reference: NDArray[np.float64]) -> float:
    """How much higher the summed loss is, in %."""
    return float(100.0 * (mine.sum() / reference.sum() - 1.0))


def interval(mine: NDArray[np.float64], reference: NDArray[np.float64]) -> Interval:
    """95 % of `change` over paired samples drawn with replacement."""
    rows = np.random.default_rng(0).integers(len(mine), size=(DRAWS, len(mine)))
    changes = 100.0 * (mine[rows].sum(1) / reference[rows].sum(1) - 1.0)
    low, high = np.percentile(changes, [2.5, 97.5]).tolist()
    return low, high


def table(results: Mapping[str, Sequence[RuleResult]]) -> str:
    """Markdown, a row per rule and three columns per stream."""
    header = "".join(f" {name}: gain, % | sessions | forget, % |" for name in results)
    lines = [f"| rule |{header} effective rank |", "|---" * (2 + 3 * len(results)) + "|"]
    for row in zip(*results.values(), strict=True):
        cells = [
            f"{each.gain:+.2f} ({each.gain_interval[0]:+.2f} to {each.gain_interval[1]:+.2f})"
            f" | {each.sessions_improved}/{each.sessions} | {each.forgetting:+.2f}"
            for each in row
        ]
        rank = np.mean([each.effective_rank for each in row])
        lines.append(f"| {row[0].rule} | {' | '.join(cells)} | {rank:.0f} |")
    return "\n".join(lines)


def draw(results: Mapping[str, Sequence[RuleResult]], title: str, path: Path) -> None:
    """Gain on the left, forgetting on the right, a line per rule and a mark per stream."""
    rules = [each.rule for each in next(iter(results.values()))]
    figure = Figure(figsize=(11, 0.33 * len(rules) + 1.6), layout="constrained")
    left, right = figure.subplots(1, 2, sharey=True)
    for number, (name, rows) in enumerate(results.items()):
        at = np.arange(len(rows)) + 0.22 * (number - (len(results) - 1) / 2)
        _marks(left, at, [each.gain for each in rows], [each.gain_interval for each in rows], name)
        forgotten = [each.forgetting_interval for each in rows]
        _marks(right, at, [each.forgetting for each in rows], forgotten, name)
    left.set_yticks(range(len(rules)), rules)
    left.invert_yaxis()
    left.set_xlabel("lower loss on the unseen stream, % (right is better)")
    right.set_xlabel("higher loss on the original mixture, % (right is worse)")
    left.legend(fontsize="small", loc="lower left")
    figure.suptitle(title, fontsize=11)
    FigureCanvasAgg(figure).print_png(path, metadata={"Software": None})


def _marks(
    axes: Axes, at: NDArray[np.float64], values: Sequence[float], intervals: Sequence[Interval], name: str
) -> None:
    low, high = np.array(intervals).T
    errors = np.maximum([np.array(values) - low, high - np.array(values)], 0.0)
    axes.errorbar(values, at, xerr=errors, marker="o", markersize=4, capsize=2, linestyle="none", label=name)
    axes.axvline(0, color="0.6", linewidth=0.8)
    axes.set_xscale("symlog", linthresh=1, linscale=0.8)
    ticks = [-20, -5, -1, 0, 1, 5, 20]
    axes.set_xticks(ticks, [f"{each:+d}" if each else "0" for each in ticks])
    axes.grid(axis="x", color="0.92", linewidth=0.8)
    axes.set_axisbelow(True)


def _negated(each: Interval) -> Interval:
    return 0.0 - each[1], 0.0 - each[0]  # not -0.0
