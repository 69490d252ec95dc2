"""Text out of tokens: characters across tokens, stop strings, an echoed prompt, and where each scored token stands.

Knows events and the tokenizer; knows no engine and no HTTP.
"""

import codecs
from collections import deque
from dataclasses import dataclass
from typing import Literal

from model.logprobs import TokenScore
from model.tokenizer import TextStream, TextTokenizer
from server.engine.sequence import Report, RoutedRows, TokenEvent


@dataclass(frozen=True, slots=True)
class ScoredToken:
    """A token with its log-probability; `offset` counts the answer's characters before it."""

    offset: int
    score: TokenScore


@dataclass(frozen=True, slots=True)
class TextDelta:
    """Newly written text. The last delta of an answer carries the reason of its end.

    `token_ids` are generated ones. `scored` are the tokens that begin in the text so far: concatenated over an
    answer's deltas they are those of its text, however it was cut into deltas, and the token that ended it.
    """

    text: str
    token_ids: tuple[int, ...]
    finish_reason: Literal["stop", "length"] | None = None
    scored: tuple[ScoredToken, ...] = ()
    routed_experts: RoutedRows | None = None  # with the last delta, if asked for


class AnswerText:
    """The text of one answer as its events come."""

    def __init__(
        self,
        tokenizer: TextTokenizer,
        prompt_token_ids: tuple[int, ...],
        stop: tuple[str, ...],
        report: Report,
    ):
        self._tokenizer = tokenizer
        self._prompt = prompt_token_ids
        self._report = report
        self._echoed = 0  # prompt tokens whose text has been written
        self._echo = codecs.getincrementaldecoder("utf-8")(errors="replace")
        self._stream = TextStream(tokenizer)
        self._stop = StopStrings(stop)
        self._decoded = 0  # characters that the tokens so far have made
        self._shown = 0  # of these, how many are sure to be in the answer
        self._held: deque[ScoredToken] = deque()  # begin in what is not shown yet

    def open(self) -> TextDelta | None:
        """What can be told before the model has computed anything: the prompt, or the first token of a scored one."""
        if not self._report.echo:
            return None
        if not self._report.scores_prompt:
            return TextDelta("".join(self._echo_next() for _ in self._prompt), ())
        self._hold(TokenScore(self._prompt[0], None))
        return self._shown_delta(self._echo_next(), ())

    def read(self, event: TokenEvent) -> TextDelta:
        """Text of an event, token by token, so that how events were merged does not show in the answer."""
        text = ""
        for score in event.prompt_scores:
            self._hold(score)
            text += self._echo_next()
        for count, token_id in enumerate(event.token_ids, 1):
            if event.scores:
                self._hold(event.scores[count - 1])
            if event.finish_reason == "stop" and count == len(event.token_ids):
                break  # the token that ended the answer is not part of its text
            piece, stopped = self._push(self._stream.push((token_id,)))
            text += piece
            if stopped:
                return self._shown_delta(text, event.token_ids[:count], "stop")
        if event.finish_reason is None:
            return self._shown_delta(text, event.token_ids)
        piece, stopped = self._push(self._stream.finish())
        text += piece
        if stopped:
            return self._shown_delta(text, event.token_ids, "stop")
        text += self._stop.rest()
        reason = "length" if event.finish_reason == "length" else "stop"
        return TextDelta(text, event.token_ids, reason, tuple(self._held))

    def _push(self, text: str) -> tuple[str, bool]:
        self._decoded += len(text)
        shown, stopped = self._stop.push(text)
        self._shown += len(shown)
        return shown, stopped

    def _echo_next(self) -> str:
        """Text of the prompt's next token, special tokens spelled out. The prompt ends with whole characters."""
        data = self._tokenizer.token_bytes(self._prompt[self._echoed])
        self._echoed += 1
        text = self._echo.decode(data, final=self._echoed == len(self._prompt))
        self._decoded += len(text)
        self._shown += len(text)
        return text

    def _hold(self, score: TokenScore) -> None:
        self._held.append(ScoredToken(self._decoded, score))

    def _shown_delta(
        self, text: str, token_ids: tuple[int, ...], reason: Literal["stop", "length"] | None = None
    ) -> TextDelta:
        """With the tokens that begin in what is shown."""
        scored: list[ScoredToken] = []
        while self._held and self._held[0].offset < self._shown:
            scored.append(self._held.popleft())
        return TextDelta(text, token_ids, reason, tuple(scored))


class StopStrings:
    """Cuts text at the first stop string, holding back whatever might still become one."""

    def __init__(self, stop: tuple[str, ...]):
        self._stop = stop
        self._held = ""

    def push(self, text: str) -> tuple[str, bool]:
        """Text that is safe to show, and whether a stop string was reached (it is not shown)."""
        if not self._stop:
            return text, False
        text = self._held + text
        found = [position for stop in self._stop if (position := text.find(stop)) >= 0]
        if found:
            self._held = ""
            return text[: min(found)], True
        keep = max(
            (n for stop in self._stop for n in range(1, len(stop)) if text.endswith(stop[:n])), default=0
        )
        self._held = text[len(text) - keep :]
        return text[: len(text) - keep], False

    def rest(self) -> str:
        """What was held back, once no more text comes."""
        rest, self._held = self._held, ""
        return rest
