"""Log-probabilities in each of OpenAI's two forms. Plain dictionaries out."""

from collections.abc import Sequence
from typing import Any

from model.logprobs import TokenScore
from model.tokenizer import TextTokenizer
from server.answer_text import ScoredToken

Json = dict[str, Any]  # Any: JSON


def completion_logprobs(scored: Sequence[ScoredToken], tokenizer: TextTokenizer) -> Json:
    """Four arrays, an entry for each token. `top_logprobs` always holds the token itself."""
    return {
        "tokens": [token_text(tokenizer, each.score.token_id) for each in scored],
        "token_logprobs": [each.score.logprob for each in scored],
        "top_logprobs": [_likeliest(each.score, tokenizer) for each in scored],
        "text_offset": [each.offset for each in scored],
    }


def chat_logprobs(scored: Sequence[ScoredToken], tokenizer: TextTokenizer) -> Json:
    """A list of tokens, each with its likeliest alternatives in falling order."""
    content = [
        _described(each.score.token_id, each.score.logprob, tokenizer)
        | {"top_logprobs": [_described(i, logprob, tokenizer) for i, logprob in each.score.top]}
        for each in scored
    ]
    return {"content": content, "refusal": None}


def joined(before: Json | None, after: Json) -> Json:
    """The log-probabilities of two stretches of text as one; `before` is extended."""
    if before is None:
        return after
    for name, values in after.items():
        if values is not None:
            before[name].extend(values)
    return before


def token_text(tokenizer: TextTokenizer, token_id: int) -> str:
    """A token's text; one that is part of a character is written as OpenAI does, `bytes:\\xf0\\x9f`."""
    data = tokenizer.token_bytes(token_id)
    try:
        return data.decode()
    except UnicodeDecodeError:
        return "bytes:" + "".join(f"\\x{byte:02x}" for byte in data)


def _likeliest(score: TokenScore, tokenizer: TextTokenizer) -> dict[str, float] | None:
    if score.logprob is None:
        return None
    found: dict[str, float] = {}
    for token_id, logprob in (*score.top, (score.token_id, score.logprob)):
        found.setdefault(token_text(tokenizer, token_id), logprob)
    return found


def _described(token_id: int, logprob: float | None, tokenizer: TextTokenizer) -> Json:
    data = tokenizer.token_bytes(token_id)
    return {"token": token_text(tokenizer, token_id), "logprob": logprob, "bytes": list(data)}
