"""One step of continuous batching: schedule, forward, sample, deliver, teach. Knows no threads and no HTTP."""

import logging
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import numpy as np
import torch
from numpy.typing import NDArray

from model.blocks.base import RoutingTrace
from model.kv_cache import CacheBudget
from model.logprobs import TokenScore, score_hidden
from model.threads import one_thread
from model.transformer import Segment, Transformer, Variant
from server.engine.choosing import choose
from server.engine.scheduler import Scheduler, SchedulerConfig
from server.engine.sequence import FinishReason, Lesson, RoutedRows, Sequence, TokenEvent

logger = logging.getLogger(__name__)


@dataclass(slots=True)
class EngineCounters:
    """What the engine has done since its start; the metrics page reads it."""

    prompt_tokens: Counter[str] = field(default_factory=Counter[str])  # by endpoint
    generated_tokens: Counter[str] = field(default_factory=Counter[str])
    steps: int = 0
    failed_steps: int = 0
    lessons_failed: int = 0
    finished: Counter[tuple[str, str]] = field(default_factory=Counter[tuple[str, str]])  # endpoint, reason
    renewals: Counter[tuple[str, str]] = field(default_factory=Counter[tuple[str, str]])  # endpoint, outcome


@dataclass(frozen=True, slots=True)
class Observers:
    """Who is told about latencies, in seconds: endpoint and value."""

    queued: Callable[[str, float], None]
    first_token: Callable[[str, float], None]
    inter_token: Callable[[str, float], None]
    finished: Callable[[str, float], None]


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
    ):
        self.model = model
        self.variants = dict(variants)
        self.cache = CacheBudget(model.config, kv_cache_tokens, model.dtype, model.device)
        self.scheduler = Scheduler(config, self.cache.fits)
        self.counters = EngineCounters()
        self._plastic_layers = dict(plastic_layers)  # endpoint -> layers whose routing may teach
        self._clock = clock
        self._observe = observers
        self._lessons: list[Lesson] = []
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
        """Compute one batch and hand every new token to its sequence's mailbox."""
        self._drop_ended()
        self._renew_keys()
        while (admitted := self.scheduler.admit()) is not None:
            self._prepare(admitted)
        plan = self.scheduler.plan()
        self._stalled = not plan
        if not plan:
            return
        segments = [self._segment(sequence, count) for sequence, count in plan]
        hidden = self.model.step(segments)
        self.counters.steps += 1
        unread = {s: s.prefilled for s, _ in plan if s.report.scores_prompt and not s.decoding}
        self._advance(plan, segments, hidden)
        rows = self._rows(plan)
        self._sample_and_deliver([s for s, _ in plan if s not in unread], rows, hidden)
        # Scoring a prompt takes time: it comes when everybody else has this step's tokens.
        for sequence, start in unread.items():
            self._score_prompt(sequence, start, hidden[rows[sequence]])
        self._sample_and_deliver([s for s in unread if s.cache is not None], rows, hidden)

    def teach(self) -> None:
        """Hand the finished chunks of teaching prompts on, each for itself: one that raises is counted.

        Called after a step's tokens have been delivered, so the chunk's own reader does not wait for it; also after a
        step that failed, because whoever waits for a lesson must hear of it.
        """
        lessons, self._lessons = self._lessons, []
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
        for sequence in failed:
            self.finish(sequence, "error")
        return failed

    def _prepare(self, sequence: Sequence) -> None:
        sequence.admitted_at = self._clock()
        sequence.cache = self.cache.reserve(sequence.reservation)
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

    def _segment(self, sequence: Sequence, count: int) -> Segment:
        assert sequence.cache is not None, sequence.sequence_id
        variant = self.variants[sequence.variant] if sequence.variant else None
        routed: list[NDArray[np.int64]] | None = [] if sequence.report.routed_experts else None
        if sequence.decoding:
            position = len(sequence.prompt_token_ids) + len(sequence.generated) - 1
            return Segment(
                sequence.generated[-1:],
                position,
                sequence.cache,
                variant,
                sequence.keys,
                decode=True,
                flow_steps=sequence.flow_steps,
                routed=routed,
                offsets=sequence.offsets,
            )
        start = sequence.prefilled
        teaching = sequence.teach is not None and start + 1 < len(sequence.prompt_token_ids)
        trace = self._trace(sequence, variant) if teaching else None
        tokens = sequence.prompt_token_ids[start : start + count]
        return Segment(
            tokens,
            start,
            sequence.cache,
            variant,
            sequence.keys,
            trace,
            flow_steps=sequence.flow_steps,
            routed=routed,
            forced=_forced(sequence, variant, start, count),
            offsets=sequence.offsets,
        )

    def _trace(self, sequence: Sequence, variant: Variant | None) -> RoutingTrace:
        """Keys learn in the plastic layers, value offsets in all that have blocks."""
        plastic = self._plastic_layers[sequence.endpoint]
        if sequence.newest_offsets is None or variant is None:
            return RoutingTrace(plastic)
        return RoutingTrace(frozenset(variant.blocks), entry_layer=min(plastic))

    def _advance(
        self, plan: list[tuple[Sequence, int]], segments: list[Segment], hidden: torch.Tensor
    ) -> None:
        row = 0
        for (sequence, count), segment in zip(plan, segments, strict=True):
            if segment.routed:
                assert segment.variant is not None, sequence.sequence_id
                sequence.routed.append(_compact(segment.routed, segment.variant))
            if not sequence.decoding:
                sequence.prefilled += count
                self.counters.prompt_tokens[sequence.endpoint] += count
                if sequence.renewal is not None and not sequence.decoding:
                    sequence.renewal.arrive(sequence.prefilled, self._clock())
                if segment.trace is not None:
                    following = sequence.prompt_token_ids[segment.start + 1 : segment.start + 1 + count]
                    assert segment.keys is not None, sequence.sequence_id
                    rows = hidden[row : row + len(following)]
                    self._lessons.append(
                        Lesson(
                            sequence,
                            segment.keys,
                            segment.trace,
                            segment.start,
                            rows,
                            torch.tensor(following),
                            segment.offsets,
                        )
                    )
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
        logits = self.model.logits(hidden[[rows[s].stop - 1 for s in writing]], written=True)
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


def _compact(by_layer: list[NDArray[np.int64]], variant: Variant) -> RoutedRows:
    """Expert ids (T, K) of each layer as (T, layers, K), in as few bytes as they fit."""
    stacked = np.stack(by_layer, axis=1)
    return stacked.astype(np.uint8 if variant.usage.counts.shape[-1] <= 256 else np.uint16)


def _forced(
    sequence: Sequence, variant: Variant | None, start: int, count: int
) -> dict[int, torch.Tensor] | None:
    """The chunk's part of the experts that the request prescribes, by layer."""
    if sequence.forced is None or variant is None or start >= len(sequence.forced):
        return None
    rows = torch.from_numpy(sequence.forced[start : start + count].astype(np.int64))
    return {layer: rows[:, i].contiguous() for i, layer in enumerate(sorted(variant.blocks))}
