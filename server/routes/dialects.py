"""How an answer looks in each of OpenAI's two dialects. Plain dictionaries out; knows no engine."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

from server.generation import KeyUse, TextDelta

Json = dict[str, Any]  # Any: JSON


@dataclass(frozen=True, slots=True)
class Frame:
    """What every object of one answer carries."""

    answer_id: str
    created: int  # unix seconds
    model: str
    system_fingerprint: str

    def around(self, kind: str, choices: list[Json]) -> Json:
        return {
            "id": self.answer_id,
            "object": kind,
            "created": self.created,
            "model": self.model,
            "system_fingerprint": self.system_fingerprint,
            "choices": choices,
        }


@dataclass(slots=True)
class Tally:
    """What an answer has come to so far."""

    prompt_tokens: int
    choices: int
    completion_tokens: int = 0
    texts: list[str] = field(default_factory=list[str])
    finish_reasons: dict[int, str] = field(default_factory=dict[int, str])

    def __post_init__(self) -> None:
        self.texts = [""] * self.choices

    def add(self, index: int, delta: TextDelta) -> None:
        self.completion_tokens += len(delta.token_ids)
        self.texts[index] += delta.text
        if delta.finish_reason is not None:
            self.finish_reasons[index] = delta.finish_reason

    @property
    def complete(self) -> bool:
        return len(self.finish_reasons) == self.choices

    def usage(self) -> Json:
        return {
            "prompt_tokens": self.prompt_tokens,
            "completion_tokens": self.completion_tokens,
            "total_tokens": self.prompt_tokens + self.completion_tokens,
        }


class Dialect(Protocol):
    """The kinds of objects, and the choices in them."""

    prefix: str
    whole: str
    piece: str

    def choice(self, index: int, text: str, finish_reason: str | None) -> Json: ...

    def piece_choice(self, index: int, text: str, finish_reason: str | None) -> Json: ...

    def opening(self, index: int) -> Json | None:
        """The choice of a stream's first chunk, if the dialect has one."""
        ...


class CompletionDialect:
    prefix = "cmpl-"
    whole = piece = "text_completion"

    def choice(self, index: int, text: str, finish_reason: str | None) -> Json:
        return {"index": index, "text": text, "logprobs": None, "finish_reason": finish_reason}

    piece_choice = choice

    def opening(self, index: int) -> Json | None:
        return None


class ChatDialect:
    prefix = "chatcmpl-"
    whole = "chat.completion"
    piece = "chat.completion.chunk"

    def choice(self, index: int, text: str, finish_reason: str | None) -> Json:
        message = {"role": "assistant", "content": text, "refusal": None}
        return {"index": index, "message": message, "logprobs": None, "finish_reason": finish_reason}

    def piece_choice(self, index: int, text: str, finish_reason: str | None) -> Json:
        delta = {"content": text} if text else {}
        return {"index": index, "delta": delta, "logprobs": None, "finish_reason": finish_reason}

    def opening(self, index: int) -> Json | None:
        delta = {"role": "assistant", "content": ""}
        return {"index": index, "delta": delta, "logprobs": None, "finish_reason": None}


def key_report(uses: list[KeyUse]) -> Json:
    """The `libration` object of an answer. Several choices share a scope; the first one's version is told."""
    return {
        "key_version": uses[0].key_version,
        "scope": uses[0].scope,
        "plasticity": uses[0].plasticity,
        "learned_tokens": sum(use.learned_tokens for use in uses),
    }


def key_headers(uses: list[KeyUse]) -> Mapping[str, str]:
    version = uses[0].key_version
    return {} if version is None else {"X-Key-Version": str(version)}
