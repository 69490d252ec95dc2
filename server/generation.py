"""One request on its way through the engine: its deltas, its end, its cancellation.

Knows the engine and the tokenizer; knows no HTTP and no key store.
"""

import asyncio
from collections.abc import AsyncIterator
from dataclasses import dataclass, field, replace
from typing import Literal

import numpy as np

from model.grammar import Grammar
from model.keys import KeyView
from model.sampling import SamplingParams
from model.tokenizer import TextTokenizer
from server.answer_text import AnswerText, TextDelta
from server.engine.errors import AnswerTooComplex, GenerationFailed
from server.engine.mailbox import Mailbox
from server.engine.renewal import KeySpan
from server.engine.runner import EngineRunner
from server.engine.sequence import Report, RoutedRows, Sequence

PlasticityMode = Literal["off", "read", "learn"]


@dataclass(frozen=True, slots=True)
class GenerationRequest:
    """What a route asks of an endpoint, already validated."""

    request_id: str
    prompt_token_ids: tuple[int, ...]
    params: SamplingParams
    stop: tuple[str, ...] = ()
    tenant: str = "default"
    session_id: str | None = None
    plasticity: PlasticityMode | None = None  # None: the endpoint's own default
    key_version: int | None = None  # None: the scope's newest
    flow_steps: int | None = None  # None: the variant's own
    routed_experts: RoutedRows | None = None  # what the prompt's leading tokens take, as an answer told it
    value_offsets: bool = False  # read, and with "learn" move, what the session adds to the experts
    within_request: bool = False  # go on, window by window, with what the prompt has taught so far
    grammar: Grammar | None = None  # what the answer must be; None: anything
    report: Report = field(default_factory=Report)


@dataclass(frozen=True, slots=True)
class KeyUse:
    """Which keys an answer was computed with, as told to the client. Nothing of it for a plain base model."""

    key_version: int | None
    scope: str | None
    plasticity: PlasticityMode
    learned_tokens: int  # let teach; what the prefix cache had of the prompt has done so before
    offset_windows: int | None = None  # that moved the value offsets it reads; None: it asked for none
    spans: tuple[KeySpan, ...] = ()  # of an answer whose keys were renewed while it read its prompt


class Generation:
    """One running answer. Iterate `deltas()` once; leaving the iteration early cancels the work."""

    def __init__(
        self,
        runner: EngineRunner,
        sequence: Sequence,
        mailbox: Mailbox,
        tokenizer: TextTokenizer,
        stop: tuple[str, ...],
        keys: KeyUse,
        report: Report,
    ):
        self._keys = keys
        self.tokenizer = tokenizer
        self.prompt_tokens = len(sequence.prompt_token_ids)
        self._runner = runner
        self._sequence = sequence
        self._mailbox = mailbox
        self._report = report
        self._text = AnswerText(tokenizer, sequence.prompt_token_ids, stop, report)
        self._generated = 0
        self._routed: list[RoutedRows] = []

    async def deltas(self) -> AsyncIterator[TextDelta]:
        """Text as it is written, ending with the delta that has a finish reason.

        Raises GenerationFailed when the engine gives up on the sequence, and AnswerTooComplex.
        """
        finished = False
        try:
            opening = self._text.open()
            if opening is not None:
                yield opening
            async for event in self._mailbox.events():
                if event.finish_reason in ("error", "cancelled"):
                    finished = True
                    raise GenerationFailed("the engine gave up on this request")
                if event.finish_reason == "too_complex":
                    finished = True
                    raise AnswerTooComplex(
                        "the answer was given up: to follow 'response_format' takes more states or work than is "
                        "allowed; simpler patterns and fewer choices help"
                    )
                delta = self._text.read(event)
                self._generated += len(delta.token_ids)
                self._routed.extend(event.routed)
                finished = event.finish_reason is not None
                if delta.finish_reason is not None and not finished:
                    finished = True
                    self._runner.end(self._sequence, "stop")
                yield self._completed(delta)
                if finished:
                    return
        finally:
            if not finished:
                self.cancel()

    @property
    def keys(self) -> KeyUse:
        """The keys in use so far, and what is let teach them."""
        renewal = self._sequence.renewal
        return replace(
            self._keys,
            learned_tokens=max(0, self._keys.learned_tokens - self.cached_tokens),
            spans=self._keys.spans if renewal is None else tuple(renewal.spans),
        )

    @property
    def cached_tokens(self) -> int:
        """Prompt tokens that were taken from the prefix cache so far."""
        return self._sequence.cached_tokens

    @property
    def key_view(self) -> KeyView | None:
        """The newest keys in use, pinned by the answer."""
        return self._sequence.keys

    @property
    def token_ids(self) -> tuple[int, ...]:
        """The prompt and what `deltas` has told of the answer."""
        return (*self._sequence.prompt_token_ids, *self._sequence.generated[: self._generated])

    def cancel(self) -> None:
        """Give the slot and the memory back; harmless when the answer is already complete."""
        self._runner.end(self._sequence, "cancelled")

    def _completed(self, delta: TextDelta) -> TextDelta:
        """The last delta with the routing of every token but the last, which was never fed back."""
        if delta.finish_reason is None or not self._report.routed_experts:
            return delta
        fed = self.prompt_tokens + self._generated - 1
        return replace(delta, routed_experts=np.concatenate(self._routed)[:fed])


def open_mailbox() -> Mailbox:
    """A mailbox for the loop that is running now."""
    return Mailbox(asyncio.get_running_loop())
