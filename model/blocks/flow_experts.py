"""E velocity networks and their integration (model.blocks.fm_moe). T tokens, K experts per token, H hidden, F width."""

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn

from model.blocks.base import BlockConfig
from model.blocks.experts import dispatch
from model.blocks.solvers import SOLVERS, integrate, stage_times, step_times
from model.native.flow import mix_flows

LAYER_NORM_EPS = 1e-5
MAX_PERIOD = 10_000.0
# What an expert's velocity takes beside position and time, in order.
PER_EXPERT = (
    "input_proj",
    "input_norm",
    "input_norm_bias",
    "hidden_proj",
    "hidden_bias",
    "hidden_norm",
    "hidden_norm_bias",
    "velocity_proj",
    "velocity_bias",
)


@dataclass(frozen=True, slots=True, kw_only=True)
class FmMoeConfig(BlockConfig):
    """`flow_steps`: integration steps unless a request says otherwise. `solver`: euler, midpoint, heun or rk4."""

    flow_steps: int = 4
    solver: str = "euler"
    time_embed_size: int = 64


class FlowExperts(nn.Module):
    """E velocity networks, each matrix stacked over the experts. They stand still until trained."""

    def __init__(self, config: FmMoeConfig):
        super().__init__()
        experts, hidden, width = config.num_experts, config.hidden_size, config.expert_size
        self._solver = SOLVERS[config.solver]
        self.time_embed_size = config.time_embed_size
        inputs = hidden + config.time_embed_size
        self.input_proj = nn.Parameter(torch.randn(experts, width, hidden) * inputs**-0.5)
        self.time_proj = nn.Parameter(torch.randn(experts, width, config.time_embed_size) * inputs**-0.5)
        self.input_bias = nn.Parameter(torch.zeros(experts, width))
        self.input_norm = nn.Parameter(torch.ones(experts, width))
        self.input_norm_bias = nn.Parameter(torch.zeros(experts, width))
        self.hidden_proj = nn.Parameter(torch.randn(experts, width, width) * width**-0.5)
        self.hidden_bias = nn.Parameter(torch.zeros(experts, width))
        self.hidden_norm = nn.Parameter(torch.ones(experts, width))
        self.hidden_norm_bias = nn.Parameter(torch.zeros(experts, width))
        self.velocity_proj = nn.Parameter(torch.zeros(experts, hidden, width))
        self.velocity_bias = nn.Parameter(torch.zeros(experts, hidden))
        self._time_biases: dict[int, dict[float, Tensor]] = {}
        self._stage_biases: dict[int, NDArray[np.float32]] = {}
        self._written: tuple[Any, Any, Any, Any] | None = (
            None  # tableau, epsilon, parameters: for compiled code
        )

    def forward(self, rows: Tensor, expert_ids: Tensor, steps: int) -> Tensor:
        """Displacements of the selected experts: rows (T, H), expert_ids (T, K) -> (T, K, H)."""
        biases = self._biases(steps)
        parts = [self.get_parameter(name).unbind() for name in PER_EXPERT]

        def run(expert: int, own_rows: Tensor) -> Tensor:
            own = [part[expert] for part in parts]
            return integrate(
                self._solver,
                lambda displacement, time: velocity(own_rows + displacement, biases[time][expert], *own),
                torch.zeros_like(own_rows),
                steps,
            )

        return dispatch(rows, expert_ids, len(self.input_proj), run)

    def write(self, rows: Tensor, expert_ids: Tensor, gates: Tensor, steps: int, out: Tensor) -> None:
        """Rows that are being written, compiled: sum_e p_e (x_e(1) - x) into `out` (T, H)."""
        if self._written is None or self.time_proj.requires_grad:
            parts = (self.get_parameter(name).detach().numpy() for name in PER_EXPERT)
            self._written = (*self._solver.arrays(), np.float32(LAYER_NORM_EPS), tuple(parts))
        biases = self._biases(steps)
        if steps not in self._stage_biases:
            stages = [
                torch.stack([biases[time] for time in times]) for times in step_times(self._solver, steps)
            ]
            self._stage_biases[steps] = torch.stack(stages).numpy()
        weights, result, eps, networks = self._written
        given = (rows.numpy(), expert_ids.numpy(), gates.numpy(), self._stage_biases[steps])
        mix_flows(*given, weights, result, eps, networks, out.numpy())

    def active_parameters(self, num_experts_per_tok: int) -> int:
        return sum(p.numel() // len(p) for p in self.parameters()) * num_experts_per_tok

    def _biases(self, steps: int) -> dict[float, Tensor]:
        """What the first product adds at each integration time: time -> (E, F). Kept once the experts are frozen."""
        if self.time_proj.requires_grad:
            self._time_biases.clear()
            self._stage_biases.clear()
        elif steps in self._time_biases:
            return self._time_biases[steps]
        device = self.time_proj.device
        biases = {
            time: self.input_bias + self.time_proj @ time_embedding(time, self.time_embed_size, device)
            for time in stage_times(self._solver, steps)
        }
        if not self.time_proj.requires_grad:
            self._time_biases[steps] = biases
        return biases


def velocity(
    position: Tensor,
    time_bias: Tensor,
    input_proj: Tensor,
    input_norm: Tensor,
    input_norm_bias: Tensor,
    hidden_proj: Tensor,
    hidden_bias: Tensor,
    hidden_norm: Tensor,
    hidden_norm_bias: Tensor,
    velocity_proj: Tensor,
    velocity_bias: Tensor,
) -> Tensor:
    """v(x, t) of one expert: position (n, H) -> (n, H)."""
    width = (len(time_bias),)
    inner = F.silu(F.linear(position, input_proj, time_bias))
    inner = F.layer_norm(inner, width, input_norm, input_norm_bias, LAYER_NORM_EPS)
    inner = F.silu(F.linear(inner, hidden_proj, hidden_bias))
    inner = F.layer_norm(inner, width, hidden_norm, hidden_norm_bias, LAYER_NORM_EPS)
    return F.linear(inner, velocity_proj, velocity_bias)


def time_embedding(time: float, size: int, device: torch.device) -> Tensor:
    """[sin(t f_i)..., cos(t f_i)...], f_i = exp(-ln(10000) i / (half - 1)): (size)."""
    half = size // 2
    step = torch.log(torch.tensor(MAX_PERIOD, device=device)) / (half - 1)
    angles = time * torch.exp(-step * torch.arange(half, device=device))
    return torch.cat((angles.sin(), angles.cos()))
