"""Published key versions as they happen. A slow listener loses the oldest, and is told how many."""

import asyncio
from collections import deque
from collections.abc import AsyncGenerator
from typing import Any

from fastapi import APIRouter, Request, Response
from starlette.concurrency import run_in_threadpool

from keystore.records import ScopeId
from keystore.snapshot import KeySnapshot
from keystore.store import KeyStore
from server.engine.runner import EngineRunner
from server.exchange import caller_of
from server.keyspace import moved_experts
from server.refusals import TooManyListeners
from server.routes.keys import Scope, Session
from server.routes.lookup import routing_keys_of, visible_scope
from server.routes.streams import EventStream, sse
from server.routes.wire import StrictJsonRoute
from server.state import state_of

router = APIRouter(prefix="/v1/keys", route_class=StrictJsonRoute)

MAX_LISTENERS = 64
MAX_WAITING_EVENTS = 32
DRAIN_CHECK_S = 1.0
KEEP_ALIVE_EVERY = 15  # checks
KEEP_ALIVE = b": still here\n\n"


class Listener:
    """Between the consolidating thread and one reader's loop."""

    def __init__(self, store: KeyStore, scope: ScopeId, loop: asyncio.AbstractEventLoop):
        self._scope = scope
        self._loop = loop
        self._waiting: deque[KeySnapshot] = deque()
        self._arrived = asyncio.Event()
        self.missed = 0
        self.close = store.news.published.add(self._take)

    async def next(self, timeout_s: float) -> KeySnapshot | None:
        """The oldest version not yet read, or None when none came in time."""
        if not self._waiting:
            self._arrived.clear()
            try:
                async with asyncio.timeout(timeout_s):
                    await self._arrived.wait()
            except TimeoutError:
                return None
        return self._waiting.popleft()

    def _take(self, snapshot: KeySnapshot) -> None:
        if snapshot.scope == self._scope and not self._loop.is_closed():
            self._loop.call_soon_threadsafe(self._keep, snapshot)

    def _keep(self, snapshot: KeySnapshot) -> None:
        if len(self._waiting) == MAX_WAITING_EVENTS:
            self._waiting.popleft()
            self.missed += 1
        self._waiting.append(snapshot)
        self._arrived.set()


@router.get("/{endpoint}/events", response_class=EventStream, status_code=200)
async def stream_versions(
    request: Request, endpoint: str, scope: Scope = None, session_id: Session = None
) -> Response:
    """Server-sent events: one for each new version of the scope, until the client or the server leaves."""
    state = state_of(request)
    served, plasticity = routing_keys_of(state.registry, endpoint)
    seen = visible_scope(caller_of(request), plasticity, scope, session_id)
    listeners: set[Listener] = request.app.state.listeners
    if len(listeners) >= MAX_LISTENERS:
        raise TooManyListeners(f"{len(listeners)} listeners are connected already; allowed: {MAX_LISTENERS}")
    listener = Listener(plasticity.store, seen, asyncio.get_running_loop())
    listeners.add(listener)

    def release() -> None:
        listener.close()
        listeners.discard(listener)

    return EventStream(_events(plasticity.store, listener, served.runner), {}, release=release)


async def _events(store: KeyStore, listener: Listener, runner: EngineRunner) -> AsyncGenerator[bytes]:
    yield KEEP_ALIVE
    quiet = 0
    while not runner.draining:
        snapshot = await listener.next(DRAIN_CHECK_S)
        quiet = quiet + 1 if snapshot is None else 0
        if snapshot is not None:
            yield sse(await run_in_threadpool(_described, store, snapshot, listener.missed))
        elif quiet % KEEP_ALIVE_EVERY == 0:
            yield KEEP_ALIVE


def _described(store: KeyStore, snapshot: KeySnapshot, missed: int) -> dict[str, Any]:
    moved = moved_experts(store, snapshot)
    return {
        "scope": str(snapshot.scope),
        "version": snapshot.version,
        "parent": snapshot.parent,
        "created_at": snapshot.created_at,
        "tokens": snapshot.tokens,
        "reason": snapshot.reason,
        "checksum": snapshot.checksum,
        "moved": None if moved is None else {str(layer): experts for layer, experts in moved.items()},
        "missed": missed,
    }
