"""Prompts to token ids, off the event loop and within bounds."""

from collections.abc import Mapping, Sequence

from starlette.concurrency import run_in_threadpool

from model.tokenizer import TextTokenizer
from server.engine.errors import ContextLengthExceeded
from server.refusals import InvalidRequest
from server.registry import Endpoint
from server.schemas.completions import Prompt

PIECE_CHARS = 16_384


async def encode_prompt(
    endpoint: Endpoint, prompt: Prompt, param: str, *, add_special_tokens: bool
) -> tuple[int, ...]:
    """Token ids of a prompt, or the given ones checked. Raises InvalidRequest, ContextLengthExceeded."""
    if isinstance(prompt, str):
        return await encode_text(endpoint, prompt, add_special_tokens=add_special_tokens)
    check_token_ids(prompt, endpoint.tokenizer.vocab_size, param)
    return prompt


async def encode_text(endpoint: Endpoint, text: str, *, add_special_tokens: bool = True) -> tuple[int, ...]:
    """Token ids of a text. Raises ContextLengthExceeded when it is hopelessly long."""
    tokenizer, limit = endpoint.tokenizer, endpoint.max_model_len
    return await run_in_threadpool(_encode_text, tokenizer, text, limit, add_special_tokens)


async def encode_messages(endpoint: Endpoint, messages: Sequence[Mapping[str, str]]) -> tuple[int, ...]:
    """Token ids of a conversation. Raises ChatTemplateError, ContextLengthExceeded."""
    return await run_in_threadpool(_encode_chat, endpoint.tokenizer, messages, endpoint.max_model_len)


def check_token_ids(token_ids: Sequence[int], vocab_size: int, param: str) -> None:
    """Raises InvalidRequest for an id that the vocabulary does not have."""
    for i, token_id in enumerate(token_ids):
        if not 0 <= token_id < vocab_size:
            raise InvalidRequest(
                f"{param}.{i} is {token_id}; allowed: token ids from 0 to {vocab_size - 1}", f"{param}.{i}"
            )


def check_logit_bias(logit_bias: Mapping[int, float], vocab_size: int) -> None:
    """Raises InvalidRequest for an id that the vocabulary does not have."""
    for token_id in logit_bias:
        if token_id >= vocab_size:
            raise InvalidRequest(
                f"logit_bias names the token {token_id}; allowed: token ids from 0 to {vocab_size - 1}",
                "logit_bias",
            )


def _encode_text(
    tokenizer: TextTokenizer, text: str, max_model_len: int, add_special_tokens: bool
) -> tuple[int, ...]:
    _refuse_hopeless(tokenizer, [text], max_model_len)
    return tuple(tokenizer.encode(text, add_special_tokens=add_special_tokens))


def _encode_chat(
    tokenizer: TextTokenizer, messages: Sequence[Mapping[str, str]], max_model_len: int
) -> tuple[int, ...]:
    _refuse_hopeless(tokenizer, [message["content"] for message in messages], max_model_len)
    return tuple(tokenizer.encode_chat(messages))


def _refuse_hopeless(tokenizer: TextTokenizer, texts: Sequence[str], max_model_len: int) -> None:
    """Count a very long text piece by piece and give up early: encoding it whole would take far more memory.

    Cutting a text changes its count by a token or two a piece, hence twice the limit.
    """
    if sum(map(len, texts)) <= 2 * PIECE_CHARS:
        return
    counted = 0
    for text in texts:
        for first in range(0, len(text), PIECE_CHARS):
            counted += len(tokenizer.encode(text[first : first + PIECE_CHARS]))
            if counted > 2 * max_model_len:
                raise ContextLengthExceeded(counted, 1, max_model_len)
