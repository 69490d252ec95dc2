"""POST /v1/completions."""

from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, TypeVar

from pydantic import Field, PlainValidator, model_validator

from server.engine.sequence import Report
from server.refusals import InvalidRequest, InvalidType
from server.schemas import neutral
from server.schemas.generation import MOST_TOKENS, GenerationBody, TokenId, TopLogprobs

DEFAULT_MAX_TOKENS = 16  # OpenAI's
MAX_PROMPTS = 64

Prompt = str | tuple[int, ...]
Text = Annotated[str, Field(min_length=1)]
Tokens = Annotated[list[TokenId], Field(min_length=1)]
OnePrompt = Text | Tokens
T = TypeVar("T")
Several = Annotated[list[T], Field(min_length=1, max_length=MAX_PROMPTS)]
FORMS = "a string, a list of strings, a list of token ids or a list of lists of token ids"


def _read_prompts(value: Any) -> tuple[Prompt, ...]:  # Any: JSON
    """One of the four forms as a tuple of prompts. Stops at the first fault: a list may be very long."""
    if isinstance(value, str):
        return (_text(value, "prompt"),)
    if not isinstance(value, list):
        raise InvalidType(f"prompt must be {FORMS}", "prompt")
    items: list[Any] = value
    if not items:
        raise InvalidRequest("prompt is empty; allowed: at least one token", "prompt")
    if isinstance(items[0], int) and not isinstance(items[0], bool):
        return (_token_ids(items, "prompt"),)
    if len(items) > MAX_PROMPTS:
        raise InvalidRequest(f"prompt is a list of {len(items)} prompts; allowed: {MAX_PROMPTS}", "prompt")
    return tuple(_one_of_many(item, f"prompt.{i}", type(items[0])) for i, item in enumerate(items))


def _one_of_many(item: Any, param: str, kind: type) -> Prompt:  # Any: JSON
    if isinstance(item, str) and kind is str:
        return _text(item, param)
    if isinstance(item, list) and kind is list:
        return _token_ids(item, param)
    raise InvalidType(f"prompt must be {FORMS}", param)


def _text(text: str, param: str) -> str:
    if not text:
        raise InvalidRequest(f"{param} is empty; allowed: at least one token", param)
    return text


def _token_ids(items: list[Any], param: str) -> tuple[int, ...]:  # Any: JSON
    if not items:
        raise InvalidRequest(f"{param} is empty; allowed: at least one token", param)
    for i, item in enumerate(items):
        if not isinstance(item, int) or isinstance(item, bool):
            raise InvalidType(f"{param}.{i} must be a token id, a whole number", f"{param}.{i}")
    return tuple(items)


class CompletionBody(GenerationBody):
    """Text that goes on where the prompt ends."""

    neutral: ClassVar[Mapping[str, tuple[Any, ...]]] = neutral.COMPLETION  # Any: JSON values

    prompt: Annotated[
        tuple[Prompt, ...],
        PlainValidator(_read_prompts, json_schema_input_type=OnePrompt | Several[Text] | Several[Tokens]),
    ]
    max_tokens: Annotated[int, Field(ge=0, le=MOST_TOKENS)] | None = None  # 0, with echo: score the prompt
    logprobs: TopLogprobs | None = None
    echo: bool = False
    add_special_tokens: bool = True  # those that the tokenizer puts around a text, if it does

    @model_validator(mode="after")
    def _some_text(self) -> "CompletionBody":
        if self.max_tokens == 0 and not self.echo:
            raise InvalidRequest("max_tokens is 0; allowed: at least 1, or 0 with 'echo': true", "max_tokens")
        return self

    @property
    def report(self) -> Report:
        return Report(self.logprobs, self.echo, self.return_routed_experts)
