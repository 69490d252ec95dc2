"""How an answer looks in each of OpenAI's two dialects. Plain dictionaries out; knows no engine."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Protocol

from model.tokenizer import TextTokenizer
from server.answer_text import ScoredToken, TextDelta
from server.generation import KeyUse
from server.routes.logprobs import chat_logprobs, completion_logprobs, joined

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
class Part:
    """What one delta adds to a choice, or what all of them have come to."""

    text: str = ""
    finish_reason: str | None = None
    logprobs: Json | None = None
    extras: Json = field(default_factory=dict[str, Any])

    def add(self, later: "Part") -> None:
        self.text += later.text
        self.finish_reason = later.finish_reason or self.finish_reason
        if later.logprobs is not None:
            self.logprobs = joined(self.logprobs, later.logprobs)
        self.extras |= later.extras

    @property
    def tells_something(self) -> bool:
        return self.text != "" or self.finish_reason is not None


@dataclass(slots=True)
class Tally:
    """How far an answer has come."""

    prompt_tokens: int
    choices: int
    choices_per_prompt: int
    completion_tokens: int = 0
    finished: int = 0

    def add(self, delta: TextDelta) -> None:
        self.completion_tokens += len(delta.token_ids)
        self.finished += delta.finish_reason is not None

    @property
    def complete(self) -> bool:
        return self.finished == self.choices

    def usage(self, cached_tokens: Sequence[int]) -> Json:
        """`cached_tokens` of every choice; of a prompt those count that none of its choices has read."""
        n = self.choices_per_prompt
        cached = sum(min(cached_tokens[first : first + n]) for first in range(0, self.choices, n))
        return {
            "prompt_tokens": self.prompt_tokens,
            "completion_tokens": self.completion_tokens,
            "total_tokens": self.prompt_tokens + self.completion_tokens,
            "prompt_tokens_details": {"cached_tokens": cached},
        }


class Dialect(Protocol):
    """The kinds of objects, and the choices in them."""

    prefix: str
    whole: str
    piece: str

    def choice(self, index: int, part: Part) -> Json: ...

    def piece_choice(self, index: int, part: Part) -> Json: ...

    def logprobs(self, scored: Sequence[ScoredToken], tokenizer: TextTokenizer) -> Json: ...

    def opening(self, index: int) -> Json | None:
        """The choice of a stream's first chunk, if the dialect has one."""
        ...


class CompletionDialect:
    prefix = "cmpl-"
    whole = piece = "text_completion"

    def choice(self, index: int, part: Part) -> Json:
        return _choice(index, {"text": part.text}, part)

    piece_choice = choice

    def logprobs(self, scored: Sequence[ScoredToken], tokenizer: TextTokenizer) -> Json:
        return completion_logprobs(scored, tokenizer)

    def opening(self, index: int) -> Json | None:
        return None


class ChatDialect:
    prefix = "chatcmpl-"
    whole = "chat.completion"
    piece = "chat.completion.chunk"

    def choice(self, index: int, part: Part) -> Json:
        message = {"role": "assistant", "content": part.text, "refusal": None}
        return _choice(index, {"message": message}, part)

    def piece_choice(self, index: int, part: Part) -> Json:
        delta = {"content": part.text} if part.text else {}
        return _choice(index, {"delta": delta}, part)

    def logprobs(self, scored: Sequence[ScoredToken], tokenizer: TextTokenizer) -> Json:
        return chat_logprobs(scored, tokenizer)

    def opening(self, index: int) -> Json | None:
        return _choice(index, {"delta": {"role": "assistant", "content": ""}}, Part())


def _choice(index: int, content: Json, part: Part) -> Json:
    return {
        "index": index,
        **content,
        "logprobs": part.logprobs,
        "finish_reason": part.finish_reason,
        **part.extras,
    }


def key_report(uses: list[KeyUse]) -> Json:
    """The `libration` object of an answer. Several choices share a scope; the first one's version is told."""
    report: Json = {
        "key_version": uses[0].key_version,
        "scope": uses[0].scope,
        "plasticity": uses[0].plasticity,
        "learned_tokens": sum(use.learned_tokens for use in uses),
    }
    if uses[0].offset_windows is not None:
        report["value_offsets"] = {"windows": uses[0].offset_windows}
    if uses[0].spans:
        report["key_versions"] = [asdict(span) for span in uses[0].spans]
    return report


def key_headers(uses: list[KeyUse]) -> Mapping[str, str]:
    version = uses[0].key_version
    return {} if version is None else {"X-Key-Version": str(version)}
