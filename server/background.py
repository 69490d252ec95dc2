"""One thread that does pieces of work in turn, at the lowest priority, so that nothing else waits for them."""

import logging
import os
import threading
from collections import deque
from collections.abc import Callable

import torch

logger = logging.getLogger(__name__)

MAX_WAITING = 64  # pieces of work
NICENESS = 19


class BackgroundWork:
    """Does one piece of work after another in a thread at low priority; refuses what does not fit its queue.

    `failed` is called for every piece that raised.
    """

    def __init__(self, failed: Callable[[], None]) -> None:
        self._failed = failed
        self._waiting: deque[Callable[[], None]] = deque()
        self._changed = threading.Condition()
        self._busy = self._stopping = False
        self._thread = threading.Thread(target=self._run, name="credit", daemon=True)
        self._thread.start()

    def put(self, work: Callable[[], None]) -> bool:
        """Queue it, without blocking; False when the queue is full or closed."""
        with self._changed:
            if self._stopping or len(self._waiting) >= MAX_WAITING:
                return False
            self._waiting.append(work)
            self._changed.notify_all()
            return True

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
                work = self._waiting.popleft()
                self._busy = True
            try:
                work()
            except Exception:
                logger.exception("background work failed")
                self._failed()
            finally:
                with self._changed:
                    self._busy = False
                    self._changed.notify_all()
