"""The next token of each writing sequence, and what its answer tells of the choice. Pure but for the generators."""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from model.errors import GrammarExhausted
from model.logprobs import TokenScore, score_tokens
from model.sampling import adjust, sample
from server.engine.sequence import FinishReason, Sequence


@dataclass(frozen=True, slots=True)
class Choice:
    """A sequence's next token, or None and why there is none: `error` where the logits are not finite."""

    sequence: Sequence
    token_id: int | None
    scores: tuple[TokenScore, ...] = ()
    failure: FinishReason = "error"


def choose(sequences: list[Sequence], logits: Tensor) -> Iterator[Choice]:
    """One choice for each sequence and its row of logits (n, V) float32."""
    sane = logits.sum(dim=1).isfinite().tolist()  # a sum is finite only if every term is
    greedy = logits.argmax(dim=1).tolist()
    for i, sequence in enumerate(sequences):
        if not sane[i]:
            yield Choice(sequence, None)
            continue
        try:
            token_id = _next_token(sequence, logits[i], greedy[i])
        except GrammarExhausted:
            yield Choice(sequence, None, failure="too_complex")
            continue
        yield Choice(sequence, token_id, _scores(sequence, logits[i], token_id))


def _next_token(sequence: Sequence, logits: Tensor, likeliest: int) -> int:
    """`likeliest` is what the logits (V) themselves say. Raises GrammarExhausted."""
    params, wanted = sequence.params, logits
    if params.adjusted:
        assert sequence.prompt_ids is not None, sequence.sequence_id
        wanted = adjust(wanted, params, sequence.prompt_ids, sequence.generated, sequence.eos_token_id)
    if sequence.grammar is not None:
        wanted = sequence.grammar.constrain(wanted)
    if sequence.generator is not None:
        token_id = sample(wanted, params, sequence.generator)
    else:
        token_id = likeliest if wanted is logits else int(wanted.argmax())
    if sequence.grammar is not None:
        sequence.grammar.accept(token_id)
    return token_id


def _scores(sequence: Sequence, logits: Tensor, token_id: int) -> tuple[TokenScore, ...]:
    top = sequence.report.top_logprobs
    if top is None:
        return ()
    return tuple(score_tokens(logits.unsqueeze(0), torch.tensor([token_id], device=logits.device), top))
