"""What bench/compare.py prints: figures, ratios and the targets that they are held against, as markdown."""

import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import machine

Figures = Mapping[str, float]  # by column
FIRST = "first"  # seconds: less is faster. The other columns are tokens/s
COLUMNS = {
    "one": "1 stream, tok/s",
    "eight": "8 streams, tok/s",
    FIRST: "first token of a 512-token prompt, s",
}
FORMATS = {"one": ".1f", "eight": ".0f", FIRST: ".2f"}


@dataclass(frozen=True, slots=True)
class Cost:
    """What a process takes besides time to answer."""

    ready_s: float
    peak_mb: float  # 10^6 bytes


@dataclass(frozen=True, slots=True)
class Comparison:
    """One run. `peers`: the sides that each peer was measured as, none where it is missing."""

    machine: Mapping[str, str]
    results: Mapping[str, Sequence[Figures]]  # side -> a round after another
    peers: Mapping[str, Sequence[str]]
    costs: Mapping[str, Cost]
    converting_s: float  # the start in an empty data folder
    missing: Sequence[str]

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)

    @property
    def modes(self) -> list[str]:
        of_peers = {side for sides in self.peers.values() for side in sides}
        return [side for side in self.results if side not in of_peers]

    def median(self, side: str, column: str) -> float:
        return statistics.median(figures[column] for figures in self.results[side])

    def best(self, peer: str, column: str) -> str | None:
        """The fastest of a peer's sides; None: it is missing."""
        sides = self.peers.get(peer, ())
        fastest: Callable[..., str] = min if column == FIRST else max
        return fastest(sides, key=lambda side: self.median(side, column)) if sides else None

    def times_as_fast(self, side: str, column: str, other: str, other_column: str | None = None) -> float:
        """Median over rounds of how many times as fast a side is as another was in the same round."""
        pairs = zip(self.results[side], self.results[other], strict=True)
        ratios = [mine[column] / theirs[other_column or column] for mine, theirs in pairs]
        return statistics.median(1 / ratio if column == FIRST else ratio for ratio in ratios)


@dataclass(frozen=True, slots=True)
class Target:
    """How many times as fast a mode is to be: as another mode, or as a peer at its best thread count."""

    text: str
    wanted: float
    mode: str
    column: str
    other: str
    other_column: str | None = None

    def measured(self, comparison: Comparison) -> float | None:
        """None: one of the two was not measured."""
        column = self.other_column or self.column
        other = self.other if self.other in comparison.results else comparison.best(self.other, column)
        if other is None or self.mode not in comparison.results:
            return None
        return comparison.times_as_fast(self.mode, self.column, other, column)


TARGETS = (
    Target("`dense`, 1 stream, to llama.cpp", 1.3, "dense", "one", "llama.cpp"),
    Target("`dense`, 1 stream, to transformers", 4.0, "dense", "one", "transformers"),
    Target("`dense`, 8 streams, to transformers' batch", 3.5, "dense", "eight", "transformers"),
    Target("`dense`, 8 streams, to llama.cpp's one", 4.0, "dense", "eight", "llama.cpp", "one"),
    Target("`dense`, 512-token prompt, to transformers", 1.3, "dense", FIRST, "transformers"),
    Target("`dense`, 512-token prompt, to llama.cpp", 5.0, "dense", FIRST, "llama.cpp"),
    Target("`some` learning, 1 stream, to `dense`", 0.8, "some, learning", "one", "dense"),
    Target("`some` learning, 8 streams, to `dense`", 0.8, "some, learning", "eight", "dense"),
    Target("`some` learning, 1 stream, to frozen", 0.9, "some, learning", "one", "some, learning off"),
    Target("`some` learning, 8 streams, to frozen", 0.9, "some, learning", "eight", "some, learning off"),
    Target("`some` frozen, 1 stream, to `moe`", 0.9, "some, learning off", "one", "moe"),
    Target("`some` frozen, 8 streams, to `moe`", 0.9, "some, learning off", "eight", "moe"),
)
READY_S, PEAK_MB = 6.0, 1200.0


def report(comparison: Comparison) -> str:
    parts = [
        machine.lines(dict(comparison.machine)),
        _speeds(comparison),
        _costs(comparison),
        _targets(comparison),
    ]
    if comparison.missing:
        parts.append("\n".join(f"Missing: {reason}" for reason in comparison.missing))
    return "\n\n".join(parts)


def _speeds(comparison: Comparison) -> str:
    rounds = len(next(iter(comparison.results.values())))
    rows = [f"| | {' | '.join(COLUMNS.values())} |", "|---|---|---|---|"]
    for side in comparison.results:
        cells = [_cell(comparison, side, column) for column in COLUMNS]
        rows.append(f"| {side} | {' | '.join(cells)} |")
    present = [name for name, sides in comparison.peers.items() if sides]
    compared = " and as ".join(f"{name}{_thread_counts(comparison, name)}" for name in present)
    note = f"Medians of {rounds} rounds" + (
        f"; in brackets: times as fast as {compared}." if present else "."
    )
    return "\n".join(rows) + f"\n\n{note}"


def _cell(comparison: Comparison, side: str, column: str) -> str:
    figure = format(comparison.median(side, column), FORMATS[column])
    best = [comparison.best(peer, column) for peer in comparison.peers]
    if side not in comparison.modes or not any(best):
        return figure
    ratios = [f"{comparison.times_as_fast(side, column, peer):.2f}x" for peer in best if peer is not None]
    return f"{figure} ({', '.join(ratios)})"


def _thread_counts(comparison: Comparison, peer: str) -> str:
    if len(comparison.peers[peer]) == 1:
        return ""
    return f" at its best thread count ({', '.join(comparison.best(peer, c).rpartition(', ')[2] for c in COLUMNS)})"


def _costs(comparison: Comparison) -> str:
    rows = ["| | start to ready, s | peak resident memory, MB |", "|---|---|---|"]
    rows += [
        f"| {name} | {cost.ready_s:.1f} | {cost.peak_mb:.0f} |" for name, cost in comparison.costs.items()
    ]
    return (
        "\n".join(rows)
        + f"\n\nThe first start of all, which converts the model: {comparison.converting_s:.1f} s."
    )


def _targets(comparison: Comparison) -> str:
    rows = ["| target | wanted | measured | |", "|---|---|---|---|"]
    for target in TARGETS:
        measured = target.measured(comparison)
        told = (
            ("not measured", "")
            if measured is None
            else (f"{measured:.2f}x", _met(measured >= target.wanted))
        )
        rows.append(f"| {target.text} | {target.wanted:.1f}x | {' | '.join(told)} |")
    mine = next(iter(comparison.costs.values()))
    rows.append(
        f"| start to ready | under {READY_S:.0f} s | {mine.ready_s:.1f} s | {_met(mine.ready_s < READY_S)} |"
    )
    rows.append(
        f"| peak resident memory | under {PEAK_MB:.0f} MB | {mine.peak_mb:.0f} MB | {_met(mine.peak_mb < PEAK_MB)} |"
    )
    return "\n".join(rows)


def _met(met: bool) -> str:
    return "met" if met else "missed"
