"""Grouped dispatch: every selected expert runs once, over just the rows that selected it; and two kinds of experts.

T tokens, K experts per token, E experts, H hidden, F expert width.
"""

from abc import abstractmethod
from collections.abc import Callable, Mapping
from typing import ClassVar, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from model.native.experts import mix_silu, mix_swiglu

# Float32 products of this many rows (and its multiples) give each row the same bits whatever the other rows
# hold, which single rows and odd counts do not. Activations are alike only while 32 divides rows x width, so
# expert widths are multiples of 8 and activations run before the rows that were filled up are cut off again.
# Both measured: tests/model/test_experts.py.
ROW_MULTIPLE = 4
ACTIVATION_MULTIPLE = 32  # rows where each holds one number

RunExpert = Callable[[int, Tensor], Tensor]  # expert id, its rows (n, H) -> (n, H)
Stacked = Mapping[str, nn.Parameter]  # a matrix's name -> (E, outputs, inputs)


def compiles(*tensors: Tensor) -> bool:
    """Whether compiled code (model.native) takes these: float32 in this machine's memory, and nobody trains."""
    return not torch.is_grad_enabled() and all(
        t.dtype == torch.float32 and t.device.type == "cpu" and t.is_contiguous() for t in tensors
    )


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
    """E experts of one form, each matrix stacked over the experts. Contribute zero until trained.

    More may be appended while other threads compute: all matrices are replaced by one assignment, so nobody sees
    one of them longer than another.
    """

    def __init__(self, num_experts: int, *shapes: tuple[str, tuple[int, int]]):
        super().__init__()
        *inner, last = shapes
        for name, (outputs, inputs) in inner:
            self.register_parameter(
                name, nn.Parameter(torch.randn(num_experts, outputs, inputs) * inputs**-0.5)
            )
        name, shape = last
        self.register_parameter(name, nn.Parameter(torch.zeros(num_experts, *shape)))
        self._unbound: tuple[Stacked, tuple[tuple[Tensor, ...], ...]] | None = None
        self._converted: tuple[tuple[Stacked, Tensor], ...] = ()

    @property
    def num_experts(self) -> int:
        return len(next(self.parameters()))

    @property
    def stacked(self) -> Stacked:
        """Every matrix over all experts, by name; later appending leaves what was returned as it is."""
        return cast(Stacked, self._parameters)

    def appended(self, added: Mapping[str, Tensor]) -> Stacked:
        """The matrices of these experts followed by those of others, (n, ...) each by name."""
        return {
            name: nn.Parameter(torch.cat((mine.data, added[name].to(mine))), mine.requires_grad)
            for name, mine in self.stacked.items()
        }

    def adopt(self, stacked: Stacked) -> None:
        """Put other matrices, of the same names and any number of experts, in force; `stacked` is what they are then."""
        self._parameters = cast(dict[str, nn.Parameter | None], stacked)

    def append(self, added: Mapping[str, Tensor]) -> None:
        """More experts behind those that are here, which keep their ids and their bits."""
        self.adopt(self.appended(added))

    def forward(self, rows: Tensor, expert_ids: Tensor) -> Tensor:
        """rows (T, H), expert_ids (T, K) -> (T, K, H)."""
        matrices = self.matrices()
        return dispatch(
            rows,
            expert_ids,
            len(matrices[0]),
            lambda expert, own_rows: self.run(own_rows, *(matrix[expert] for matrix in matrices)),
        )

    def mix(self, rows: Tensor, expert_ids: Tensor, gates: Tensor, *, written: bool = False) -> Tensor:
        """The selected experts' outputs times their gates, summed: rows (T, H), ids and gates (T, K) -> (T, H).

        Rows that are being `written` are few and go through one by one.
        """
        stacked = self.stacked.values()
        if not written or not compiles(*stacked):
            return (self(rows, expert_ids) * gates.unsqueeze(-1)).sum(1)
        mixed = torch.empty_like(rows)
        given = (part.contiguous().numpy() for part in (rows, expert_ids, gates))
        self.mix_rows(*given, *(p.detach().numpy() for p in stacked), mixed.numpy())
        return mixed

    # One row after another, compiled: rows, ids, gates, the matrices in the order of `shapes`, and what it fills.
    mix_rows: ClassVar[Callable[..., None]]

    @staticmethod
    @abstractmethod
    def run(rows: Tensor, *matrices: Tensor) -> Tensor:
        """One expert: rows (n, H) and its own matrices in the order of `shapes` -> (n, H)."""

    def alignments(self, rows: Tensor, directions: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
        """y_e . d of every expert's output with each row's direction: rows, directions (T, H) -> (T, E) float32.

        Two products over all experts at once, taken in `dtype`; no output (T, E, H) is ever made.
        """
        *inner, last = self._flat(dtype)
        activations = self.activate(*(F.linear(rows.to(dtype), matrix) for matrix in inner))  # (T, E * F)
        projected = F.linear(directions.to(dtype), last)  # (T, E * F)
        return (activations * projected).unflatten(1, (self.num_experts, -1)).sum(-1, dtype=torch.float32)

    def _flat(self, dtype: torch.dtype) -> tuple[Tensor, ...]:
        """Every matrix over all experts, (E * F, H); what has the type already is copied no more than it must be."""
        *inner, last = self.stacked.values()
        if last.dtype == dtype:
            return (*(matrix.flatten(0, 1) for matrix in inner), last.transpose(0, 1).flatten(1).T)
        return tuple(part.flatten(0, 1) for part in self.side_by_side(self.stacked, dtype).unbind(2))

    def side_by_side(self, stacked: Stacked, dtype: torch.dtype) -> Tensor:
        """(E, F, parts, H): matrices of another type that are in force or will be, the last transposed.

        Frozen ones are converted once.
        """
        for of, converted in self._converted:
            if of is stacked and converted.dtype == dtype:
                return converted
        *inner, last = stacked.values()
        together = torch.stack([*inner, last.transpose(1, 2)], dim=2).to(dtype)
        if not any(matrix.requires_grad for matrix in stacked.values()):
            in_force = [each for each in self._converted if each[0] is self.stacked]
            self._converted = (*in_force, (stacked, together))
        return together

    @staticmethod
    @abstractmethod
    def activate(*products: Tensor) -> Tensor:
        """From the inner matrices' products (n, F) to what the last matrix reads."""

    def active_parameters(self, num_experts_per_tok: int) -> int:
        return sum(p.numel() // len(p) for p in self.parameters()) * num_experts_per_tok

    def matrices(self) -> tuple[tuple[Tensor, ...], ...]:
        """Each matrix apart per expert; kept once the experts are frozen."""
        stacked = self.stacked
        if any(p.requires_grad for p in stacked.values()):
            self._unbound = None
            return tuple(p.unbind() for p in stacked.values())
        known = self._unbound
        if known is None or known[0] is not stacked:
            known = self._unbound = (stacked, tuple(p.data.unbind() for p in stacked.values()))
        return known[1]


class SiluExperts(Experts):
    """`up(silu(down(x)))`, the form of SOME's formal definition, section 2.1."""

    mix_rows = staticmethod(mix_silu)

    def __init__(self, num_experts: int, hidden: int, width: int):
        super().__init__(num_experts, ("down_proj", (width, hidden)), ("up_proj", (hidden, width)))

    @staticmethod
    def run(rows: Tensor, *matrices: Tensor) -> Tensor:
        down_proj, up_proj = matrices
        return F.linear(SiluExperts.activate(F.linear(rows, down_proj)), up_proj)

    @staticmethod
    def activate(*products: Tensor) -> Tensor:
        (down,) = products
        return F.silu(down)


class SwigluExperts(Experts):
    """`down(silu(gate(x)) * up(x))`, the form of Mixtral and OLMoE."""

    mix_rows = staticmethod(mix_swiglu)

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
        return F.linear(SwigluExperts.activate(F.linear(rows, gate_proj), F.linear(rows, up_proj)), down_proj)

    @staticmethod
    def activate(*products: Tensor) -> Tensor:
        gate, up = products
        return F.silu(gate) * up


EXPERT_FORMS: dict[str, Callable[[int, int, int], Experts]] = {"silu": SiluExperts, "swiglu": SwigluExperts}
