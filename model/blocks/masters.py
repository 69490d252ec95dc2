"""The Masters of MoM: what each does to its input before its FFN, M_i = FFN_i(P_i(x) + e_i) (eq. 2).

The paper names four (section 2.3); each is resolved here in the simplest form that earns its name, and each starts
from an initialisation of its own. Projections are float32. T tokens, H hidden, F width.
"""

from abc import abstractmethod
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from model.blocks.experts import padded_linear
from model.recurrence import Memory

POSITION_FEATURES = 64
POSITION_PERIOD = 10_000.0
CONCEPT_SLOTS = 64
CONCEPT_RANK = 32


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


class PlainFfnMaster(Master):
    """A Master whose FFN is `up(silu(down(x)))`."""

    def __init__(self, hidden: int, width: int, initialize: Callable[[Tensor], Tensor]):
        super().__init__(hidden)
        self.down_proj = nn.Parameter(initialize(torch.empty(width, hidden)))
        self.up_proj = nn.Parameter(initialize(torch.empty(hidden, width)))

    def ffn(self, rows: Tensor) -> Tensor:
        return F.linear(F.silu(F.linear(rows, self.down_proj)), self.up_proj)


class PositionMaster(PlainFfnMaster):
    """Structure: knows where in the text a token stands. Orthogonal initialisation."""

    def __init__(self, hidden: int, width: int):
        super().__init__(hidden, width, nn.init.orthogonal_)
        self.position_proj = nn.Parameter(torch.randn(hidden, POSITION_FEATURES) * 0.02)

    def process(self, normed: Tensor, positions: Tensor, memory: Memory, slot: int) -> Tensor:
        half = POSITION_FEATURES // 2
        frequencies = POSITION_PERIOD ** (-torch.arange(half, device=positions.device) / half)
        angles = positions.unsqueeze(-1) * frequencies
        features = torch.cat((angles.sin(), angles.cos()), dim=-1)  # (T, POSITION_FEATURES)
        return normed + padded_linear(features, self.position_proj)


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


MASTERS: tuple[Callable[[int, int], Master], ...] = (
    PositionMaster,
    ConceptMaster,
    ReasoningMaster,
    MemoryMaster,
)
