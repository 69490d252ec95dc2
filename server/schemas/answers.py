"""What goes out, as the API's description tells it. Nothing is built from these: tests hold the answers against them."""

from collections.abc import Mapping
from typing import Any, Literal, NotRequired

from typing_extensions import TypedDict

Plasticity = Literal["off", "read", "learn"]


class PromptTokensDetails(TypedDict):
    cached_tokens: int


class Usage(TypedDict):
    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: PromptTokensDetails


class OffsetReport(TypedDict):
    windows: int


class KeySpan(TypedDict):
    from_token: int
    key_version: int


class KeyReport(TypedDict):
    """Which keys an answer was computed with, and what it taught. Null on endpoints without routing keys."""

    key_version: int | None
    scope: str | None
    plasticity: Plasticity
    learned_tokens: int
    value_offsets: NotRequired[OffsetReport]
    key_versions: NotRequired[list[KeySpan]]


class CompletionLogprobs(TypedDict):
    tokens: list[str]
    token_logprobs: list[float | None]
    top_logprobs: list[dict[str, float] | None]
    text_offset: list[int]


class CompletionChoice(TypedDict):
    index: int
    text: str
    logprobs: CompletionLogprobs | None
    finish_reason: Literal["stop", "length"]
    routed_experts: NotRequired[str]


class CompletionAnswer(TypedDict):
    id: str
    object: Literal["text_completion"]
    created: int
    model: str
    system_fingerprint: str
    choices: list[CompletionChoice]
    usage: Usage
    libration: KeyReport


class TokenLogprob(TypedDict):
    token: str
    logprob: float
    bytes: list[int]


class ChosenTokenLogprob(TokenLogprob):
    top_logprobs: list[TokenLogprob]


class ChatLogprobs(TypedDict):
    content: list[ChosenTokenLogprob]
    refusal: None


class AssistantMessage(TypedDict):
    role: Literal["assistant"]
    content: str
    refusal: None


class ChatChoice(TypedDict):
    index: int
    message: AssistantMessage
    logprobs: ChatLogprobs | None
    finish_reason: Literal["stop", "length"]
    routed_experts: NotRequired[str]


class ChatAnswer(TypedDict):
    id: str
    object: Literal["chat.completion"]
    created: int
    model: str
    system_fingerprint: str
    choices: list[ChatChoice]
    usage: Usage
    libration: KeyReport


class Model(TypedDict):
    id: str
    object: Literal["model"]
    created: int
    owned_by: str
    max_model_len: int


class ModelList(TypedDict):
    object: Literal["list"]
    data: list[Model]


class Tokens(TypedDict):
    count: int
    max_model_len: int
    tokens: list[int]
    token_strs: list[str] | None


class Text(TypedDict):
    prompt: str


class TokenizerInfo(TypedDict):
    tokenizer_class: str
    vocab_size: int
    model_max_length: int
    add_bos_token: bool
    bos_token: str | None
    eos_token: str
    pad_token: str | None
    unk_token: str | None
    chat_template: str | None


class Judgement(TypedDict):
    id: str
    reward: float
    scope: str
    learned_tokens: int


class Liveness(TypedDict):
    status: Literal["live"]


class Readiness(TypedDict):
    status: Literal["ready", "degraded"]
    reasons: list[str]


class Health(Readiness):
    version: str
    uptime_s: float
    endpoints: list[str]


Responses = dict[int | str, dict[str, Any]]  # Any: as FastAPI declares it


def answers(model: type, other_media: Mapping[str, str] | None = None) -> Responses:
    """The `responses` of a route that answers 200 with this, or with other media types, which are described."""
    content = {
        media: {"schema": {"type": "string", "description": text}}
        for media, text in (other_media or {}).items()
    }
    return {200: {"model": model, "content": content}}
