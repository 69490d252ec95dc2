"""Mixture of Masters: every Master works on every token, tied together by a flow that runs along the sequence.

The paper (sections 2.2 to 2.6) defines names; the equations here resolve them. With x = RMSNorm(H):
M_i = FFN_i(P_i(x) + e_i); C_t = sum_i alpha_i M_i (eq. 1); F_t = S_t / z_t, S_t = l S_{t-1} + C_t (eq. 8, as a mean);
tau = clamp(0.01 + softplus(w x + b), 0.01, 10) (eq. 3); g = softmax(A x / tau) (eqs. 4, 7);
output = gamma (a W[C; F] + (1 - a) sum_i g_i M_i) (eqs. 10, 11). Tokens with tau under a threshold pass by (eq. 6): they
get no contribution and add nothing to the flow; when serving, their FFNs do not run. Backward flow (eq. 9) has no causal form and is refused.
T tokens, N Masters, H hidden.
"""

import math
from collections.abc import Sequence
from typing import ClassVar, cast

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from model.blocks.base import (
    BlockSpan,
    ExpertBlock,
    ExpertUsage,
    all_written,
    count_parameters,
    record_routing,
)
from model.blocks.experts import ACTIVATION_MULTIPLE, compiles, pad_rows, padded_linear
from model.blocks.masters import MASTERS, Master
from model.blocks.mom_config import MomConfig, check
from model.blocks.mom_written import WrittenMasters
from model.blocks.routing import BALANCE_LOSS_COEF
from model.flow_attention import FLOW_ATTENTION_SLOTS, FlowAttention
from model.recurrence import Memory, SequenceRows, WholeWindows
from model.threads import one_thread

TEMPERATURE_BOUNDS = (0.01, 10.0)
SMALLEST_WEIGHT = 1e-30  # of a mean over no tokens
BYPASS_SOFTNESS = 0.1  # width of the sigmoid that stands in for the bypass step's derivative


class MomBlock(ExpertBlock):
    """One layer of Masters."""

    config: MomConfig
    rate_scale: ClassVar = {"gamma": 10.0}
    rows_at_once: ClassVar = 128  # some 10 ms

    def __init__(self, config: MomConfig):
        super().__init__(config)
        check(config)
        hidden, masters = config.hidden_size, config.num_experts
        self.masters = nn.ModuleList(
            MASTERS[i % len(MASTERS)](hidden, config.expert_size) for i in range(masters)
        )
        self.context_weights = nn.Parameter(torch.full((masters,), 1.0 / masters))  # alpha_m
        self.gate_proj = nn.Parameter(torch.randn(masters, hidden) * hidden**-0.5)  # A
        self.temperature_proj = nn.Parameter(torch.zeros(1, hidden))  # w
        self.temperature_bias = nn.Parameter(torch.full((1,), _bias_of_one(config.temperature)))
        self.integrate_proj = nn.Parameter(torch.randn(hidden, 2 * hidden) * (2 * hidden) ** -0.5)  # W
        self.blend = nn.Parameter(torch.zeros(1))  # a, through a sigmoid
        self.gamma = nn.Parameter(torch.zeros(hidden))
        self.attention = FlowAttention(hidden) if config.attention == "flow" else None
        self._compiled: WrittenMasters | None = None

    @property
    def state_slots(self) -> int:
        """Vectors that the block keeps of a sequence: the flow's sum and weight, and what Masters remember."""
        return 2 + sum(self._master(i).slots for i in range(len(self.masters))) + self._attention_slots

    def serve(self, hidden: Tensor, layer: int, spans: Sequence[BlockSpan], usage: ExpertUsage) -> Tensor:
        fresh = hidden.new_zeros(self.state_slots, self.config.hidden_size, dtype=torch.float32)
        states = [span.state[layer] if span.start else fresh for span in spans]
        with one_thread():
            if all_written(spans) and compiles(hidden, self.gamma):
                starts = [span.start for span in spans]
                contribution, gates, active, states = self._written().write(hidden, starts, states)
            else:
                contribution, gates, active, states = self._read(hidden, spans, states)
            for span, state in zip(spans, states, strict=True):
                span.state[layer] = state
            largest = gates.topk(self.config.num_experts_per_tok, dim=-1).indices
            record_routing(usage, layer, largest, spans, active)
        return contribution

    def forward(self, hidden: Tensor) -> tuple[Tensor, Tensor]:
        positions = torch.arange(hidden.shape[1], device=hidden.device)
        contribution, gates, _ = self._compute(self.normed(hidden), positions, WholeWindows())
        mean_gates = gates.flatten(0, -2).mean(0)
        masters = self.config.num_experts
        return contribution, BALANCE_LOSS_COEF * masters * (mean_gates - 1 / masters).square().sum()

    def active_parameters(self) -> int:
        return count_parameters(self)

    def temperatures(self, normed: Tensor) -> Tensor:
        """tau of every token: (..., H) -> (..., 1)."""
        rows = normed.reshape(-1, normed.shape[-1])
        raw = F.linear(pad_rows(rows, ACTIVATION_MULTIPLE), self.temperature_proj) + self.temperature_bias
        low, high = TEMPERATURE_BOUNDS
        tau = raw.sigmoid() if self.config.temperature == "sigmoid" else low + F.softplus(raw)
        return tau[: len(rows)].clamp(low, high).view(*normed.shape[:-1], 1)

    def gates(self, normed: Tensor, temperatures: Tensor) -> Tensor:
        """g of every token and Master: (..., H) -> (..., N), summing to 1."""
        return self._kept((_rows_linear(normed, self.gate_proj) / temperatures).softmax(-1))

    def _read(
        self, hidden: Tensor, spans: Sequence[BlockSpan], states: Sequence[Tensor]
    ) -> tuple[Tensor, Tensor, Tensor, Sequence[Tensor]]:
        """hidden (T, H) -> contribution (T, H), gates (T, N), which rows take part (T), each sequence's new state."""
        memory = SequenceRows(states, [span.end - span.first for span in spans])
        positions = torch.cat(
            [torch.arange(s.start, s.start + s.end - s.first, device=hidden.device) for s in spans]
        )
        contribution, gates, active = self._compute(self.normed(hidden), positions, memory)
        return contribution, gates, active.squeeze(-1) > 0, memory.states

    def _written(self) -> WrittenMasters:
        """The compiled way of rows that are being written; kept once the block is frozen."""
        if self._compiled is not None:
            return self._compiled
        config, slot = self.config, 2
        own = {name: p.detach().numpy() for name, p in self.named_parameters(recurse=False)}
        attention, masters = None, []
        if self.attention is not None:
            attention = self.attention.writer(slot)
            slot += FLOW_ATTENTION_SLOTS
        for i in range(len(self.masters)):
            master = self._master(i)
            masters.append(master.writer(slot))
            slot += master.slots
        literal, mean = config.temperature == "sigmoid", config.flow == "mean"
        blend = own["blend"] if config.routing == "hybrid" else own["blend"][:0]
        gates = (own["gate_proj"], own["temperature_proj"], own["temperature_bias"], literal)
        made = WrittenMasters(
            (own["norm"], np.float32(config.rms_norm_eps)),
            attention,
            (*gates, np.float32(config.bypass_threshold)),
            masters,
            (np.float32(config.flow_decay if mean else 1.0), mean),
            (own["context_weights"], own["integrate_proj"], blend, own["gamma"]),
            self._kept,
        )
        if not self.gamma.requires_grad:
            self._compiled = made
        return made

    def _kept(self, soft: Tensor) -> Tensor:
        """The gates (..., N) that count: with top-k routing the largest, renormalised."""
        if self.config.routing != "topk":
            return soft
        best, ids = soft.topk(self.config.num_experts_per_tok, dim=-1)
        return torch.zeros_like(soft).scatter(-1, ids, best / best.sum(-1, keepdim=True))

    def _compute(self, normed: Tensor, positions: Tensor, memory: Memory) -> tuple[Tensor, Tensor, Tensor]:
        """normed (..., H), positions of the last row dimension -> contribution, gates (..., N), active (..., 1)."""
        slot = 2
        if self.attention is not None:
            normed = normed + self.attention(normed, memory, slot)
            slot += FLOW_ATTENTION_SLOTS
        temperatures = self.temperatures(normed)
        active = self._active(temperatures)
        outputs: list[Tensor] = []
        for i in range(len(self.masters)):
            master = self._master(i)
            outputs.append(_run_active(master, master.prepare(normed, positions, memory, slot), active))
            slot += master.slots
        masters = torch.stack(outputs, dim=-2)  # (..., N, H)
        gates = self.gates(normed, temperatures)
        context = (self.context_weights.unsqueeze(-1) * masters).sum(-2) * active  # C_t
        flow = self._flow(context, active, memory)  # F_t
        integrated = _rows_linear(torch.cat((context, flow), dim=-1), self.integrate_proj)
        gated = (gates.unsqueeze(-1) * masters).sum(-2)
        blended = (
            torch.lerp(gated, integrated, self.blend.sigmoid())  # eq. 10
            if self.config.routing == "hybrid"
            else gated + integrated  # eq. 13
        )
        return self.gamma * active * blended, gates, active

    def _flow(self, context: Tensor, active: Tensor, memory: Memory) -> Tensor:
        """F_t: the flow context's running mean over active tokens, or its literal sum."""
        if self.config.flow == "sum":
            return memory.run(0, context, context.new_ones(1))
        decay = context.new_full((1,), self.config.flow_decay)
        sums, weights = memory.run(0, context, decay), memory.run(1, active, decay)
        return sums / weights.clamp_min(SMALLEST_WEIGHT)

    def _active(self, temperatures: Tensor) -> Tensor:
        """1 where a token takes part, 0 where it passes by; straight through a sigmoid for the derivative."""
        hard = (temperatures >= self.config.bypass_threshold).to(temperatures.dtype)
        if not torch.is_grad_enabled():
            return hard
        soft = ((temperatures - self.config.bypass_threshold) / BYPASS_SOFTNESS).sigmoid()
        return hard + (soft - soft.detach())

    def _master(self, index: int) -> Master:
        return cast(Master, self.masters[index])

    @property
    def _attention_slots(self) -> int:
        return 0 if self.attention is None else FLOW_ATTENTION_SLOTS


def _bias_of_one(temperature: str) -> float:
    """The bias with which a token's temperature starts at 1, or as near as the form allows."""
    return 4.0 if temperature == "sigmoid" else math.log(math.expm1(1.0 - TEMPERATURE_BOUNDS[0]))


def _rows_linear(values: Tensor, weight: Tensor) -> Tensor:
    """`padded_linear` over the last dimension of any shape."""
    return padded_linear(values.reshape(-1, values.shape[-1]), weight).view(*values.shape[:-1], -1)


def _run_active(master: Master, inputs: Tensor, active: Tensor) -> Tensor:
    """A Master's FFN over inputs (..., H); when serving, over the tokens that take part, zero elsewhere."""
    rows = inputs.reshape(-1, inputs.shape[-1])
    if torch.is_grad_enabled():
        return _run_ffn(master, rows).view_as(inputs)
    outputs = torch.zeros_like(rows)
    chosen = active.reshape(-1) > 0
    outputs[chosen] = _run_ffn(master, rows[chosen])
    return outputs.view_as(inputs)


def _run_ffn(master: Master, rows: Tensor) -> Tensor:
    return master.ffn(pad_rows(rows))[: len(rows)]
