"""From logits to the next token, one sequence at a time, reproducible by seed whatever else is in the batch.

V vocabulary.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

CANDIDATES = 4096  # how many of the likeliest tokens are looked at before the whole vocabulary has to be


@dataclass(frozen=True, slots=True)
class SamplingParams:
    """How one sequence chooses its tokens. temperature 0 is greedy; top_k 0 and top_p 1 switch those off.

    Presence and frequency penalties count generated tokens, the repetition penalty also the prompt's, as in vLLM.
    """

    max_tokens: int  # 0: the prompt is only read
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    seed: int | None = None
    stop_token_ids: frozenset[int] = frozenset()
    ignore_eos: bool = False
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0
    logit_bias: Mapping[int, float] = field(default_factory=dict[int, float])
    min_tokens: int = 0

    @property
    def adjusted(self) -> bool:
        """Whether `adjust` changes anything, now or later."""
        return bool(
            self.presence_penalty
            or self.frequency_penalty
            or self.repetition_penalty != 1.0
            or self.logit_bias
            or self.min_tokens
        )

    @property
    def greedy(self) -> bool:
        return self.temperature == 0.0 or self.top_k == 1

    @property
    def filtered(self) -> bool:
        return self.top_k > 0 or self.top_p < 1.0 or self.min_p > 0.0


def adjust(
    logits: Tensor,
    params: SamplingParams,
    prompt_token_ids: Tensor,
    generated: Sequence[int],
    eos_token_id: int,
) -> Tensor:
    """Logits (V) float32 after logit_bias, min_tokens and the penalties, in vLLM's order; a new tensor.

    prompt_token_ids: int64, in any order. The repetition penalty divides positive logits and multiplies
    negative ones (CTRL, section 4.1); presence is subtracted once, frequency once for each occurrence.
    """
    logits = logits.clone()
    if params.logit_bias:
        biased = logits.new_tensor(list(params.logit_bias), dtype=torch.int64)
        logits[biased] += logits.new_tensor(list(params.logit_bias.values()))
    if len(generated) < params.min_tokens:
        endings = params.stop_token_ids | (frozenset() if params.ignore_eos else {eos_token_id})
        logits[logits.new_tensor(sorted(endings), dtype=torch.int64)] = -torch.inf
    written, counts = logits.new_tensor(generated, dtype=torch.int64).unique(return_counts=True)
    if params.repetition_penalty != 1.0:
        seen = torch.cat((prompt_token_ids, written)).unique()
        values = logits[seen]
        logits[seen] = torch.where(
            values > 0, values / params.repetition_penalty, values * params.repetition_penalty
        )
    if params.presence_penalty or params.frequency_penalty:
        logits[written] -= params.presence_penalty + params.frequency_penalty * counts
    return logits


def sample(logits: Tensor, params: SamplingParams, generator: torch.Generator) -> int:
    """The next token of one sequence from its logits (V) float32.

    Order of the filters as in vLLM and transformers: temperature, top_k, top_p, min_p. One uniform number is
    drawn per token and inverted on the cumulative distribution: in the vocabulary's order without filters, in
    falling order with them.
    """
    if params.greedy:
        return int(logits.argmax())
    scaled = logits / params.temperature
    probabilities = (scaled - scaled.logsumexp(-1)).exp()
    number = uniform(generator)
    if not params.filtered:
        return _invert(probabilities, number)
    count = CANDIDATES if params.top_k == 0 else min(params.top_k, CANDIDATES)
    while True:
        count = min(count, len(probabilities))
        top, token_ids = probabilities.topk(count)
        complete = count == len(probabilities) or params.top_k in range(1, count + 1)
        kept = _kept(top, params)
        if complete or kept < count:  # the cut lies inside the candidates
            return int(token_ids[_invert(top[:kept], number)])
        count = len(probabilities)


def uniform(generator: torch.Generator) -> float:
    """The number from 0 to 1 that a sequence spends on its next token."""
    return float(torch.rand((), generator=generator, dtype=torch.float64))


def _invert(weights: Tensor, number: float) -> int:
    """The index whose stretch of the cumulative weights holds `number`, from 0 to 1, of their sum."""
    cumulative = weights.double().cumsum(0)
    chosen = int(torch.searchsorted(cumulative, number * cumulative[-1], right=True))
    return min(chosen, len(weights) - 1)


def _kept(descending: Tensor, params: SamplingParams) -> int:
    """How many of the leading candidates survive top_p and min_p; never none."""
    kept = len(descending)
    top_k_total = descending.sum() if params.top_k else descending.new_ones(())
    if params.top_p < 1.0:
        before = descending.cumsum(0) - descending  # mass ahead of each candidate
        kept = min(kept, int((before < params.top_p * top_k_total).sum()))
    if params.min_p > 0.0:
        kept = min(kept, int((descending >= params.min_p * descending[0]).sum()))
    return max(kept, 1)
