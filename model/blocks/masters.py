"""The Masters of MoM: what each does to its input before its FFN, M_i = FFN_i(P_i(x) + e_i) (eq. 2).

The paper names four (section 2.3); each is resolved here in the simplest form that earns its name, and each starts
from an initialisation of its own. Projections are float32. T tokens, H hidden, F width.
"""

# pyright: reportUnknownLambdaType=false

import functools
from abc import abstractmethod
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn

from model.blocks.experts import padded_linear
from model.native.masters import add_concepts, add_embedding, add_memory, add_place, deep_ffn, plain_ffn
from model.recurrence import Memory

POSITION_FEATURES = 64
POSITION_PERIOD = 10_000.0
CONCEPT_SLOTS = 64
CONCEPT_RANK = 32

Floats = NDArray[np.float32]


@dataclass(slots=True)
class WrittenRows:
    """One row of each of T sequences that are being written, for compiled code."""

    normed: Floats  # (T, H)
    positions: NDArray[np.int64]  # (T,)
    active: NDArray[np.bool_]  # (T,): which take part
    states: Floats  # (T, slots, H), which go on by one token


class Master(nn.Module):
    """`prepare` is P_i(x) + e_i over every token, `ffn` the rest over those that take part."""

    slots = 0  # vectors that it keeps of a sequence

    def __init__(self, hidden: int):
        super().__init__()
        self.domain_embedding = nn.Parameter(torch.randn(hidden) * 0.02)  # e_i

    def prepare(self, normed: Tensor, positions: Tensor, memory: Memory, slot: int) -> Tensor:
        """(..., H), positions of the rows (T) -> (..., H); `slot` is the first of its own in the memory."""
        return self.process(normed, positions, memory, slot) + self.domain_embedding

    @abstractmethod
    def process(self, normed: Tensor, positions: Tensor, memory: Memory, slot: int) -> Tensor:
        """P_i."""

    @abstractmethod
    def ffn(self, rows: Tensor) -> Tensor:
        """FFN_i over rows (n, H), n a multiple of ROW_MULTIPLE."""

    def writer(self, slot: int) -> Callable[[WrittenRows, Floats], None]:
        """What writes M_i of rows that are being written, (T, H), zero for those that do not take part: compiled."""
        prepare, ffn = self.written_prepare(slot), self.written_ffn()

        def write(rows: WrittenRows, out: Floats) -> None:
            prepared = np.empty_like(out)
            prepare(rows, prepared)
            ffn(prepared, rows.active, out)

        return write

    @abstractmethod
    def written_prepare(self, slot: int) -> Callable[[WrittenRows, Floats], None]:
        """`prepare`, compiled."""

    @abstractmethod
    def written_ffn(self) -> Callable[[Floats, NDArray[np.bool_], Floats], None]:
        """`ffn`, compiled; zero for rows that are not active."""

    def arrays(self, *names: str) -> tuple[Floats, ...]:
        """Parameters on the same memory."""
        return tuple(self.get_parameter(name).detach().numpy() for name in names)


@functools.cache
def place_frequencies(device: torch.device) -> Tensor:
    """(POSITION_FEATURES / 2)."""
    half = POSITION_FEATURES // 2
    return POSITION_PERIOD ** (-torch.arange(half, device=device) / half)


class PlainFfnMaster(Master):
    """A Master whose FFN is `up(silu(down(x)))`."""

    def __init__(self, hidden: int, width: int, initialize: Callable[[Tensor], Tensor]):
        super().__init__(hidden)
        self.down_proj = nn.Parameter(initialize(torch.empty(width, hidden)))
        self.up_proj = nn.Parameter(initialize(torch.empty(hidden, width)))

    def ffn(self, rows: Tensor) -> Tensor:
        return F.linear(F.silu(F.linear(rows, self.down_proj)), self.up_proj)

    def written_ffn(self) -> Callable[[Floats, NDArray[np.bool_], Floats], None]:
        down, up = self.arrays("down_proj", "up_proj")
        return lambda rows, active, out: plain_ffn(rows, active, down, up, out)


class PositionMaster(PlainFfnMaster):
    """Structure: knows where in the text a token stands. Orthogonal initialisation."""

    def __init__(self, hidden: int, width: int):
        super().__init__(hidden, width, nn.init.orthogonal_)
        self.position_proj = nn.Parameter(torch.randn(hidden, POSITION_FEATURES) * 0.02)

    def process(self, normed: Tensor, positions: Tensor, memory: Memory, slot: int) -> Tensor:
        angles = positions.unsqueeze(-1) * place_frequencies(positions.device)
        features = torch.cat((angles.sin(), angles.cos()), dim=-1)  # (T, POSITION_FEATURES)
        return normed + padded_linear(features, self.position_proj)

    def written_prepare(self, slot: int) -> Callable[[WrittenRows, Floats], None]:
        frequencies = place_frequencies(torch.device("cpu")).numpy()
        proj, embedding = self.arrays("position_proj", "domain_embedding")
        return lambda rows, out: add_place(rows.normed, rows.positions, frequencies, proj, embedding, out)


class ConceptMaster(PlainFfnMaster):
    """Meaning: low-rank attention over learned concept slots. Xavier initialisation."""

    def __init__(self, hidden: int, width: int):
        super().__init__(hidden, width, nn.init.xavier_uniform_)
        rank = CONCEPT_RANK
        self.query_proj = nn.Parameter(torch.randn(rank, hidden) * hidden**-0.5)
        self.concept_keys = nn.Parameter(torch.randn(CONCEPT_SLOTS, rank))
        self.concept_values = nn.Parameter(torch.randn(rank, CONCEPT_SLOTS))
        self.output_proj = nn.Parameter(torch.randn(hidden, rank) * 0.02)

    def process(self, normed: Tensor, positions: Tensor, memory: Memory, slot: int) -> Tensor:
        rows = normed.reshape(-1, normed.shape[-1])
        similarity = padded_linear(padded_linear(rows, self.query_proj), self.concept_keys)
        mixture = padded_linear((similarity * CONCEPT_RANK**-0.5).softmax(-1), self.concept_values)
        return normed + padded_linear(mixture, self.output_proj).view_as(normed)

    def written_prepare(self, slot: int) -> Callable[[WrittenRows, Floats], None]:
        names = ("query_proj", "concept_keys", "concept_values", "output_proj", "domain_embedding")
        query, keys, values, output, embedding = self.arrays(*names)
        return lambda rows, out: add_concepts(
            rows.normed, rows.active, query, keys, values, output, embedding, out
        )


class ReasoningMaster(Master):
    """Inference: a gated and deeper FFN, `down(silu(mid(silu(gate x) * up x)))`. Scaled initialisation."""

    def __init__(self, hidden: int, width: int):
        super().__init__(hidden)
        inner = width * 2 // 3 // 8 * 8  # three matrices instead of two
        scale = 1.5 * hidden**-0.5
        self.gate_proj = nn.Parameter(torch.randn(inner, hidden) * scale)
        self.up_proj = nn.Parameter(torch.randn(inner, hidden) * scale)
        self.mid_proj = nn.Parameter(torch.randn(inner, inner) * inner**-0.5)
        self.down_proj = nn.Parameter(torch.randn(hidden, inner) * inner**-0.5)

    def process(self, normed: Tensor, positions: Tensor, memory: Memory, slot: int) -> Tensor:
        return normed

    def ffn(self, rows: Tensor) -> Tensor:
        gated = F.silu(F.linear(rows, self.gate_proj)) * F.linear(rows, self.up_proj)
        return F.linear(F.silu(F.linear(gated, self.mid_proj)), self.down_proj)

    def written_prepare(self, slot: int) -> Callable[[WrittenRows, Floats], None]:
        (embedding,) = self.arrays("domain_embedding")
        return lambda rows, out: add_embedding(rows.normed, embedding, out)

    def written_ffn(self) -> Callable[[Floats, NDArray[np.bool_], Floats], None]:
        gate, up, mid, down = self.arrays("gate_proj", "up_proj", "mid_proj", "down_proj")
        return lambda rows, active, out: deep_ffn(rows, active, gate, up, mid, down, out)


class MemoryMaster(PlainFfnMaster):
    """Long range: adds a per-channel decaying mean of everything before. He initialisation."""

    slots = 1

    def __init__(self, hidden: int, width: int):
        super().__init__(hidden, width, nn.init.kaiming_normal_)
        # Half-lives from about 4 to about 1,000 tokens over the channels.
        self.decay_logits = nn.Parameter(torch.linspace(1.6, 7.3, hidden))
        self.memory_scale = nn.Parameter(torch.ones(hidden))

    def process(self, normed: Tensor, positions: Tensor, memory: Memory, slot: int) -> Tensor:
        decay = self.decay_logits.sigmoid()
        remembered = memory.run(slot, (1 - decay) * normed, decay)
        return normed + self.memory_scale * remembered

    def written_prepare(self, slot: int) -> Callable[[WrittenRows, Floats], None]:
        decay, scale, embedding = self.arrays("decay_logits", "memory_scale", "domain_embedding")
        return lambda rows, out: add_memory(rows.normed, rows.states, slot, decay, scale, embedding, out)


MASTERS: tuple[Callable[[int, int], Master], ...] = (
    PositionMaster,
    ConceptMaster,
    ReasoningMaster,
    MemoryMaster,
)
