"""What every expert block has in common: its configuration, its rows of a batch, and what it leaves behind."""

from abc import abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import ClassVar

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn

from model.blocks.experts import compiles, padded_linear
from model.blocks.usage import ExpertUsage
from model.errors import UnsupportedConfig
from model.keys import KeyView
from model.native.experts import project


@dataclass(frozen=True, slots=True, kw_only=True)
class BlockConfig:
    """One variant: the kind of its blocks, the layers that carry one, and the sizes that all kinds have."""

    kind: str
    layers: tuple[int, ...]
    hidden_size: int
    num_experts: int
    num_experts_per_tok: int
    expert_size: int  # width of one expert's hidden layer
    rms_norm_eps: float = 1e-5


@dataclass(slots=True)
class LayerTrace:
    """How one plastic layer routed some consecutive tokens: T tokens, K experts each, H hidden, D key size."""

    expert_ids: Tensor  # (T, K) int64
    gates: Tensor  # (T, K) float32
    queries: Tensor  # (T, D) float32
    normed: Tensor  # (T, H) float32: what the experts read
    output_norms: Tensor | None = None  # (T,): length of the residual stream behind the block, where known

    def cut(self, rows: slice) -> "LayerTrace":
        norms = None if self.output_norms is None else self.output_norms[rows]
        return LayerTrace(
            self.expert_ids[rows], self.gates[rows], self.queries[rows], self.normed[rows], norms
        )


@dataclass(slots=True)
class RoutingTrace:
    """What a sequence's rows left behind in the layers that are asked to leave something."""

    layers: frozenset[int]
    by_layer: dict[int, LayerTrace] = field(default_factory=dict[int, LayerTrace])
    entry: Tensor | None = None  # (T, H) float32: the residual stream before the block of `entry_layer`
    entry_layer: int | None = None  # None: the lowest of `layers`

    def enters_at(self, layer: int) -> bool:
        return layer == (min(self.layers) if self.entry_layer is None else self.entry_layer)


@dataclass(slots=True)
class BlockSpan:
    """Consecutive rows of one sequence: where they stand in it, what they see, what is to be remembered."""

    first: int
    end: int
    start: int  # position of the first row in its sequence
    keys: KeyView | None  # plastic blocks need one
    trace: RoutingTrace | None
    decode: bool
    state: dict[int, Tensor]  # what blocks with memory keep of the sequence, by layer
    flow_steps: int | None = None  # integration steps of flow-matching experts; None: the variant's own
    routed: list[NDArray[np.int64]] | None = None  # takes in expert ids (T, K), a layer after another
    forced: Mapping[int, Tensor] | None = (
        None  # expert ids (rows, K) by layer, in place of the router's choice
    )
    offsets: Mapping[int, Tensor] | None = None  # the session's value offsets (E, H) by layer


class ExpertBlock(nn.Module):
    """A residual block behind a layer's FFN: `hidden + block(hidden)`. Blocks compute in float32."""

    # Learning rates relative to the rest, by parameter name: a scalar that starts at zero must not wait for Adam.
    rate_scale: ClassVar[Mapping[str, float]] = {}
    # Of a prompt, the most rows that it takes in one call: whoever writes beside it waits for a whole one. None: any number.
    rows_at_once: ClassVar[int | None] = None

    def __init__(self, config: BlockConfig):
        super().__init__()
        check_sizes(config)
        self.config = config
        self.norm = nn.Parameter(torch.ones(config.hidden_size))

    @abstractmethod
    def serve(self, hidden: Tensor, layer: int, spans: Sequence[BlockSpan], usage: ExpertUsage) -> Tensor:
        """The block's contribution to `hidden` (T, H), same shape, float32; records usage and traces."""

    @abstractmethod
    def forward(self, hidden: Tensor) -> tuple[Tensor, Tensor]:
        """Training on whole windows: (B, T, H) -> contribution (B, T, H) float32 and the auxiliary loss."""

    @abstractmethod
    def active_parameters(self) -> int:
        """How many parameters one token passes through."""

    def normed(self, hidden: Tensor) -> Tensor:
        """RMSNorm(hidden) in float32."""
        return F.rms_norm(hidden.float(), self.norm.shape, self.norm, self.config.rms_norm_eps)

    def projected(self, hidden: Tensor, matrix: Tensor, *, written: bool) -> tuple[Tensor, Tensor]:
        """The norm of rows (T, H) and a float32 matrix (N, H) by it (T, N); rows being `written` go one by one."""
        if not (written and compiles(hidden, matrix)):
            normed = self.normed(hidden)
            return normed, padded_linear(normed, matrix)
        normed, product = torch.empty_like(hidden), hidden.new_empty(len(hidden), len(matrix))
        weights = (self.norm.detach().numpy(), np.float32(self.config.rms_norm_eps), matrix.detach().numpy())
        project(hidden.numpy(), *weights, normed.numpy(), product.numpy())
        return normed, product


def forced_rows(spans: Sequence[BlockSpan], layer: int) -> list[tuple[slice, Tensor]]:
    """Rows whose experts are given, with their ids (rows, K)."""
    return [
        (slice(span.first, span.first + len(span.forced[layer])), span.forced[layer])
        for span in spans
        if span.forced is not None
    ]


def check_sizes(config: BlockConfig) -> None:
    """Raises UnsupportedConfig unless a token can go to `num_experts_per_tok` different experts of some width."""
    if not 1 <= config.num_experts_per_tok <= config.num_experts:
        raise UnsupportedConfig(
            f"{config.kind}: num_experts_per_tok is {config.num_experts_per_tok}; "
            f"allowed: 1 to num_experts, {config.num_experts}"
        )
    if config.expert_size < 1 or config.hidden_size < 1:
        raise UnsupportedConfig(
            f"{config.kind}: expert_size {config.expert_size}, hidden_size {config.hidden_size}; allowed: above 0"
        )


def check_choice(config: BlockConfig, name: str, allowed: Iterable[str]) -> None:
    """Raises UnsupportedConfig unless the configuration's option `name` is one of the allowed."""
    value, choices = getattr(config, name), sorted(allowed)
    if value not in choices:
        raise UnsupportedConfig(f"{config.kind}: {name} is {value!r}; allowed: {', '.join(choices)}")


def count_parameters(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def all_written(spans: Sequence[BlockSpan]) -> bool:
    """Whether all rows are being written."""
    return all(span.decode for span in spans)


def record_routing(
    usage: ExpertUsage,
    layer: int,
    expert_ids: Tensor,
    spans: Sequence[BlockSpan],
    active: Tensor | None = None,
) -> None:
    """Count what rows selected, expert_ids (T, K), and leave the ids with the spans that ask for them.

    Rows that are written come first in a batch. Rows that are not `active` (T) are not counted.
    """
    host = expert_ids.numpy(force=True)
    counted = None if active is None else active.numpy(force=True)
    written = sum(span.end - span.first for span in spans if span.decode)
    for rows, decode in ((slice(0, written), True), (slice(written, None), False)):
        selected = host[rows] if counted is None else host[rows][counted[rows]]
        if len(selected):
            usage.add((layer,), selected[None], decode=decode)
    for span in spans:
        if span.routed is not None:
            span.routed.append(host[span.first : span.end])
