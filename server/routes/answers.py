"""From running generations to an answer, whole or piece by piece."""

from collections.abc import AsyncGenerator, Callable, Sequence
from contextlib import aclosing
from dataclasses import dataclass

from server.answer_text import TextDelta
from server.engine.sequence import Report
from server.generation import Generation
from server.routes.dialects import Dialect, Frame, Json, Part, Tally, key_report
from server.routes.routed_experts import as_npy_base64
from server.routes.streams import interleaved, sse


@dataclass(frozen=True, slots=True)
class Answer:
    """Every choice of every prompt of one request, and how it is told."""

    dialect: Dialect
    frame: Frame
    generations: Sequence[Generation]
    report: Report
    tally: Tally
    on_complete: Callable[[], None]  # before the client can know

    async def collect(self) -> Json:
        """The whole answer. Raises GenerationFailed."""
        parts = [Part(logprobs=self._no_logprobs()) for _ in self.generations]
        async with aclosing(interleaved(self.generations)) as deltas:
            async for index, delta in deltas:
                self._count(delta)
                parts[index].add(self._part(delta))
        choices = [self.dialect.choice(index, part) for index, part in enumerate(parts)]
        return self.frame.around(self.dialect.whole, choices) | {"usage": self._usage()} | self._keys()

    async def stream(self, *, with_usage: bool, continuous_usage: bool) -> AsyncGenerator[bytes]:
        """The stream's chunks. The last one of all carries the `libration` object. Raises GenerationFailed."""
        for index in range(len(self.generations)):
            opening = self.dialect.opening(index)
            if opening is not None:
                yield self._chunk([opening], self._usage_of_a_chunk(with_usage, continuous_usage))
        async with aclosing(interleaved(self.generations)) as deltas:
            async for index, delta in deltas:
                self._count(delta)
                part = self._part(delta)
                if part.tells_something:
                    usage = self._usage_of_a_chunk(with_usage, continuous_usage)
                    last = self._keys() if self.tally.complete and not with_usage else {}
                    yield self._chunk([self.dialect.piece_choice(index, part)], usage | last)
        if with_usage:
            yield self._chunk([], {"usage": self._usage()} | self._keys())

    def _count(self, delta: TextDelta) -> None:
        self.tally.add(delta)
        if self.tally.complete:
            self.on_complete()

    def _part(self, delta: TextDelta) -> Part:
        part = Part(delta.text, delta.finish_reason)
        if delta.scored:
            part.logprobs = self.dialect.logprobs(delta.scored, self.generations[0].tokenizer)
        if delta.routed_experts is not None:
            part.extras["routed_experts"] = as_npy_base64(delta.routed_experts)
        return part

    def _no_logprobs(self) -> Json | None:
        """What an answer starts with, so that one without tokens still has the form that was asked for."""
        if self.report.top_logprobs is None:
            return None
        return self.dialect.logprobs((), self.generations[0].tokenizer)

    def _usage(self) -> Json:
        return self.tally.usage([generation.cached_tokens for generation in self.generations])

    def _usage_of_a_chunk(self, with_usage: bool, continuous_usage: bool) -> Json:
        if not with_usage:
            return {}
        return {"usage": self._usage() if continuous_usage else None}

    def _chunk(self, choices: list[Json], more: Json) -> bytes:
        return sse(self.frame.around(self.dialect.piece, choices) | more)

    def _keys(self) -> Json:
        return {"libration": key_report([generation.keys for generation in self.generations])}
