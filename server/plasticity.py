"""From routed prompts to windows of statistics: windows counted in tokens, and what is dropped.

Knows lessons and the key store's statistics; how lessons become credit is `server.crediting`.
"""

import logging
import threading
from collections import OrderedDict
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import numpy as np

from keystore.errors import NonFiniteStatistics
from keystore.records import GravityConfig, ScopeId
from keystore.statistics import RoutingStats
from keystore.store import KeyStore
from model.blocks.base import ExpertBlock
from model.transformer import Transformer
from server.background import BackgroundWork
from server.crediting import Crediting, LayerRows, LessonOutOfTurn, RowsByLayer
from server.engine.sequence import Lesson

logger = logging.getLogger(__name__)

MAX_OPEN_WINDOWS = 256  # scopes whose current window is not full yet; the oldest is closed early beyond that
DRAIN_S = 10.0  # how long a flush waits for credit that is still being computed


@dataclass(slots=True)
class OpenWindow:
    """Tokens that wait for their window to fill up, per layer."""

    rows: dict[int, list[LayerRows]] = field(default_factory=dict[int, list[LayerRows]])
    tokens: int = 0

    def add(self, added: RowsByLayer) -> None:
        for layer, rows in added.items():
            self.rows.setdefault(layer, []).append(rows)
        self.tokens += len(next(iter(added.values())))


class Teacher:
    """Collects what prompts teach, scope by scope, and gives whole windows to the key store.

    A window is a number of tokens: where requests, chunks or batches began and ended leaves no mark on it.
    Lessons come from the engine thread; `gradient` credit is computed in a thread of its own, which `close` ends.
    """

    def __init__(
        self,
        model: Transformer,
        store: KeyStore,
        gravity: GravityConfig,
        blocks: Mapping[int, ExpertBlock],
        plastic_layers: frozenset[int],
    ):
        self._store = store
        self._gravity = gravity
        self._crediting = Crediting(model, blocks, plastic_layers, gravity)
        self._anchor_norms: Mapping[int, float] = {
            layer: float(np.linalg.norm(keys, axis=1).mean())
            for layer, keys in store.view(ScopeId("anchor")).keys.items()
        }
        self._open: OrderedDict[ScopeId, OpenWindow] = OrderedDict()
        self._lock = threading.Lock()
        store.subscribe_deleted(self.discard)
        self.background = BackgroundWork() if gravity.rule == "gradient" else None

    def lesson_taker(self, scope: ScopeId) -> Callable[[Lesson], None]:
        """What a sequence of this scope hands its prompt chunks to."""

        def take(lesson: Lesson) -> None:
            self.take(scope, lesson)

        return take

    def take(self, scope: ScopeId, lesson: Lesson, reward: float = 1.0, first: int = 0) -> None:
        """Add one chunk's tokens, those from row `first` on, to the scope's window, now or in their turn."""

        def add(rows: RowsByLayer | None) -> None:
            if rows is not None:
                self.add(scope, {layer: each.cut(slice(first, None)) for layer, each in rows.items()})

        self.credit(scope, lesson, reward, add)

    def credit(
        self, scope: ScopeId, lesson: Lesson, reward: float, then: Callable[[RowsByLayer | None], None]
    ) -> None:
        """Hand the lesson's rows to `then`: now or, with gradient credit, in their turn; None if dropped and counted."""
        if self.background is None:
            then(self._crediting.rows(lesson, reward, self._store.settling_ids(scope)))
        elif not self.background.put(lambda: then(self._rows_in_turn(scope, lesson, reward))):
            self._store.count_dropped("credit_behind")
            then(None)

    def add(self, scope: ScopeId, added: RowsByLayer) -> None:
        """Add tokens to the scope's window, and submit every window that they fill."""
        with self._lock:
            window = self._open.setdefault(scope, OpenWindow())
            self._open.move_to_end(scope)
            window.add(added)
            while window.tokens >= self._gravity.window_tokens:
                self.submit(scope, window, self._gravity.window_tokens)
            if not window.tokens:
                del self._open[scope]
            while len(self._open) > MAX_OPEN_WINDOWS:
                oldest, waiting = self._open.popitem(last=False)
                self.submit(oldest, waiting, waiting.tokens)

    def flush(self) -> None:
        """Submit what is left in windows that are not full, after credit that is still being computed."""
        if self.background is not None:
            self.background.drain(DRAIN_S)
        with self._lock:
            while self._open:
                scope, window = self._open.popitem(last=False)
                self.submit(scope, window, window.tokens)

    def discard(self, scope: ScopeId) -> None:
        """Drop the scope's open window: its credit was earned with keys that are being replaced."""
        with self._lock:
            self._open.pop(scope, None)

    def close(self) -> None:
        """Submit what there is and end the thread, before a shutdown."""
        self.flush()
        if self.background is not None:
            self.background.stop()

    def submit(
        self, scope: ScopeId, window: OpenWindow, tokens: int, done: Callable[[], None] | None = None
    ) -> bool:
        """Cut the oldest `tokens` tokens out of the window and give their sums to the store.

        False when they are not taken, which is counted; else `done` is called as `KeyStore.submit` says.
        """
        view = self._store.view(scope)
        traces = {}
        for layer, pieces in window.rows.items():
            rows = LayerRows.joined(pieces)
            window.rows[layer] = [rows.cut(slice(tokens, None))]
            experts = len(view.keys_of(layer))
            traces[layer] = rows.cut(slice(tokens)).trace(self._gravity, self._anchor_norms[layer], experts)
        window.tokens -= tokens
        bonding = self._gravity.bonding_rate > 0
        try:
            stats = RoutingStats.from_tokens(scope, traces, coactivation=bonding)
        except NonFiniteStatistics:
            self._store.count_dropped("non_finite")
            return False
        return self._store.submit(stats, done)

    def _rows_in_turn(self, scope: ScopeId, lesson: Lesson, reward: float) -> RowsByLayer | None:
        try:
            return self._crediting.rows(lesson, reward, self._store.settling_ids(scope))
        except LessonOutOfTurn:
            self._store.count_dropped("credit_behind")
        except Exception:
            self._store.count_dropped("credit_failed")
            logger.exception("credit of a lesson failed")
        return None
