"""What bench/specialisation.py shows: results, tables and heat maps. D domains, E experts, S seeds, N Masters."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path

import numpy as np
from inputs import label
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from numpy.typing import NDArray

from model.training.specialisation import PermutationTest

MOST_COLUMNS = 64
FEW_EXPERTS = 16  # up to here panels stand side by side and cells carry their number
OCTAVES = 3  # the colour scale ends at 8 times, and an eighth of, the uniform share
MASTER_NAMES = ("position", "concept", "reasoning", "memory")


@dataclass(frozen=True, slots=True)
class LayerResult:
    """One layer: shares p(e|d) (D, E), statistics with permutation nulls, and the same of S fresh routers."""

    layer: int
    shares: list[list[float]]
    information: PermutationTest  # bits
    untrained_information: list[PermutationTest]
    index: PermutationTest
    untrained_index: list[PermutationTest]
    load_entropy_ratio: float
    load_variation: float  # standard deviation of the experts' loads over their mean
    unused_experts: int


@dataclass(frozen=True, slots=True)
class MastersResult:
    """Mean cosine between Masters' outputs of one layer: trained (N, N), untrained (S, N, N)."""

    layer: int
    trained: list[list[float]]
    untrained: list[list[list[float]]]


def layers_table(results: Mapping[str, Sequence[LayerResult]], domains: int) -> str:
    lines = [
        f"| variant | layer | information, bits of {np.log2(domains):.2f} | files permuted: mean (95 %) | p "
        "| excess | untrained routers' excess (range) | specialisation index | files permuted | p | excess "
        "| untrained routers' excess (range) | load entropy ratio | unused experts |",
        "|---" * 14 + "|",
    ]
    lines += [f"| {name} | {_row(each)} |" for name, layers in results.items() for each in layers]
    return "\n".join(lines)


def masters_table(name: str, layers: Sequence[MastersResult]) -> str:
    """Cosines by pair and layer, the range over fresh blocks in brackets."""
    pairs = list(combinations(range(len(layers[0].trained)), 2))
    titles = [f"layer {each.layer}" for each in layers]
    lines = [
        f"| Masters of {name}, cosine (untrained range) | {' | '.join(titles)} |",
        "|---" * (len(layers) + 1) + "|",
    ]
    for i, j in pairs:
        cells = [_cosine(each.trained[i][j], [fresh[i][j] for fresh in each.untrained]) for each in layers]
        lines.append(f"| {_master(i)}, {_master(j)} | {' | '.join(cells)} |")
    means = [
        _cosine(
            float(np.mean([each.trained[i][j] for i, j in pairs])),
            [float(np.mean([fresh[i][j] for i, j in pairs])) for fresh in each.untrained],
        )
        for each in layers
    ]
    return "\n".join([*lines, f"| mean of all pairs | {' | '.join(means)} |"])


def draw(
    name: str, layers: Sequence[LayerResult], domains: Sequence[str], path: Path, *, masters: bool = False
) -> None:
    """A panel per layer: domains by experts, coloured by the share relative to the uniform one."""
    experts = len(layers[0].shares[0])
    names = [_master(i) if masters else str(i) for i in range(experts)]
    few = experts <= FEW_EXPERTS
    height = 0.26 * len(domains)
    size = (2.6 + len(layers) * max(1.7, 0.36 * experts), height + 1.5) if few else (13.5, 2 * height + 2.2)
    figure = Figure(figsize=size, layout="constrained")
    grid = (1, len(layers)) if few else (-(-len(layers) // 2), 2)
    panels = figure.subplots(*grid, squeeze=False, sharey=True)
    for axes, each in zip(panels.flat, layers, strict=False):
        _heat_map(axes, each, domains, names, few=few)
    for unused in panels.flat[len(layers) :]:
        unused.remove()
    bar = figure.colorbar(
        panels.flat[0].images[0], ax=panels, fraction=0.03, pad=0.01, aspect=30, extend="both"
    )
    bar.set_ticks(range(-OCTAVES, OCTAVES + 1), labels=["1/8", "1/4", "1/2", "1", "2", "4", "8"])
    bar.set_label("share of the gates, times uniform")
    figure.suptitle(f"{name}: experts by domain on held-out text (* never trained on)", fontsize=11)
    FigureCanvasAgg(figure).print_png(path, metadata={"Software": None})


def sorted_by_domain(shares: NDArray[np.float64]) -> NDArray[np.int64]:
    """Columns to show, (at most MOST_COLUMNS): the most loaded experts, by dominant domain, the purest first."""
    most = np.argsort(-shares.sum(0), kind="stable")[:MOST_COLUMNS]
    purity = shares / np.maximum(shares.sum(0), 1e-12)
    return most[np.lexsort((-purity.max(0)[most], purity.argmax(0)[most]))]


def _heat_map(
    axes: Axes, result: LayerResult, domains: Sequence[str], names: Sequence[str], *, few: bool
) -> None:
    shares = np.array(result.shares)
    columns = sorted_by_domain(shares)
    relative = shares[:, columns] * shares.shape[1]
    octaves = np.log2(np.maximum(relative, 2.0 ** -(OCTAVES + 2)))
    axes.imshow(octaves, cmap="PuOr_r", vmin=-OCTAVES, vmax=OCTAVES, aspect="auto", interpolation="nearest")
    axes.set_yticks(range(len(domains)), [label(domain) for domain in domains], fontsize=8)
    shown = [names[column] for column in columns.tolist()]
    upright = few and max(map(len, shown)) <= 2
    axes.set_xticks(range(len(shown)), shown, fontsize=8 if few else 5.5, rotation=0 if upright else 90)
    axes.tick_params(length=0)
    information = result.information
    fresh = np.mean([each.observed for each in result.untrained_information])
    axes.set_title(
        f"layer {result.layer}: {information.observed:.2f} bits{chr(10) if few else ' '}"
        f"(permuted {information.null_mean:.2f}, untrained {fresh:.2f})",
        fontsize=8,
    )
    axes.set_xlabel("expert", fontsize=8)
    if shares.shape[1] <= FEW_EXPERTS // 2:
        _write_cells(axes, relative, octaves)


def _write_cells(axes: Axes, relative: NDArray[np.float64], octaves: NDArray[np.float64]) -> None:
    for (row, column), value in np.ndenumerate(relative):
        dark = abs(octaves[row, column]) > 0.6 * OCTAVES
        axes.text(
            column,
            row,
            f"{value:.1f}",
            ha="center",
            va="center",
            fontsize=6,
            color="white" if dark else "black",
        )


def _row(result: LayerResult) -> str:
    return " | ".join(
        [
            str(result.layer),
            *_cells(result.information, result.untrained_information),
            *_cells(result.index, result.untrained_index),
            f"{result.load_entropy_ratio:.3f}",
            str(result.unused_experts),
        ]
    )


def _cells(trained: PermutationTest, untrained: Sequence[PermutationTest]) -> list[str]:
    fresh = [_excess(each) for each in untrained]
    return [
        f"{trained.observed:.3f}",
        f"{trained.null_mean:.3f} ({trained.null_95:.3f})",
        f"{trained.p_value:.3f}",
        f"{_excess(trained):.3f}",
        f"{np.mean(fresh):.3f} ({min(fresh):.3f} to {max(fresh):.3f})",
    ]


def _excess(test: PermutationTest) -> float:
    return test.observed - test.null_mean


def _cosine(trained: float, untrained: Sequence[float]) -> str:
    return f"{trained:+.3f} ({min(untrained):+.3f} to {max(untrained):+.3f})"


def _master(index: int) -> str:
    name = MASTER_NAMES[index % len(MASTER_NAMES)]
    return name if index < len(MASTER_NAMES) else f"{name} {index // len(MASTER_NAMES) + 1}"
