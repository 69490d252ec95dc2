"""Between the engine thread and one asyncio reader: a slow reader finds its tokens merged, never a long queue."""

import asyncio
from collections.abc import AsyncIterator
from threading import Lock

from server.engine.sequence import TokenEvent


class Mailbox:
    """Holds at most one merged event. `put` may be called from any thread, the rest from the reader's loop."""

    def __init__(self, loop: asyncio.AbstractEventLoop):
        self._loop = loop
        self._lock = Lock()
        self._pending: TokenEvent | None = None
        self._arrived = asyncio.Event()

    def put(self, event: TokenEvent) -> None:
        """Leave tokens for the reader; wakes it only when it has nothing to read yet."""
        with self._lock:
            waiting = self._pending
            if waiting is not None:
                event = waiting.followed_by(event)
            self._pending = event
        if waiting is None:
            self._wake()

    async def events(self) -> AsyncIterator[TokenEvent]:
        """Merged events until the one that carries a finish reason."""
        while True:
            await self._arrived.wait()
            self._arrived.clear()
            with self._lock:
                event, self._pending = self._pending, None
            if event is None:
                continue
            yield event
            if event.finish_reason is not None:
                return

    def _wake(self) -> None:
        try:
            self._loop.call_soon_threadsafe(self._arrived.set)
        except RuntimeError:
            # The reader's loop has been closed: nobody is left to read.
            return
