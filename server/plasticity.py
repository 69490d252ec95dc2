"""From routed prompts to windows of statistics: windows counted in tokens, and what is dropped.

Knows lessons and the key store's statistics; how lessons become credit is `server.crediting`.
"""

import logging
import threading
from collections import OrderedDict
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from weakref import WeakValueDictionary

import numpy as np

from keystore.errors import NonFiniteStatistics
from keystore.fairness import who_makes_room
from keystore.records import GravityConfig, ScopeId
from keystore.statistics import RoutingStats, TokenTrace
from keystore.store import KeyStore
from model.blocks.base import ExpertBlock
from model.transformer import Transformer
from server.background import BackgroundWork
from server.crediting import Crediting, LayerRows, LessonOutOfTurn, RowsByLayer
from server.engine.sequence import Lesson

logger = logging.getLogger(__name__)

MAX_OPEN_WINDOWS = 256  # scopes whose current window is not full yet; beyond that some are closed early
DRAIN_S = 10.0  # how long a flush waits for credit that is still being computed


@dataclass(slots=True, eq=False, weakref_slot=True)
class Epoch:
    """The time in which a scope's keys follow from one another, until somebody replaces them."""

    over: bool = False


@dataclass(slots=True)
class OpenWindow:
    """Tokens that wait for their window to fill up, per layer; the oldest of them were read in `epoch`."""

    epoch: Epoch
    rows: dict[int, list[LayerRows]] = field(default_factory=dict[int, list[LayerRows]])
    tokens: int = 0

    def add(self, added: RowsByLayer, epoch: Epoch) -> None:
        if not self.tokens:
            self.epoch = epoch
        for layer, rows in added.items():
            self.rows.setdefault(layer, []).append(rows)
        self.tokens += len(next(iter(added.values())))


class Teacher:
    """Collects what prompts teach, scope by scope, and gives whole windows to the key store.

    A window is a number of tokens: where requests, chunks or batches began and ended leaves no mark on it.
    Lessons come from the engine thread; their credit is computed in a thread of its own, which `close` ends. When that
    falls behind, lessons of `gradient` credit are dropped and counted, and for `direct` credit the engine waits.
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
        # The blocks have the born experts' anchors alone: what one tenant adds scales nobody's credit.
        anchors = {layer: blocks[layer].get_parameter("anchors").detach() for layer in plastic_layers}
        self._anchor_norms: Mapping[int, float] = {
            layer: float(np.linalg.norm(rows.float().numpy(force=True), axis=1).mean())
            for layer, rows in anchors.items()
        }
        self._open: OrderedDict[ScopeId, OpenWindow] = OrderedDict()
        self._epochs = WeakValueDictionary[ScopeId, Epoch]()  # of those that are teaching
        self._lock = threading.RLock()
        store.news.deleted.add(self.discard)
        store.news.replaced.add(self.discard)
        self.background = None if gravity.rule == "literal" else BackgroundWork(self._count_failed)

    @property
    def credits_whole_prompts(self) -> bool:
        """Whether a prompt's lessons must begin at its first token: `gradient` credit goes through all of it."""
        return self._gravity.rule == "gradient"

    @property
    def credit_waiting_tokens(self) -> int:
        """Tokens of lessons whose credit has not been begun."""
        return 0 if self.background is None else self.background.waiting_tokens

    def lesson_taker(self, scope: ScopeId) -> Callable[[Lesson], None]:
        """What a sequence of this scope, which has pinned its keys, hands its prompt chunks to."""
        epoch = self.epoch(scope)

        def take(lesson: Lesson) -> None:
            self.take(scope, lesson, epoch=epoch)

        return take

    def epoch(self, scope: ScopeId) -> Epoch:
        """The one that runs now."""
        with self._lock:
            return self._epochs.setdefault(scope, Epoch())

    def take(
        self,
        scope: ScopeId,
        lesson: Lesson,
        reward: float = 1.0,
        first: int = 0,
        epoch: Epoch | None = None,
    ) -> None:
        """Add one chunk's tokens, those from row `first` on, to the scope's window, now or in their turn.

        They teach nothing once `epoch` (None: the present one) is over.
        """
        read_in = self.epoch(scope) if epoch is None else epoch

        def add(rows: RowsByLayer | None) -> None:
            if rows is not None:
                own = {layer: each.cut(slice(first, None)) for layer, each in rows.items()}
                self.add(scope, own, read_in)

        self.credit(scope, lesson, reward, add)

    def credit(
        self, scope: ScopeId, lesson: Lesson, reward: float, then: Callable[[RowsByLayer | None], None]
    ) -> None:
        """Hand the lesson's rows to `then`: in their turn, the literal rule's now; None if dropped and counted."""
        if self.background is None:
            then(self._crediting.rows(lesson, reward, self._store.experts.settling_ids(scope)))
            return

        def work() -> None:
            then(self._rows_in_turn(scope, lesson, reward))

        if not self.background.put(work, len(lesson.targets), wait=self._gravity.rule == "direct"):
            self._store.count_dropped("credit_behind")
            then(None)

    def add(self, scope: ScopeId, added: RowsByLayer, epoch: Epoch) -> None:
        """Add tokens that were read in an epoch to the scope's window, and submit every window that they fill."""
        with self._lock:
            if epoch.over:
                self._store.count_dropped("superseded")
                return
            window = self._open.setdefault(scope, OpenWindow(epoch))
            self._open.move_to_end(scope)
            window.add(added, epoch)
            while window.tokens >= self._gravity.window_tokens:
                self.submit(scope, window, self._gravity.window_tokens)
            if not window.tokens:
                del self._open[scope]
            for closed in who_makes_room(self._open, max(0, len(self._open) - MAX_OPEN_WINDOWS)):
                early = self._open.pop(closed)
                self.submit(closed, early, early.tokens)

    def flush(self) -> None:
        """Submit what is left in windows that are not full, after credit that is still being computed."""
        if self.background is not None:
            self.background.drain(DRAIN_S)
        with self._lock:
            while self._open:
                scope, window = self._open.popitem(last=False)
                self.submit(scope, window, window.tokens)

    def discard(self, scope: ScopeId) -> None:
        """Drop what the scope has not learned yet, wherever it waits: it was read with keys that are gone."""
        with self._lock:
            self._open.pop(scope, None)
            ending = self._epochs.pop(scope, None)
            if ending is not None:
                ending.over = True

    def close(self) -> None:
        """End the thread, count the lessons that it did not get to and submit what there is, before a shutdown."""
        if self.background is not None:
            self.background.drain(DRAIN_S)
            for _ in range(self.background.stop()):
                self._store.count_dropped("credit_behind")
        self.flush()

    def submit(
        self, scope: ScopeId, window: OpenWindow, tokens: int, done: Callable[[], None] | None = None
    ) -> bool:
        """Cut the oldest `tokens` tokens out of the window and give their sums to the store.

        False when they are not taken, which is counted; else `done` is called as `KeyStore.submit` says.
        """
        try:
            stats = RoutingStats.from_tokens(
                scope, self._cut(window, tokens), coactivation=self._gravity.bonding_rate > 0
            )
        except NonFiniteStatistics:
            self._store.count_dropped("non_finite")
            return False
        with self._lock:
            if window.epoch.over:
                self._store.count_dropped("superseded")
                return False
            return self._store.submit(stats, done)

    def _cut(self, window: OpenWindow, tokens: int) -> dict[int, TokenTrace]:
        # All scopes have as many experts, and the anchors are always in memory: this may be the engine's thread.
        anchors = self._store.view(ScopeId("anchor"))
        traces: dict[int, TokenTrace] = {}
        for layer, pieces in window.rows.items():
            rows = LayerRows.joined(pieces)
            window.rows[layer] = [rows.cut(slice(tokens, None))]
            experts = len(anchors.keys_of(layer))
            traces[layer] = rows.cut(slice(tokens)).trace(self._gravity, self._anchor_norms[layer], experts)
        window.tokens -= tokens
        return traces

    def _rows_in_turn(self, scope: ScopeId, lesson: Lesson, reward: float) -> RowsByLayer | None:
        try:
            return self._crediting.rows(lesson, reward, self._store.experts.settling_ids(scope))
        except LessonOutOfTurn:
            self._store.count_dropped("credit_behind")
        except Exception:
            self._store.count_dropped("credit_failed")
            logger.exception("credit of a lesson failed")
        return None

    def _count_failed(self) -> None:
        self._store.count_dropped("credit_failed")
