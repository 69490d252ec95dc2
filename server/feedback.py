"""Answers that may still be judged, and how a judgement teaches. Knows no HTTP.

An answer that nobody judges costs only its token ids and the keys that it pins, for a bounded time and number.
T tokens of a prompt and its answer.
"""

import asyncio
import time
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from keystore.records import ScopeId
from model.keys import KeyView
from model.sampling import SamplingParams
from server.engine.sequence import Lesson
from server.generation import Generation, GenerationRequest
from server.plasticity import Teacher
from server.registry import Endpoint, Watched


class UnknownAnswer(LookupError):
    """No answer of that id is remembered."""


@dataclass(frozen=True, slots=True, eq=False)
class WrittenText:
    """One choice of an answer."""

    token_ids: NDArray[np.int32]  # (T,)
    answer_start: int
    keys: KeyView  # that wrote it

    @property
    def answer_tokens(self) -> int:
        return len(self.token_ids) - self.answer_start


@dataclass(frozen=True, slots=True, eq=False)
class PastAnswer:
    """Everything that a judgement needs."""

    endpoint: str
    tenant: str
    scope: ScopeId
    texts: tuple[WrittenText, ...]
    judged: bool = False

    @property
    def answer_tokens(self) -> int:
        return sum(text.answer_tokens for text in self.texts)


class AnswerMemory:
    """The newest answers: at most `keep_answers` texts, none older than `keep_s`. Belongs to the event loop."""

    def __init__(
        self, keep_s: float = 600.0, keep_answers: int = 1024, clock: Callable[[], float] = time.monotonic
    ):
        self._keep_s, self._keep_answers, self._clock = keep_s, keep_answers, clock
        self._answers: OrderedDict[str, tuple[float, PastAnswer]] = OrderedDict()
        self.texts = 0  # remembered now

    def remember(self, answer_id: str, answer: PastAnswer) -> None:
        """Keep an answer that is complete; older ones make room."""
        self._answers[answer_id] = (self._clock(), answer)
        self.texts += len(answer.texts)
        self._forget_old()

    def find(self, answer_id: str, tenant: str) -> PastAnswer:
        """An answer of this tenant. Raises UnknownAnswer, also for another tenant's."""
        self._forget_old()
        _, answer = self._answers.get(answer_id, (0.0, None))
        if answer is None or answer.tenant != tenant:
            raise UnknownAnswer(
                f"no answer {answer_id!r} is remembered; allowed: one that was free to learn, complete, and at most "
                f"{self._keep_s:g} s old"
            )
        return answer

    def note_judged(self, answer_id: str) -> None:
        """It has been judged, once and for all."""
        at, answer = self._answers[answer_id]
        self._answers[answer_id] = (at, replace(answer, judged=True))

    def _forget_old(self) -> None:
        oldest_allowed = self._clock() - self._keep_s
        while self._answers:
            answer_id, (at, answer) = next(iter(self._answers.items()))
            if at >= oldest_allowed and self.texts <= self._keep_answers:
                return
            del self._answers[answer_id]
            self.texts -= len(answer.texts)


def past_answer(endpoint: str, tenant: str, generations: list[Generation]) -> PastAnswer | None:
    """What to remember of complete generations; None when none of them might teach or has any text."""
    scope = next((g.keys.scope for g in generations if g.keys.plasticity == "learn"), None)
    if scope is None:
        return None
    texts = tuple(
        WrittenText(np.array(g.token_ids, np.int32), g.prompt_tokens, g.key_view)
        for g in generations
        if g.key_view is not None and len(g.token_ids) > g.prompt_tokens
    )
    return PastAnswer(endpoint, tenant, ScopeId.parse(scope), texts) if texts else None


def start_teaching(endpoint: Endpoint, answer: PastAnswer, reward: float, request_id: str) -> "Judgement":
    """Read the answer once more, with the keys that wrote it, and let its tokens teach its scope.

    Raises EngineOverloaded, EngineDraining.
    """
    assert endpoint.plasticity is not None, endpoint.name
    loop, teacher = asyncio.get_running_loop(), endpoint.plasticity.teacher
    takers = [AnswerLessons(teacher, answer.scope, text, reward, loop) for text in answer.texts]
    generations = endpoint.start_watched(
        *(
            Watched(
                GenerationRequest(
                    request_id=f"{request_id}.{i}",
                    prompt_token_ids=tuple(text.token_ids.tolist()),
                    params=SamplingParams(max_tokens=0),
                    plasticity="off",
                ),
                text.keys,
                taker,
            )
            for i, (text, taker) in enumerate(zip(answer.texts, takers, strict=True))
        )
    )
    return Judgement(generations, takers)


@dataclass(frozen=True, slots=True)
class Judgement:
    """Answers that are being read again."""

    generations: list[Generation]
    takers: "list[AnswerLessons]"

    async def taught(self) -> None:
        """Wait until every token has taught. Raises GenerationFailed, and what teaching raised."""
        for generation, taker in zip(self.generations, self.takers, strict=True):
            async for _ in generation.deltas():
                pass
            await taker.complete


class AnswerLessons:
    """Takes the lessons of one text on the engine's thread; only rows whose target is the answer's teach."""

    def __init__(
        self,
        teacher: Teacher,
        scope: ScopeId,
        text: WrittenText,
        reward: float,
        loop: asyncio.AbstractEventLoop,
    ):
        self.complete: asyncio.Future[None] = loop.create_future()
        self._teacher, self._scope, self._reward, self._loop = teacher, scope, reward, loop
        self._first, self._end = text.answer_start - 1, len(text.token_ids) - 1

    def __call__(self, lesson: Lesson) -> None:
        first, end = max(0, self._first - lesson.start), lesson.start + len(lesson.targets)
        try:
            self._teacher.take(self._scope, lesson, self._reward, first)
        except Exception as error:
            self._loop.call_soon_threadsafe(self._finish, error)
            raise
        if end == self._end:
            self._loop.call_soon_threadsafe(self._finish, None)

    def _finish(self, error: Exception | None) -> None:
        if self.complete.done():
            return
        if error is None:
            self.complete.set_result(None)
        else:
            self.complete.set_exception(error)
