"""POST /v1/chat/completions."""

from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, Literal

from pydantic import BeforeValidator, Field, model_validator

from server.engine.sequence import Report
from server.refusals import InvalidRequest
from server.schemas import neutral
from server.schemas.base import Body
from server.schemas.generation import GenerationBody, MaxTokens, TopLogprobs

DEFAULT_MAX_TOKENS = 1024  # or what is left of the context, when that is less
MAX_MESSAGES = 2048


class TextPart(Body):
    type: Literal["text"]
    text: str


def _parts(value: Any) -> Any:  # Any: JSON
    return [{"type": "text", "text": value}] if isinstance(value, str) else value


class Message(Body):
    """One turn of a conversation. Text only."""

    neutral: ClassVar[Mapping[str, tuple[Any, ...]]] = neutral.MESSAGE  # Any: JSON values

    role: Literal["system", "developer", "user", "assistant"]
    content: Annotated[
        list[TextPart],
        Field(max_length=MAX_MESSAGES, fail_fast=True),
        BeforeValidator(_parts, json_schema_input_type=str | list[TextPart]),
    ]

    @property
    def text(self) -> str:
        return "".join(part.text for part in self.content)


Messages = Annotated[list[Message], Field(min_length=1, max_length=MAX_MESSAGES, fail_fast=True)]


def as_template_input(messages: list[Message]) -> list[dict[str, str]]:
    """Messages as a chat template reads them, which knows no developers."""
    return [
        {"role": "system" if message.role == "developer" else message.role, "content": message.text}
        for message in messages
    ]


class ChatBody(GenerationBody):
    """The assistant's next turn."""

    neutral: ClassVar[Mapping[str, tuple[Any, ...]]] = neutral.CHAT  # Any: JSON values

    messages: Messages
    max_completion_tokens: MaxTokens | None = None  # OpenAI's newer name of max_tokens
    logprobs: bool = False
    top_logprobs: TopLogprobs = 0

    @model_validator(mode="after")
    def _one_limit(self) -> "ChatBody":
        both = self.max_tokens is not None and self.max_completion_tokens is not None
        if both and self.max_tokens != self.max_completion_tokens:
            raise InvalidRequest(
                "'max_tokens' and 'max_completion_tokens' differ; send one of them", "max_completion_tokens"
            )
        return self

    @model_validator(mode="after")
    def _alternatives_to_something(self) -> "ChatBody":
        if self.top_logprobs and not self.logprobs:
            raise InvalidRequest("'top_logprobs' is only allowed with 'logprobs': true", "top_logprobs")
        return self

    @property
    def report(self) -> Report:
        return Report(self.top_logprobs if self.logprobs else None, routed_experts=self.return_routed_experts)

    def max_new_tokens(self, room: int) -> int:
        """What was asked for, or the default within the `room` that the prompt leaves."""
        asked = self.max_completion_tokens or self.max_tokens
        return asked if asked is not None else max(1, min(DEFAULT_MAX_TOKENS, room))
