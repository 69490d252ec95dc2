"""Explicit Runge-Kutta integration of dx/dt = v(x, t) from t = 0 to 1 in equal steps."""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from torch import Tensor


@dataclass(frozen=True, slots=True)
class Tableau:
    """A Butcher tableau: stage i is at `nodes[i]` of a step, reached along `weights[i]` of the stages before."""

    nodes: tuple[float, ...]
    weights: tuple[tuple[float, ...], ...]
    result: tuple[float, ...]

    def arrays(self) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
        """Weights, filled up with zeros to (stages, stages), and the result's (stages)."""
        weights = np.zeros((len(self.nodes), len(self.nodes)), np.float32)
        for row, own in zip(weights, self.weights, strict=True):
            row[: len(own)] = own
        return weights, np.array(self.result, np.float32)


SOLVERS: dict[str, Tableau] = {
    "euler": Tableau((0.0,), ((),), (1.0,)),
    "midpoint": Tableau((0.0, 0.5), ((), (0.5,)), (0.0, 1.0)),
    "heun": Tableau((0.0, 1.0), ((), (1.0,)), (0.5, 0.5)),
    "rk4": Tableau(
        (0.0, 0.5, 0.5, 1.0), ((), (0.5,), (0.0, 0.5), (0.0, 0.0, 1.0)), (1 / 6, 1 / 3, 1 / 3, 1 / 6)
    ),
}


def step_times(tableau: Tableau, steps: int) -> list[list[float]]:
    """The time of each stage of each step."""
    return [[_time(step, node, steps) for node in tableau.nodes] for step in range(steps)]


def stage_times(tableau: Tableau, steps: int) -> list[float]:
    """Every time at which the velocity is asked for."""
    return sorted({time for times in step_times(tableau, steps) for time in times})


def integrate(
    tableau: Tableau, velocity: Callable[[Tensor, float], Tensor], start: Tensor, steps: int
) -> Tensor:
    """x(1) from x(0) = `start`."""
    position, step_size = start, 1.0 / steps
    for step in range(steps):
        stages: list[Tensor] = []
        for node, weights in zip(tableau.nodes, tableau.weights, strict=True):
            at = _advanced(position, weights, stages, step_size)
            stages.append(velocity(at, _time(step, node, steps)))
        position = _advanced(position, tableau.result, stages, step_size)
    return position


def _time(step: int, node: float, steps: int) -> float:
    return (step + node) * (1.0 / steps)


def _advanced(position: Tensor, weights: tuple[float, ...], stages: list[Tensor], step_size: float) -> Tensor:
    for weight, stage in zip(weights, stages, strict=False):
        if weight:
            position = position + stage * (weight * step_size)
    return position
