"""One request on its way through the engine: text out of tokens, stop strings, cancellation.

Knows the engine and the tokenizer; knows no HTTP and no key store.
"""

import asyncio
from collections.abc import AsyncIterator
from dataclasses import dataclass
from typing import Literal

from model.sampling import SamplingParams
from model.tokenizer import TextStream, TextTokenizer
from server.engine.errors import GenerationFailed
from server.engine.mailbox import Mailbox
from server.engine.runner import EngineRunner
from server.engine.sequence import Sequence, TokenEvent

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


@dataclass(frozen=True, slots=True)
class KeyUse:
    """Which keys an answer was computed with, as told to the client. Nothing of it for a plain base model."""

    key_version: int | None
    scope: str | None
    plasticity: PlasticityMode
    learned_tokens: int


@dataclass(frozen=True, slots=True)
class TextDelta:
    """Newly written text. The last delta of an answer carries the reason of its end."""

    text: str
    token_ids: tuple[int, ...]
    finish_reason: Literal["stop", "length"] | None = None


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
    ):
        self.keys = keys
        self.prompt_tokens = len(sequence.prompt_token_ids)
        self._runner = runner
        self._sequence = sequence
        self._mailbox = mailbox
        self._stream = TextStream(tokenizer)
        self._stop = StopStrings(stop)

    async def deltas(self) -> AsyncIterator[TextDelta]:
        """Text as it is written, ending with the delta that has a finish reason.

        Raises GenerationFailed when the engine gives up on the sequence.
        """
        finished = False
        try:
            async for event in self._mailbox.events():
                if event.finish_reason in ("error", "cancelled"):
                    finished = True
                    raise GenerationFailed("the engine gave up on this request")
                delta = self._read(event)
                finished = event.finish_reason is not None
                if delta.finish_reason is not None and not finished:
                    finished = True
                    self._runner.end(self._sequence, "stop")
                yield delta
                if finished:
                    return
        finally:
            if not finished:
                self.cancel()

    def cancel(self) -> None:
        """Give the slot and the memory back; harmless when the answer is already complete."""
        self._runner.end(self._sequence, "cancelled")

    def _read(self, event: TokenEvent) -> TextDelta:
        """Text of an event, token by token, so that how events were merged does not show in the answer."""
        text = ""
        for count, token_id in enumerate(event.token_ids, 1):
            if event.finish_reason == "stop" and count == len(event.token_ids):
                break  # the token that ended the answer is not part of its text
            piece, stopped = self._stop.push(self._stream.push((token_id,)))
            text += piece
            if stopped:
                return TextDelta(text, event.token_ids[:count], "stop")
        if event.finish_reason is None:
            return TextDelta(text, event.token_ids)
        piece, stopped = self._stop.push(self._stream.finish())
        text += piece if stopped else piece + self._stop.rest()
        reason = "length" if event.finish_reason == "length" and not stopped else "stop"
        return TextDelta(text, event.token_ids, reason)


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


def open_mailbox() -> Mailbox:
    """A mailbox for the loop that is running now."""
    return Mailbox(asyncio.get_running_loop())
