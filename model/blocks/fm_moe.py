"""Flow-matching experts: each expert carries its tokens along a learned velocity field (mixture-of-flows 0.2.0).

dx/dt = v_e(x, t) from t = 0 to 1; the router is linear without bias, softmax, the K best, renormalised. The block's
contribution is the displacement, sum_e p_e (x_e(1) - x). The reference's first product is over [x; emb(t)]: the part
of emb(t) does not depend on x, so it becomes one bias per integration time. T tokens, E experts, H hidden, F width.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from model.blocks.base import (
    BlockConfig,
    BlockSpan,
    ExpertBlock,
    ExpertUsage,
    check_choice,
    forced_rows,
    record_routing,
)
from model.blocks.experts import dispatch, padded_linear
from model.blocks.routing import (
    BALANCE_LOSS_COEF,
    RENORMALIZE_EPS,
    ROUTER_Z_LOSS_COEF,
    top_k_of_softmax,
    z_loss,
)
from model.blocks.solvers import SOLVERS, integrate, stage_times
from model.threads import one_thread

LAYER_NORM_EPS = 1e-5
MAX_PERIOD = 10_000.0


@dataclass(frozen=True, slots=True, kw_only=True)
class FmMoeConfig(BlockConfig):
    """`flow_steps`: integration steps unless a request says otherwise. `solver`: euler, midpoint, heun or rk4."""

    flow_steps: int = 4
    solver: str = "euler"
    time_embed_size: int = 64


@dataclass(frozen=True, slots=True)
class UsageStats:
    """The reference's statistics of some tokens: both arrays (E), balance 1 when every expert gets as much."""

    expert_probs: Tensor
    expert_selections: Tensor
    balance_score: float


class FmMoeBlock(ExpertBlock):
    """One layer of flow-matching experts."""

    config: FmMoeConfig

    def __init__(self, config: FmMoeConfig):
        super().__init__(config)
        check_choice(config, "solver", SOLVERS)
        self.router = nn.Parameter(torch.randn(config.num_experts, config.hidden_size) * 0.01)
        self.experts = FlowExperts(config)

    def serve(self, hidden: Tensor, layer: int, spans: Sequence[BlockSpan], usage: ExpertUsage) -> Tensor:
        with one_thread():
            normed = self.normed(hidden)
            gates, expert_ids, _ = self.route(normed, forced_rows(spans, layer))
            record_routing(usage, layer, expert_ids, spans)
            parts = [
                self.experts(normed[rows], expert_ids[rows], steps or self.config.flow_steps)
                for rows, steps in _rows_by_steps(spans)
            ]
            return (torch.cat(parts) * gates.unsqueeze(-1)).sum(1)

    def forward(self, hidden: Tensor) -> tuple[Tensor, Tensor]:
        normed = self.normed(hidden).flatten(0, 1)
        contribution, router_logits = self.displacement(normed, self.config.flow_steps)
        return contribution.view_as(hidden), flow_auxiliary_loss(router_logits)

    def active_parameters(self) -> int:
        return (
            self.norm.numel()
            + self.router.numel()
            + self.experts.active_parameters(self.config.num_experts_per_tok)
        )

    def displacement(self, rows: Tensor, steps: int) -> tuple[Tensor, Tensor]:
        """sum_e p_e (x_e(1) - x) of rows (T, H), and the router logits (T, E)."""
        gates, expert_ids, router_logits = self.route(rows)
        outputs = self.experts(rows, expert_ids, steps)  # (T, K, H)
        return (outputs * gates.unsqueeze(-1)).sum(1), router_logits

    def route(
        self, rows: Tensor, forced: Sequence[tuple[slice, Tensor]] = ()
    ) -> tuple[Tensor, Tensor, Tensor]:
        """rows (T, H) -> gates (T, K), expert ids (T, K), router logits (T, E)."""
        router_logits = padded_linear(rows, self.router)
        gates, expert_ids = top_k_of_softmax(
            router_logits, self.config.num_experts_per_tok, eps=RENORMALIZE_EPS, forced=forced
        )
        return gates, expert_ids, router_logits

    @torch.no_grad()
    def usage_stats(self, rows: Tensor) -> UsageStats:
        """The reference's `get_expert_usage_stats` over rows (T, H)."""
        _, expert_ids, router_logits = self.route(rows)
        selections = torch.bincount(expert_ids.flatten(), minlength=self.config.num_experts).float()
        uneven = (selections - selections.mean()).abs().sum() / (2 * selections.sum())
        return UsageStats(router_logits.softmax(-1).mean(0), selections, 1.0 - float(uneven))


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

    def forward(self, rows: Tensor, expert_ids: Tensor, steps: int) -> Tensor:
        """Displacements of the selected experts: rows (T, H), expert_ids (T, K) -> (T, K, H)."""
        biases = self._biases(steps)
        parts = [parameter.unbind() for parameter in self._per_expert()]

        def run(expert: int, own_rows: Tensor) -> Tensor:
            own = [part[expert] for part in parts]
            return integrate(
                self._solver,
                lambda displacement, time: velocity(own_rows + displacement, biases[time][expert], *own),
                torch.zeros_like(own_rows),
                steps,
            )

        return dispatch(rows, expert_ids, len(self.input_proj), run)

    def active_parameters(self, num_experts_per_tok: int) -> int:
        return sum(p.numel() // len(p) for p in self.parameters()) * num_experts_per_tok

    def _per_expert(self) -> tuple[nn.Parameter, ...]:
        return (
            self.input_proj,
            self.input_norm,
            self.input_norm_bias,
            self.hidden_proj,
            self.hidden_bias,
            self.hidden_norm,
            self.hidden_norm_bias,
            self.velocity_proj,
            self.velocity_bias,
        )

    def _biases(self, steps: int) -> dict[float, Tensor]:
        """What the first product adds at each integration time: time -> (E, F). Kept once the experts are frozen."""
        if self.time_proj.requires_grad:
            self._time_biases.clear()
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


def flow_auxiliary_loss(router_logits: Tensor) -> Tensor:
    """0.01 E sum_e (mean p_e - 1/E)^2 + 0.001 mean logsumexp^2, over router logits (T, E)."""
    experts = router_logits.shape[-1]
    uneven = (router_logits.softmax(-1).mean(0) - 1.0 / experts).square().sum()
    return BALANCE_LOSS_COEF * experts * uneven + ROUTER_Z_LOSS_COEF * z_loss(router_logits)


def load_reference(block: FmMoeBlock, state: Mapping[str, Tensor]) -> None:
    """Copy a mixture-of-flows 0.2.0 state dict into a block of the same sizes. Raises KeyError, RuntimeError."""
    hidden = block.config.hidden_size
    names = {
        "input_bias": "0.bias",
        "input_norm": "2.weight",
        "input_norm_bias": "2.bias",
        "hidden_proj": "4.weight",
        "hidden_bias": "4.bias",
        "hidden_norm": "6.weight",
        "hidden_norm_bias": "6.bias",
        "velocity_proj": "8.weight",
        "velocity_bias": "8.bias",
    }

    def stacked(name: str) -> Tensor:
        return torch.stack([state[f"experts.{e}.network.{name}"] for e in range(block.config.num_experts)])

    first = stacked("0.weight")  # (E, F, H + time)
    own = {ours: stacked(theirs) for ours, theirs in names.items()}
    own |= {"input_proj": first[..., :hidden], "time_proj": first[..., hidden:]}
    block.experts.load_state_dict(own)
    with torch.no_grad():
        block.router.copy_(state["router.gate.weight"])


def _rows_by_steps(spans: Sequence[BlockSpan]) -> list[tuple[slice, int | None]]:
    """Consecutive rows that integrate in equally many steps."""
    groups: list[tuple[slice, int | None]] = []
    for span in spans:
        first = span.first
        if groups and groups[-1][1] == span.flow_steps:
            first = groups.pop()[0].start
        groups.append((slice(first, span.end), span.flow_steps))
    return groups
