"""Which sequences run, and how many tokens of each go into the next batch. Plain arithmetic, no tensors.

A prompt is cut at multiples of the chunk size whatever else is running, so how a prompt is computed does not
depend on the traffic beside it.
"""

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass

from server.engine.sequence import Sequence


@dataclass(frozen=True, slots=True)
class SchedulerConfig:
    """A batch is one token of every decoding sequence and about step_tokens tokens of prompts."""

    max_running: int = 16
    max_waiting: int = 64
    prefill_chunk: int = 256
    step_tokens: int = 512


class Scheduler:
    """First come, first served; what is admitted has its memory reserved and is never preempted."""

    def __init__(self, config: SchedulerConfig, fits: Callable[[int], bool]):
        self.config = config
        self._fits = fits
        self.waiting: deque[Sequence] = deque()
        self.running: list[Sequence] = []

    def admit(self) -> Sequence | None:
        """Move the first waiting sequence to the running ones, if there is room for it."""
        if not self.waiting or len(self.running) >= self.config.max_running:
            return None
        if not self._fits(self.waiting[0].reservation):
            return None
        sequence = self.waiting.popleft()
        self.running.append(sequence)
        return sequence

    def plan(self) -> list[tuple[Sequence, int]]:
        """The next batch: sequences with their number of tokens, those that write before those that read.

        Within both, sequences of one variant are beside each other.
        """
        work = [(sequence, 1) for sequence in self.running if sequence.decoding]
        prompt_tokens = 0
        for sequence in self.running:
            if sequence.decoding or sequence.resting or prompt_tokens >= self.config.step_tokens:
                continue
            chunk = self._chunk(sequence)
            if prompt_tokens and prompt_tokens + chunk > self.config.step_tokens:
                break
            work.append((sequence, chunk))
            prompt_tokens += chunk
        return sorted(work, key=lambda item: (not item[0].decoding, item[0].variant or ""))

    def _chunk(self, sequence: Sequence) -> int:
        chunk = min(self.config.prefill_chunk, len(sequence.prompt_token_ids) - sequence.prefilled)
        if sequence.rows_at_once is not None:
            chunk = min(chunk, sequence.rows_at_once)
        if sequence.renewal is None:
            return chunk
        return min(chunk, sequence.renewal.tokens_to_border(sequence.prefilled))

    def remove(self, sequence: Sequence) -> None:
        """Forget a finished or cancelled sequence, running or waiting."""
        if sequence in self.running:
            self.running.remove(sequence)
        elif sequence in self.waiting:
            self.waiting.remove(sequence)
