"""The thread that owns the engine, and the only way to it: submit, cancel, drain, short work between steps."""

import logging
import threading
import time
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future
from typing import TypeVar

import torch

from server.engine.engine import Engine
from server.engine.errors import EngineDraining, EngineOverloaded
from server.engine.sequence import FinishReason, Sequence

logger = logging.getLogger(__name__)

T = TypeVar("T")

IDLE_BEAT_S = 0.5  # an idle engine shows that it is alive this often


class EngineRunner:
    """Runs an engine in its own thread. Methods are safe to call from any thread."""

    def __init__(self, engine: Engine, threads: int, clock: Callable[[], float] = time.monotonic):
        self.engine = engine
        self._threads = threads
        self._clock = clock
        self._wake = threading.Condition()
        self._inbox: deque[Sequence] = deque()
        self._errands: deque[Callable[[], None]] = deque()
        self._stopping = False
        self._draining = False
        self._last_beat = clock()
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def submit(self, *sequences: Sequence) -> None:
        """Queue sequences, all or none. Raises EngineOverloaded or EngineDraining."""
        with self._wake:
            if self._draining:
                raise EngineDraining("the server is shutting down")
            waiting = len(self._inbox) + len(self.engine.scheduler.waiting)
            if waiting + len(sequences) > self.engine.scheduler.config.max_waiting:
                raise EngineOverloaded(waiting, self._retry_after_s(waiting))
            self._inbox.extend(sequences)
            self._wake.notify()

    def end(self, sequence: Sequence, reason: FinishReason) -> None:
        """The reader wants no more tokens: free the sequence's slot and memory at the next step."""
        with self._wake:
            sequence.ended = sequence.ended or reason
            self._wake.notify()

    def between_steps(self, work: Callable[[], T]) -> Future[T]:
        """Do `work`, which must be short, on the engine's thread before its next step; the result says it is done.

        Until it begins it may be cancelled. Raises EngineDraining.
        """
        done: Future[T] = Future()

        def errand() -> None:
            if not done.set_running_or_notify_cancel():
                return
            try:
                done.set_result(work())
            except Exception as error:  # noqa: BLE001 - it is raised to whoever asked for the work
                done.set_exception(error)

        with self._wake:
            if self._stopping:
                raise EngineDraining("the server is shutting down")
            self._errands.append(errand)
            self._wake.notify()
        return done

    def finish_step(self, timeout_s: float) -> bool:
        """Wait until the step at hand is over and its lessons are taught; False when time ran out."""
        if not self.alive:
            return True
        try:
            self.between_steps(lambda: None).result(timeout_s)
        except (TimeoutError, EngineDraining):
            return False
        return True

    def wake(self) -> None:
        """What a resting sequence waits for has come."""
        with self._wake:
            self._wake.notify()

    def waiting(self) -> list[Sequence]:
        """Sequences that have not started yet."""
        with self._wake:
            return [*self._inbox, *list(self.engine.scheduler.waiting)]

    def running(self) -> list[Sequence]:
        """Sequences that hold a slot and memory."""
        return list(self.engine.scheduler.running)

    def seconds_since_beat(self) -> float:
        """Age of the engine's last sign of life."""
        return self._clock() - self._last_beat

    @property
    def alive(self) -> bool:
        return self._thread.is_alive()

    @property
    def draining(self) -> bool:
        return self._draining

    def begin_drain(self) -> None:
        """Take no new requests; those running and waiting go on."""
        with self._wake:
            self._draining = True

    def stop(self, timeout_s: float) -> bool:
        """Drain, then end the thread; what has not finished in time ends with an error. True if all finished."""
        self.begin_drain()
        deadline = self._clock() + timeout_s
        while self._clock() < deadline and self._busy():
            time.sleep(0.02)
        finished = not self._busy()
        with self._wake:
            self._stopping = True
            self._wake.notify()
        self._thread.join(timeout=10)
        return finished

    def _busy(self) -> bool:
        with self._wake:
            return bool(self._inbox) or not self.engine.idle

    def _run(self) -> None:
        torch.set_num_threads(self._threads)
        while not self._stopping:
            self._receive()
            if not self.engine.idle:
                self._step()
            self._last_beat = self._clock()
        self._receive()
        self.engine.scheduler.running.extend(self.engine.scheduler.waiting)
        self.engine.scheduler.waiting.clear()
        self.engine.fail_running()

    def _receive(self) -> None:
        """Take new sequences in and run errands; sleep while there is nothing to do."""
        with self._wake:
            nothing_to_do = self.engine.idle or self.engine.resting
            if not self._inbox and not self._errands and nothing_to_do and not self._stopping:
                self._wake.wait(IDLE_BEAT_S)
            while self._inbox:
                self.engine.scheduler.waiting.append(self._inbox.popleft())
            errands = [*self._errands]
            self._errands.clear()
        for errand in errands:
            errand()

    def _step(self) -> None:
        try:
            self.engine.step()
        except Exception:
            self.engine.counters.failed_steps += 1
            failed = self.engine.fail_running()
            logger.exception("a step failed", extra={"requests": [s.sequence_id for s in failed]})
        self.engine.teach()

    def _retry_after_s(self, waiting: int) -> int:
        return max(1, min(30, waiting // max(1, self.engine.scheduler.config.max_running)))
