"""Who hears of new versions, of replaced keys, or of deleted sessions. Calls back on the publishing thread; a callback that fails harms nobody else."""

import logging
import threading
from collections.abc import Callable, Sequence
from typing import Generic, TypeVar

from keystore.records import ScopeId
from keystore.snapshot import KeySnapshot

logger = logging.getLogger(__name__)

T = TypeVar("T", KeySnapshot, ScopeId)


class Subscribers(Generic[T]):
    """Thread-safe."""

    def __init__(self) -> None:
        self._changing = threading.Lock()
        self._callbacks: dict[object, Callable[[T], None]] = {}
        self.failures = 0

    def __len__(self) -> int:
        return len(self._callbacks)

    def add(self, callback: Callable[[T], None]) -> Callable[[], None]:
        """Returns the function that takes it out again."""
        token = object()
        with self._changing:
            self._callbacks = {**self._callbacks, token: callback}

        def remove() -> None:
            with self._changing:
                self._callbacks = {key: each for key, each in self._callbacks.items() if key is not token}

        return remove

    def notify(self, news: Sequence[T]) -> None:
        """Call everybody with everything, in order. One that raises is logged and counted."""
        for item in news:
            for callback in self._callbacks.values():
                try:
                    callback(item)
                except Exception:
                    self.failures += 1
                    logger.exception(
                        "subscriber failed",
                        extra={"scope": str(item if isinstance(item, ScopeId) else item.scope)},
                    )


class StoreNews:
    """What a store has to tell, by kind; in order, on the thread that makes the change."""

    def __init__(self) -> None:
        self.published = Subscribers[KeySnapshot]()  # every new version, once readers have it
        self.deleted = Subscribers[ScopeId]()  # every session that expired or was discarded
        # Every scope whose keys were replaced, not learned: by rollback, reset, restore or the guard. What was being
        # gathered to teach it was about the keys that it had.
        self.replaced = Subscribers[ScopeId]()

    @property
    def failures(self) -> int:
        """Callbacks that raised."""
        return self.published.failures + self.deleted.failures + self.replaced.failures
