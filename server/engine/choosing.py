"""The next token of each writing sequence, and what its answer tells of the choice. Pure but for the generators."""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from model.errors import GrammarExhausted
from model.graphs.drawing import draw, pays
from model.logprobs import TokenScore, score_tokens
from model.sampling import adjust, sample, uniform
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
    all_together = pays(logits)
    together = [all_together and _is_plain(sequence) for sequence in sequences]
    temperatures, numbers = [0.0] * len(sequences), [0.0] * len(sequences)
    for i, sequence in enumerate(sequences):
        if together[i] and sequence.generator is not None:
            temperatures[i], numbers[i] = sequence.params.temperature, uniform(sequence.generator)
    tokens = draw(logits, temperatures, numbers)
    for i, sequence in enumerate(sequences):
        if tokens[i] < 0:
            yield Choice(sequence, None)
            continue
        try:
            token_id = tokens[i] if together[i] else _next_token(sequence, logits[i], tokens[i])
        except GrammarExhausted:
            yield Choice(sequence, None, failure="too_complex")
            continue
        yield Choice(sequence, token_id, _scores(sequence, logits, i, token_id))


def _is_plain(sequence: Sequence) -> bool:
    """Whether nothing but the temperature stands between its logits and its next token."""
    params = sequence.params
    filtered = params.filtered and sequence.generator is not None
    return not params.adjusted and not filtered and sequence.grammar is None


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


def _scores(sequence: Sequence, logits: Tensor, row: int, token_id: int) -> tuple[TokenScore, ...]:
    """What a sequence that asks for it is told of its row of logits (n, V)."""
    top = sequence.report.top_logprobs
    if top is None:
        return ()
    own = logits[row : row + 1]
    return tuple(score_tokens(own, torch.tensor([token_id], device=logits.device), top))
