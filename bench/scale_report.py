"""What bench/scale.py shows: a table and a picture of tokens per second against one size at a time."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import NullLocator


@dataclass(frozen=True, slots=True)
class Sweep:
    """Tokens per second of each row at each size."""

    title: str
    size: str  # what the columns count
    columns: Sequence[int]
    rates: dict[str, list[float]]  # row -> tokens/s, a column after another


def table(sweep: Sweep) -> str:
    """Markdown; in brackets the ratio to the first column."""
    header = " | ".join(f"{column:,}" for column in sweep.columns)
    lines = [
        f"**{sweep.title}**",
        "",
        f"| tok/s by {sweep.size} | {header} |",
        "|" + "---|" * (1 + len(sweep.columns)),
    ]
    for name, rates in sweep.rates.items():
        cells = [_shown(rates[0]), *(f"{_shown(rate)} ({rate / rates[0]:.2f}x)" for rate in rates[1:])]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines)


def _shown(rate: float) -> str:
    return f"{rate:,.1f}" if rate < 100 else f"{rate:,.0f}"


def draw(sweeps: Sequence[Sweep], subtitle: str, path: Path) -> None:
    """A panel per sweep, a line per row."""
    rows = -(-len(sweeps) // 2)
    figure = Figure(figsize=(11, 4.1 * rows), layout="constrained")
    panels = figure.subplots(rows, 2, squeeze=False).ravel()
    for axes in panels[len(sweeps) :]:
        axes.set_visible(False)
    for axes, sweep in zip(panels, sweeps, strict=False):
        for name, rates in sweep.rates.items():
            axes.plot(sweep.columns, rates, marker="o", markersize=4, label=name)
        axes.set_xscale("log", base=2)
        axes.set_xticks(list(sweep.columns), [f"{column:,}" for column in sweep.columns])
        axes.xaxis.set_minor_locator(NullLocator())
        axes.set_ylim(0, 1.08 * axes.get_ylim()[1])
        axes.set_title(sweep.title, fontsize=10)
        axes.set_xlabel(sweep.size)
        axes.set_ylabel("tokens/s")
        axes.grid(color="0.92", linewidth=0.8)
        axes.set_axisbelow(True)
        axes.legend(fontsize="small")
    figure.suptitle(subtitle, fontsize=9)
    FigureCanvasAgg(figure).print_png(path, metadata={"Software": None})
