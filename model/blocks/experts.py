"""Grouped dispatch: every selected expert runs once, over just the rows that selected it; and two kinds of experts.

T tokens, K experts per token, E experts, H hidden, F expert width.
"""

from abc import abstractmethod
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

# Float32 products of this many rows (and its multiples) give each row the same bits whatever the other rows
# hold, which single rows and odd counts do not. Activations are alike only while 32 divides rows x width, so
# expert widths are multiples of 8 and activations run before the rows that were filled up are cut off again.
# Both measured: tests/model/test_experts.py.
ROW_MULTIPLE = 4
ACTIVATION_MULTIPLE = 32  # rows where each holds one number

RunExpert = Callable[[int, Tensor], Tensor]  # expert id, its rows (n, H) -> (n, H)


def pad_rows(rows: Tensor, multiple: int = ROW_MULTIPLE) -> Tensor:
    """Rows filled up with zeros to a multiple."""
    missing = -len(rows) % multiple
    return F.pad(rows, (0, 0, 0, missing)) if missing else rows


def padded_linear(rows: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """`F.linear` whose result for a row does not depend on how many other rows there are."""
    return F.linear(pad_rows(rows), weight, bias)[: len(rows)]


def dispatch(rows: Tensor, expert_ids: Tensor, num_experts: int, run: RunExpert) -> Tensor:
    """Outputs of the selected experts, per token and selection: rows (T, H), expert_ids (T, K) -> (T, K, H).

    `run` is called once for every expert that somebody selected, with a multiple of ROW_MULTIPLE rows.
    """
    tokens, per_token = expert_ids.shape
    flat = expert_ids.flatten()
    order = torch.argsort(flat, stable=True)
    counts = torch.bincount(flat, minlength=num_experts).tolist()
    inputs = rows[order // per_token]  # (T * K, H), one expert's rows beside each other
    outputs = [
        run(expert, pad_rows(own_rows))[: len(own_rows)]
        for expert, own_rows in enumerate(inputs.split(counts))
        if len(own_rows)
    ]
    inverse = torch.empty_like(order)
    inverse[order] = torch.arange(len(order), device=order.device)
    return torch.cat(outputs)[inverse].unflatten(0, (tokens, per_token))


class Experts(nn.Module):
    """E experts of one form, each matrix stacked over the experts. Contribute zero until trained."""

    def __init__(self, num_experts: int, *shapes: tuple[str, tuple[int, int]]):
        super().__init__()
        self.num_experts = num_experts
        *inner, last = shapes
        for name, (outputs, inputs) in inner:
            self.register_parameter(
                name, nn.Parameter(torch.randn(num_experts, outputs, inputs) * inputs**-0.5)
            )
        name, shape = last
        self.register_parameter(name, nn.Parameter(torch.zeros(num_experts, *shape)))
        self._unbound: tuple[tuple[Tensor, ...], ...] | None = None

    def forward(self, rows: Tensor, expert_ids: Tensor) -> Tensor:
        """rows (T, H), expert_ids (T, K) -> (T, K, H)."""
        matrices = self._matrices()
        return dispatch(
            rows,
            expert_ids,
            self.num_experts,
            lambda expert, own_rows: self.run(own_rows, *(matrix[expert] for matrix in matrices)),
        )

    @staticmethod
    @abstractmethod
    def run(rows: Tensor, *matrices: Tensor) -> Tensor:
        """One expert: rows (n, H) and its own matrices in the order of `shapes` -> (n, H)."""

    def active_parameters(self, num_experts_per_tok: int) -> int:
        return sum(p.numel() // self.num_experts for p in self.parameters()) * num_experts_per_tok

    def _matrices(self) -> tuple[tuple[Tensor, ...], ...]:
        """Each matrix apart per expert; kept once the experts are frozen."""
        if any(p.requires_grad for p in self.parameters()):
            self._unbound = None
            return tuple(p.unbind() for p in self.parameters())
        if self._unbound is None:
            self._unbound = tuple(p.data.unbind() for p in self.parameters())
        return self._unbound


class SiluExperts(Experts):
    """`up(silu(down(x)))`, the form of SOME's formal definition, section 2.1."""

    def __init__(self, num_experts: int, hidden: int, width: int):
        super().__init__(num_experts, ("down_proj", (width, hidden)), ("up_proj", (hidden, width)))

    @staticmethod
    def run(rows: Tensor, *matrices: Tensor) -> Tensor:
        down_proj, up_proj = matrices
        return F.linear(F.silu(F.linear(rows, down_proj)), up_proj)


class SwigluExperts(Experts):
    """`down(silu(gate(x)) * up(x))`, the form of Mixtral and OLMoE."""

    def __init__(self, num_experts: int, hidden: int, width: int):
        super().__init__(
            num_experts,
            ("gate_proj", (width, hidden)),
            ("up_proj", (width, hidden)),
            ("down_proj", (hidden, width)),
        )

    @staticmethod
    def run(rows: Tensor, *matrices: Tensor) -> Tensor:
        gate_proj, up_proj, down_proj = matrices
        return F.linear(F.silu(F.linear(rows, gate_proj)) * F.linear(rows, up_proj), down_proj)


EXPERT_FORMS: dict[str, Callable[[int, int, int], Experts]] = {"silu": SiluExperts, "swiglu": SwigluExperts}
