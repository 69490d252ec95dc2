"""The six panels of bench/flow_picture.py. E experts, n tokens, S steps, H hidden."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from numpy.typing import NDArray

Array = NDArray[np.floating]
TRAJECTORIES = 10  # drawn of each expert


@dataclass(frozen=True, slots=True)
class Flow:
    """How one expert carries some of its tokens."""

    expert: int
    displacements: Array  # (S + 1, n, H): x(t) - x(0)
    speeds: Array  # (S, n): |v(x(t), t)|
    served: Array  # (n, H): x(1) - x(0) with the variant's own solver and steps


@dataclass(frozen=True, slots=True)
class Panels:
    """What the picture shows of one layer."""

    layer: int
    served: str
    expert_probs: Array  # (E)
    expert_selections: Array  # (E)
    balance: Mapping[int, float]  # by layer
    balance_of_domains: Mapping[int, Array]
    domain: str
    tokens: Sequence[str]
    gates: Array  # (tokens, E)
    flows: Sequence[Flow]


def draw(panels: Panels, path: Path) -> None:
    figure = Figure(figsize=(16, 9), layout="constrained")
    axes = figure.subplots(2, 3)
    figure.suptitle(f"fm-moe, layer {panels.layer}: experts and flows on held-out text", fontsize=13)
    _probabilities(axes[0, 0], panels)
    _selections(axes[0, 1], panels)
    _balance(axes[0, 2], panels)
    _tokens(figure, axes[1, 0], panels)
    _speeds(axes[1, 1], panels)
    _trajectories(axes[1, 2], panels)
    FigureCanvasAgg(figure).print_png(path, metadata={"Software": None})


def principal_components(points: Array) -> tuple[Array, Array, Array]:
    """Mean (H), the two leading directions (2, H) and their shares of the variance, of points (P, H)."""
    mean = points.mean(0)
    covariance = np.cov(points.astype(np.float64), rowvar=False)
    values, vectors = np.linalg.eigh(covariance)
    return mean, vectors[:, :-3:-1].T, values[:-3:-1] / max(values.sum(), 1e-12)


def _probabilities(axes: Axes, panels: Panels) -> None:
    experts = len(panels.expert_probs)
    axes.bar(range(experts), panels.expert_probs, color=_colors(range(experts)))
    axes.axhline(1 / experts, color="0.3", linewidth=0.9, linestyle="--", label="uniform")
    axes.set_title("expert probabilities")
    axes.set_ylabel("mean router probability")
    _expert_axis(axes, experts)


def _selections(axes: Axes, panels: Panels) -> None:
    experts = len(panels.expert_selections)
    total = panels.expert_selections.sum()
    axes.bar(range(experts), panels.expert_selections, color=_colors(range(experts)))
    axes.axhline(total / experts, color="0.3", linewidth=0.9, linestyle="--", label="uniform")
    axes.set_title(f"expert selections ({total:,.0f} in all)")
    axes.set_ylabel("tokens that selected it")
    _expert_axis(axes, experts)


def _balance(axes: Axes, panels: Panels) -> None:
    layers = list(panels.balance)
    colors = ["tab:blue" if layer == panels.layer else "0.7" for layer in layers]
    bars = axes.bar(range(len(layers)), [panels.balance[layer] for layer in layers], color=colors, width=0.6)
    axes.bar_label(bars, fmt="%.2f", label_type="center", fontsize=10)
    for at, layer in enumerate(layers):
        domains = panels.balance_of_domains[layer]
        offsets = np.linspace(-0.2, 0.2, len(domains))
        axes.plot(at + offsets, domains, ".", color="black", markersize=5, label=None if at else "one domain")
    axes.set_ylim(0, 1.2)
    axes.set_xticks(range(len(layers)), [f"layer {layer}" for layer in layers])
    axes.set_title("balance score (1: every expert alike)")
    axes.legend(loc="upper right", fontsize="small")


def _tokens(figure: Figure, axes: Axes, panels: Panels) -> None:
    image = axes.imshow(
        panels.gates.T, cmap="viridis", vmin=0, vmax=1, aspect="auto", interpolation="nearest"
    )
    axes.set_xticks(range(len(panels.tokens)), panels.tokens, rotation=90, fontsize=7, parse_math=False)
    axes.set_yticks(range(panels.gates.shape[1]))
    axes.tick_params(axis="x", length=0)
    axes.set_ylabel("expert")
    axes.set_title(f"gates by token ({panels.domain})")
    figure.colorbar(image, ax=axes, label="gate", fraction=0.05, pad=0.02)


def _speeds(axes: Axes, panels: Panels) -> None:
    for flow in panels.flows:
        times = np.arange(len(flow.speeds)) / len(flow.speeds)
        axes.plot(times, flow.speeds.mean(1), color=_color(flow.expert), label=f"expert {flow.expert}")
    axes.set_ylim(0, 1.25 * axes.get_ylim()[1])
    axes.set_xlim(0, 1)
    axes.set_xlabel("t")
    axes.set_ylabel("|v(x(t), t)|, mean over the expert's tokens")
    axes.set_title("velocity norm along the flow")
    axes.legend(fontsize="small", ncols=4, loc="upper center")


def _trajectories(axes: Axes, panels: Panels) -> None:
    points = np.concatenate(
        [flow.displacements.reshape(-1, flow.displacements.shape[-1]) for flow in panels.flows]
    )
    mean, directions, explained = principal_components(points)
    for flow in panels.flows:
        picks = np.unique(np.linspace(0, flow.served.shape[0] - 1, TRAJECTORIES).astype(int))
        color = _color(flow.expert)
        path = (flow.displacements[:, picks] - mean) @ directions.T  # (S + 1, picks, 2)
        axes.plot(path[..., 0], path[..., 1], color=color, linewidth=0.9, alpha=0.8)
        ends = (flow.served[picks] - mean) @ directions.T
        axes.plot(ends[:, 0], ends[:, 1], "o", color=color, markersize=3.5)
    start = -mean @ directions.T
    axes.plot(*start, "k*", markersize=11, label="start, t = 0")
    axes.plot([], [], "o", color="0.4", markersize=3.5, label=f"end as served: {panels.served}")
    axes.set_xlabel(f"component 1 ({explained[0]:.0%} of the variance)")
    axes.set_ylabel(f"component 2 ({explained[1]:.0%})")
    axes.set_title("flow of single tokens, x(t) - x(0)")
    axes.legend(fontsize="small")


def _expert_axis(axes: Axes, experts: int) -> None:
    axes.set_ylim(0, 1.12 * axes.get_ylim()[1])  # room for the legend
    axes.set_xticks(range(experts))
    axes.set_xlabel("expert")
    axes.legend(fontsize="small")


def _color(expert: int) -> tuple[float, ...]:
    return colormaps["tab10"](expert % 10)


def _colors(experts: Sequence[int]) -> list[tuple[float, ...]]:
    return [_color(expert) for expert in experts]
