"""One step of continuous batching: schedule, forward, sample, deliver, teach. Knows no threads and no HTTP."""

import logging
from collections.abc import Callable, Mapping

import torch

from model.logprobs import TokenScore, score_hidden
from model.threads import one_thread
from model.transformer import Segment, Transformer, Variant
from server.engine.choosing import choose
from server.engine.counters import EngineCounters, Observers
from server.engine.prefix_cache import PrefixCache
from server.engine.reading import Batch, Reading
from server.engine.scheduler import Scheduler, SchedulerConfig
from server.engine.segments import lesson_of, next_segment, routed_rows
from server.engine.sequence import FinishReason, Lesson, RoutedRows, Sequence, TokenEvent

logger = logging.getLogger(__name__)

# Time for prompts beside those who write, by what a token of theirs takes: with what is computed longer than was foreseen,
# they wait for a token twice as long as without (docs/performance.md).
READING_SHARE = 0.7


class Engine:
    """The model, the memory of the running sequences, and the step."""

    def __init__(
        self,
        model: Transformer,
        variants: Mapping[str, Variant],
        config: SchedulerConfig,
        kv_cache_tokens: int,
        plastic_layers: Mapping[str, frozenset[int]],
        clock: Callable[[], float],
        observers: Observers,
        prefix_cache_tokens: int = 0,
    ):
        self.model = model
        self.variants = dict(variants)
        self.cache = model.cache_budget(kv_cache_tokens)
        self.prefixes = PrefixCache(prefix_cache_tokens, self.cache, config.prefill_chunk)
        self.scheduler = Scheduler(config, self.cache.fits)
        self.counters = EngineCounters()
        self._plastic_layers = dict(plastic_layers)  # endpoint -> layers whose routing may teach
        self._clock = clock
        self._observe = observers
        self._lessons: list[Lesson] = []
        self._reading: Reading | None = None
        self._stalled = False  # the last step had sequences and nothing to compute

    @property
    def idle(self) -> bool:
        return not self.scheduler.running and not self.scheduler.waiting

    @property
    def resting(self) -> bool:
        """Nothing can be computed before a prompt gets the keys that it waits for, or a reader leaves."""
        now = self._clock()
        return self._stalled and not any(
            s.ended or s.renewal is None or s.renewal.may_go_on(now) for s in self.scheduler.running
        )

    def step(self) -> None:
        """One token of every sequence that writes, and for as long again prompts; hand every new token out."""
        self._drop_ended()
        if self._reading is not None and not self._reading.wanted:
            self._reading = None
        self._renew_keys()
        while (admitted := self.scheduler.admit()) is not None:
            self._prepare(admitted)
        self._take_prefixes()
        plan = self.scheduler.plan()
        self._stalled = not plan
        if not plan:
            return
        self.counters.steps += 1
        writing = [(s, count) for s, count in plan if s.decoding]
        chunks = [(s, count) for s, count in plan if not s.decoding]
        read_whole = self._reading is None and self._begin_together(writing, chunks)
        started = self._clock()
        self._compute(writing)
        if read_whole:
            self._compute(chunks)
        else:
            now = self._clock()
            self._read_on(chunks, now + self._reading_share(len(writing)) * (now - started))
        self.model.settle()

    def _begin_together(self, writing: Batch, chunks: Batch) -> bool:
        """Whether nobody waits long for these chunks: nobody writes, or who does has its first token only.

        The first prompt of many that come at once does not wait for them, so the others are here when it has been read.
        Read in parts beside one that writes they would take three times as long. With its own they are a step's tokens at most.
        """
        tokens = sum(count for _, count in chunks) + sum(len(s.prompt_token_ids) for s, _ in writing)
        few = not writing or tokens <= self.scheduler.config.step_tokens
        return few and all(len(s.generated) == 1 for s, _ in writing)

    def _reading_share(self, writing: int) -> float:
        """Of the time that a token of those who write takes: more where more wait for their first token than write."""
        reading = sum(not s.decoding and not s.resting for s in self.scheduler.running)
        return READING_SHARE * max(1.0, reading / max(1, writing))

    def _compute(self, batch: Batch) -> None:
        if batch:
            segments = self._segments(batch)
            self._take_in(batch, segments, self.model.step(segments))

    def _read_on(self, chunks: Batch, until: float) -> None:
        """Go on with the reading under way, or begin one of these chunks of prompts."""
        if self._reading is None and chunks:
            segments = self._segments(chunks)
            self._reading = Reading(chunks, segments, self.model.reading(segments, pauses=True))
        if self._reading is None:
            return
        reading, hidden = self._reading, self._reading.go_on(self._clock, until)
        if hidden is not None:
            self._reading = None
            self._take_in(reading.batch, reading.segments, hidden)

    def _segments(self, batch: Batch) -> list[Segment]:
        return [
            next_segment(s, count, self._variant_of(s), self._plastic_layers.get(s.endpoint, frozenset()))
            for s, count in batch
        ]

    def _take_in(self, batch: Batch, segments: list[Segment], hidden: torch.Tensor) -> None:
        """What computing a batch came to; some may have ended meanwhile."""
        unread = {s: s.prefilled for s, _ in batch if s.report.scores_prompt and not s.decoding}
        self._advance(batch, segments, hidden)
        rows = self._rows(batch)
        there = [s for s, _ in batch if s.cache is not None]
        self._sample_and_deliver([s for s in there if s not in unread], rows, hidden)
        # Scoring a prompt takes time: it comes when everybody else has this step's tokens.
        scored = [s for s in there if s in unread]
        for sequence in scored:
            self._score_prompt(sequence, unread[sequence], hidden[rows[sequence]])
        self._sample_and_deliver([s for s in scored if s.cache is not None], rows, hidden)

    def teach(self) -> None:
        """Hand the finished chunks of teaching prompts on, each for itself: one that raises is counted.

        Called after a step's tokens have been delivered, so the chunk's own reader does not wait for it; also after a
        step that failed, because whoever waits for a lesson must hear of it.
        """
        lessons, self._lessons = tuple(self._lessons), []
        # All of them first: whoever credits one, maybe at once, takes its neighbours along.
        for lesson in lessons:
            lesson.beside = lessons
        for lesson in lessons:
            assert lesson.sequence.teach is not None, lesson.sequence.sequence_id
            try:
                lesson.sequence.teach(lesson)
            except Exception:
                self.counters.lessons_failed += 1
                logger.exception("a lesson failed", extra={"requests": [lesson.sequence.sequence_id]})

    def finish(
        self,
        sequence: Sequence,
        reason: FinishReason,
        token_ids: tuple[int, ...] = (),
        scores: tuple[TokenScore, ...] = (),
    ) -> None:
        """End a sequence, give its memory back and tell its reader. Counted first: an idle engine has counted all."""
        self.counters.finished[sequence.endpoint, reason] += 1
        self._observe.finished(sequence.endpoint, self._clock() - sequence.arrived_at)
        if sequence.cache is not None:
            self.cache.release(sequence.cache)
            sequence.cache = None
        self.scheduler.remove(sequence)
        sequence.deliver(TokenEvent(token_ids, reason, scores, routed=_taken(sequence)))

    def fail_running(self) -> list[Sequence]:
        """End every running sequence with an error, after a step that raised; returns them."""
        failed = list(self.scheduler.running)
        self._reading = None
        for sequence in failed:
            self.finish(sequence, "error")
        return failed

    def _prepare(self, sequence: Sequence) -> None:
        sequence.admitted_at = self._clock()
        if (variant := self._variant_of(sequence)) is not None:
            sequence.rows_at_once = variant.rows_at_once
        sequence.cache = self.cache.reserve(sequence.reservation)
        self.prefixes.give_way()
        if sequence.prefix is not None and sequence.prefix.takes:
            self.counters.prefix_queries[sequence.endpoint] += len(sequence.prompt_token_ids)
        if not sequence.params.greedy:
            sequence.generator = torch.Generator()
            if sequence.params.seed is None:
                sequence.generator.seed()
            else:
                sequence.generator.manual_seed(sequence.params.seed)
        if sequence.params.adjusted:
            sequence.prompt_ids = torch.tensor(sequence.prompt_token_ids, device=self.model.device).unique()
        self._observe.queued(sequence.endpoint, sequence.admitted_at - sequence.arrived_at)

    def _drop_ended(self) -> None:
        for sequence in [*self.scheduler.running, *self.scheduler.waiting]:
            if sequence.ended is not None:
                self.finish(sequence, sequence.ended)

    def _renew_keys(self) -> None:
        """Prompts that rest go on, with newer keys if they have come."""
        now = self._clock()
        for sequence in self.scheduler.running:
            if sequence.renewal is None or not sequence.resting or not sequence.renewal.may_go_on(now):
                continue
            keys = sequence.renewal.go_on()
            self.counters.renewals[sequence.endpoint, "timed_out" if keys is None else "renewed"] += 1
            if keys is not None:
                sequence.keys = keys
            if sequence.newest_offsets is not None:
                assert sequence.keys is not None, sequence.sequence_id
                sequence.offsets = sequence.newest_offsets(sequence.keys)

    def _take_prefixes(self) -> None:
        """Prompts of which nothing has been read get what is kept of their beginnings, maybe since a moment ago."""
        for sequence in self.scheduler.running:
            use, known = sequence.prefix, sequence.cached_tokens
            if self._reading is not None and sequence in self._reading:
                continue
            if use is None or not use.takes or sequence.prefilled > known:
                continue
            assert sequence.cache is not None, sequence.sequence_id
            taken = self.prefixes.take(use, sequence.prompt_token_ids, sequence.cache, known)
            sequence.cached_tokens = sequence.prefilled = taken
            self.counters.prefix_hits[sequence.endpoint] += taken - known

    def _variant_of(self, sequence: Sequence) -> Variant | None:
        return self.variants[sequence.variant] if sequence.variant else None

    def _advance(
        self, plan: list[tuple[Sequence, int]], segments: list[Segment], hidden: torch.Tensor
    ) -> None:
        row = 0
        for (sequence, count), segment in zip(plan, segments, strict=True):
            if sequence.cache is None:
                row += count
                continue
            if segment.routed:
                sequence.routed.append(routed_rows(segment))
            if not sequence.decoding:
                sequence.prefilled += count
                self.counters.prompt_tokens[sequence.endpoint] += count
                if sequence.renewal is not None and not sequence.decoding:
                    sequence.renewal.arrive(sequence.prefilled, self._clock())
                if segment.trace is not None:
                    self._lessons.append(lesson_of(sequence, segment, hidden[row : row + count]))
                if sequence.prefix is not None:
                    assert sequence.cache is not None, sequence.sequence_id
                    prompt = sequence.prompt_token_ids
                    self.prefixes.keep(sequence.prefix, prompt, sequence.prefilled, sequence.cache)
            row += count

    @staticmethod
    def _rows(plan: list[tuple[Sequence, int]]) -> dict[Sequence, slice]:
        rows: dict[Sequence, slice] = {}
        row = 0
        for sequence, count in plan:
            rows[sequence] = slice(row, row + count)
            row += count
        return rows

    def _score_prompt(self, sequence: Sequence, start: int, hidden: torch.Tensor) -> None:
        """Deliver how likely the prompt's tokens after rows (T, H) from `start` are."""
        following = sequence.prompt_token_ids[start + 1 : start + 1 + len(hidden)]
        assert sequence.report.top_logprobs is not None, sequence.sequence_id
        try:
            scores = tuple(score_hidden(self.model, hidden, following, sequence.report.top_logprobs))
        except ValueError:
            self.finish(sequence, "error")
            return
        sequence.deliver(TokenEvent((), prompt_scores=scores))

    def _sample_and_deliver(
        self, sequences: list[Sequence], rows: Mapping[Sequence, slice], hidden: torch.Tensor
    ) -> None:
        """The next token of those whose prompt is read; an end for those that want no token."""
        for sequence in sequences:
            if sequence.decoding and not sequence.params.max_tokens:
                self.finish(sequence, "length")
        writing = [s for s in sequences if s.decoding and s.params.max_tokens]
        if not writing:
            return
        last = [rows[s].stop - 1 for s in writing]
        if last != list(range(len(hidden))):  # else nothing is copied, and nobody waits for a GPU
            hidden = hidden[last]
        logits = self.model.logits(hidden, written=True)
        now = self._clock()
        with one_thread():  # waking a second one would take it from the next step's compiled code
            choices = list(choose(writing, logits))
        for choice in choices:
            if choice.token_id is None:
                self.finish(choice.sequence, choice.failure)
            else:
                self._deliver(choice.sequence, choice.token_id, choice.scores, now)

    def _deliver(self, sequence: Sequence, token: int, scores: tuple[TokenScore, ...], now: float) -> None:
        sequence.generated.append(token)
        self.counters.generated_tokens[sequence.endpoint] += 1
        if sequence.last_token_at is None:
            sequence.first_token_at = now
            self._observe.first_token(sequence.endpoint, now - sequence.arrived_at)
        else:
            self._observe.inter_token(sequence.endpoint, now - sequence.last_token_at)
        sequence.last_token_at = now
        reason = sequence.finish_reason()
        if reason is None:
            sequence.deliver(TokenEvent((token,), None, scores, routed=_taken(sequence)))
        else:
            self.finish(sequence, reason, (token,), scores)


def _taken(sequence: Sequence) -> tuple[RoutedRows, ...]:
    """The routing that the reader has not got yet."""
    taken = tuple(sequence.routed)
    sequence.routed.clear()
    return taken
