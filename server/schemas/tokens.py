"""POST /tokenize and /detokenize."""

from collections.abc import Mapping
from typing import Annotated, Any, ClassVar

from pydantic import Field, model_validator

from server.refusals import InvalidRequest
from server.schemas import neutral
from server.schemas.base import Body, Name
from server.schemas.chat import Messages
from server.schemas.generation import TokenId


class TokenizeBody(Body):
    """A text, or a conversation as the model would see it."""

    neutral: ClassVar[Mapping[str, tuple[Any, ...]]] = neutral.TOKENIZE  # Any: JSON values

    model: Name | None = None  # None: the first endpoint
    prompt: str | None = None
    messages: Messages | None = None
    add_special_tokens: bool = True  # to a prompt; in a conversation they are the template's
    return_token_strs: bool = False

    @model_validator(mode="after")
    def _one_of_two(self) -> "TokenizeBody":
        if (self.prompt is None) == (self.messages is None):
            raise InvalidRequest("give either 'prompt' or 'messages'", "prompt")
        return self


class DetokenizeBody(Body):
    model: Name | None = None
    tokens: Annotated[list[TokenId], Field(fail_fast=True)]
