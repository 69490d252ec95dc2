"""How likely the model itself finds given tokens, before temperature, penalties and filters.

T tokens, V vocabulary, N likeliest tokens beside each.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from model.head import HEAD_CHUNK
from model.transformer import Transformer


@dataclass(frozen=True, slots=True)
class TokenScore:
    """The log-probability of one token, and the likeliest tokens of its place in falling order."""

    token_id: int
    logprob: float | None  # None: nothing comes before it
    top: tuple[tuple[int, float], ...] = ()  # token id and log-probability


def score_tokens(logits: Tensor, token_ids: Tensor, top: int) -> list[TokenScore]:
    """Scores of tokens (T) under logits (T, V) float32, each with its `top` likeliest.

    log p = logit - logsumexp. A float32 logsumexp may round below its largest term: nothing is above 0.
    Raises ValueError when the logits are not finite.
    """
    normalizer = logits.logsumexp(-1, keepdim=True)  # (T, 1)
    chosen = (logits.gather(1, token_ids.unsqueeze(1)) - normalizer).clamp_(max=0.0)  # (T, 1)
    if not (chosen.isfinite() & normalizer.isfinite()).all():
        raise ValueError("logits are not finite")
    likeliest, top_ids = logits.topk(min(top, logits.shape[1]), dim=1)  # (T, N)
    rows = zip(
        token_ids.tolist(),
        chosen.squeeze(1).tolist(),
        top_ids.tolist(),
        (likeliest - normalizer).clamp_(max=0.0).tolist(),
        strict=True,
    )
    return [
        TokenScore(token_id, logprob, tuple(zip(ids, values, strict=True)))
        for token_id, logprob, ids, values in rows
    ]


@torch.inference_mode()
def score_hidden(
    model: Transformer, hidden: Tensor, token_ids: Sequence[int], top: int
) -> Iterator[TokenScore]:
    """Scores of the tokens that follow hidden states (T, H), a few rows of logits alive at a time.

    Raises ValueError when a hidden state is not finite.
    """
    targets = torch.tensor(token_ids, device=hidden.device)
    for first in range(0, len(targets), HEAD_CHUNK):
        rows = slice(first, first + HEAD_CHUNK)
        logits = model.logits(hidden[: len(targets)][rows], targets[rows])
        yield from score_tokens(logits, targets[rows], top)
