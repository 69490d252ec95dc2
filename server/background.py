"""One thread that does pieces of work in turn, at a low priority, so that nothing else waits for them.

A piece weighs as many tokens as it is about: that is what it keeps in memory while it waits.
"""

import logging
import os
import threading
from collections import deque
from collections.abc import Callable

import torch

logger = logging.getLogger(__name__)

NICENESS = 19  # with 10, threads that decode together wait for each other: 23 % of eight streams
MAX_WAITING_TOKENS = 4096  # 13 KB each with the shipped blocks


class BackgroundWork:
    """Does one piece of work after another in a thread at low priority, behind a bounded queue.

    `failed` is called for every piece that raised.
    """

    def __init__(self, failed: Callable[[], None]) -> None:
        self._failed = failed
        self._waiting: deque[tuple[Callable[[], None], int]] = deque()
        self._waiting_tokens = 0
        self._changed = threading.Condition()
        self._busy = self._stopping = False
        self._thread = threading.Thread(target=self._run, name="credit", daemon=True)
        self._thread.start()

    def put(self, work: Callable[[], None], tokens: int, *, wait: bool = False) -> bool:
        """Queue it. False when the queue is closed, or full and nobody wants to `wait` until there is room."""
        with self._changed:
            if wait:
                self._changed.wait_for(lambda: self._stopping or self._fits(tokens))
            if self._stopping or not self._fits(tokens):
                return False
            self._waiting.append((work, tokens))
            self._waiting_tokens += tokens
            self._changed.notify_all()
            return True

    def _fits(self, tokens: int) -> bool:
        return not self._waiting or self._waiting_tokens + tokens <= MAX_WAITING_TOKENS

    @property
    def waiting_tokens(self) -> int:
        return self._waiting_tokens

    def drain(self, timeout_s: float) -> bool:
        """Wait until all work is done; False when time ran out."""
        with self._changed:
            return self._changed.wait_for(lambda: not self._waiting and not self._busy, timeout_s)

    def stop(self) -> int:
        """End the thread after the work at hand; returns how many pieces waited and are not done."""
        with self._changed:
            self._stopping = True
            undone = len(self._waiting)
            self._waiting.clear()
            self._waiting_tokens = 0
            self._changed.notify_all()
        self._thread.join()
        return undone

    def _run(self) -> None:
        torch.set_num_threads(1)
        os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), NICENESS)
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._waiting or self._stopping)
                if self._stopping:
                    return
                work, tokens = self._waiting.popleft()
                self._waiting_tokens -= tokens
                self._busy = True
                self._changed.notify_all()
            try:
                work()
            except Exception:
                logger.exception("background work failed")
                self._failed()
            finally:
                del work  # and what it keeps in memory
                with self._changed:
                    self._busy = False
                    self._changed.notify_all()
