"""One sequence from admission to its last token. Plain data; the engine thread alone changes it."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray

from model.blocks.base import RoutingTrace
from model.grammar import GrammarState
from model.keys import KeyView
from model.kv_cache import SequenceCache
from model.logprobs import TokenScore
from model.sampling import SamplingParams
from server.engine.prefix_cache import PrefixUse
from server.engine.renewal import KeyRenewal

FinishReason = Literal["stop", "length", "cancelled", "too_complex", "error"]
RoutedRows = NDArray[np.uint8 | np.uint16]  # (tokens, routed layers, K): expert ids


@dataclass(frozen=True, slots=True)
class Report:
    """What an answer tells besides its text."""

    top_logprobs: int | None = None  # likeliest tokens told beside each token; None: no log-probabilities
    echo: bool = False  # the prompt is part of the text
    routed_experts: bool = False

    @property
    def scores_prompt(self) -> bool:
        return self.echo and self.top_logprobs is not None


@dataclass(frozen=True, slots=True)
class TokenEvent:
    """What one step hands to one sequence's reader. Scores come for all tokens or, unless asked for, for none."""

    token_ids: tuple[int, ...]
    finish_reason: FinishReason | None = None
    scores: tuple[TokenScore, ...] = ()
    prompt_scores: tuple[TokenScore, ...] = ()  # from the prompt's second token on; before any of `token_ids`
    routed: tuple[RoutedRows, ...] = ()  # of the tokens fed so far, in order

    def followed_by(self, later: "TokenEvent") -> "TokenEvent":
        """Both as one."""
        return TokenEvent(
            self.token_ids + later.token_ids,
            later.finish_reason,
            self.scores + later.scores,
            self.prompt_scores + later.prompt_scores,
            self.routed + later.routed,
        )


@dataclass(slots=True, eq=False, weakref_slot=True)
class Sequence:
    """A prompt being read, then a text being written."""

    sequence_id: str
    prompt_token_ids: tuple[int, ...]
    params: SamplingParams
    endpoint: str
    variant: str | None  # None: the untouched base
    keys: KeyView | None  # the version pinned for the whole request; None: a variant without routing keys
    teach: Callable[["Lesson"], None] | None  # takes the routing of the prompt's chunks in
    deliver: Callable[[TokenEvent], None]
    eos_token_id: int
    arrived_at: float
    flow_steps: int | None = None  # of flow-matching experts; None: the variant's own
    report: Report = Report()
    grammar: GrammarState | None = None  # of what may be written; None: anything
    forced: RoutedRows | None = (
        None  # experts of the prompt's leading tokens, in place of the router's choice
    )
    offsets: Mapping[int, torch.Tensor] | None = None  # value offsets of its session, pinned as the keys are
    newest_offsets: Callable[[KeyView], Mapping[int, torch.Tensor]] | None = None  # for renewed keys
    renewal: KeyRenewal | None = None  # of the keys while the prompt is being read; None: they stay
    prefix: PrefixUse | None = None  # None: its rows are like nobody else's
    rows_at_once: int | None = (
        None  # of its prompt, as its variant's blocks want; None: as the scheduler says
    )
    admitted_at: float | None = None
    first_token_at: float | None = None
    last_token_at: float | None = None
    prefilled: int = 0  # prompt tokens already in the cache
    cached_tokens: int = 0  # of those, the first, which were not computed
    generated: list[int] = field(default_factory=list[int])
    cache: SequenceCache | None = None
    generator: torch.Generator | None = None
    prompt_ids: torch.Tensor | None = None  # the prompt's distinct tokens, for a request that adjusts logits
    routed: list[RoutedRows] = field(default_factory=list[RoutedRows])  # not yet delivered
    ended: FinishReason | None = None  # set by the reader: it needs no more tokens, and why

    @property
    def reservation(self) -> int:
        """Cache positions that the sequence may ever need. The last token is never fed back."""
        return len(self.prompt_token_ids) + max(1, self.params.max_tokens) - 1

    @property
    def decoding(self) -> bool:
        return self.prefilled == len(self.prompt_token_ids)

    @property
    def resting(self) -> bool:
        """It waits for newer keys."""
        return self.renewal is not None and self.renewal.resting

    def finish_reason(self) -> FinishReason | None:
        """Why the sequence ends after its newest token, or None."""
        newest = self.generated[-1]
        if newest in self.params.stop_token_ids or (
            newest == self.eos_token_id and not self.params.ignore_eos
        ):
            return "stop"
        return "length" if len(self.generated) == self.params.max_tokens else None


@dataclass(slots=True)
class Lesson:
    """A prefill chunk of a teaching sequence: how it was routed, and what the tokens after it were.

    hidden (T, H) before the final norm; targets (T): the next prompt token of each row.
    """

    sequence: Sequence
    keys: KeyView
    trace: RoutingTrace
    start: int  # position of the first row in the prompt
    hidden: torch.Tensor
    targets: torch.Tensor
    offsets: Mapping[int, torch.Tensor] | None = None  # value offsets that the rows were computed with
    gradient: torch.Tensor | None = None  # (T, H): direct credit's G, once somebody has computed it
    # Until its gradient is computed: the lessons of its step, itself among them.
    beside: tuple["Lesson", ...] = ()
