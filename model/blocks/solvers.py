"""Explicit Runge-Kutta integration of dx/dt = v(x, t) from t = 0 to 1 in equal steps."""

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True, slots=True)
class Tableau:
    """A Butcher tableau: stage i is at `nodes[i]` of a step, reached along `weights[i]` of the stages before."""

    nodes: tuple[float, ...]
    weights: tuple[tuple[float, ...], ...]
    result: tuple[float, ...]


SOLVERS: dict[str, Tableau] = {
    "euler": Tableau((0.0,), ((),), (1.0,)),
    "midpoint": Tableau((0.0, 0.5), ((), (0.5,)), (0.0, 1.0)),
    "heun": Tableau((0.0, 1.0), ((), (1.0,)), (0.5, 0.5)),
    "rk4": Tableau(
        (0.0, 0.5, 0.5, 1.0), ((), (0.5,), (0.0, 0.5), (0.0, 0.0, 1.0)), (1 / 6, 1 / 3, 1 / 3, 1 / 6)
    ),
}


def stage_times(tableau: Tableau, steps: int) -> list[float]:
    """Every time at which the velocity is asked for."""
    return sorted({_time(step, node, steps) for step in range(steps) for node in tableau.nodes})


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
