"""From routed prompts to windows of statistics: credit, windows counted in tokens, and what is dropped.

Knows the model's traces and the key store's statistics; each knows nothing of the other.
"""

import threading
from collections import OrderedDict
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from keystore.errors import NonFiniteStatistics
from keystore.gravity import credit_weights, scale_queries
from keystore.records import GravityConfig, RoutingStats, ScopeId, TokenTrace
from keystore.store import KeyStore
from model.credit import expert_credit, loss_gradient
from model.transformer import Transformer
from server.engine.sequence import Lesson

MAX_OPEN_WINDOWS = 256  # scopes whose current window is not full yet; the oldest is closed early beyond that

Rows = tuple[NDArray[np.int64], NDArray[np.float32], NDArray[np.float32]]  # expert ids, queries, raw credit


@dataclass(slots=True)
class OpenWindow:
    """Tokens that wait for their window to fill up, per layer."""

    rows: dict[int, list[Rows]] = field(default_factory=dict[int, list[Rows]])
    tokens: int = 0


class Teacher:
    """Collects what prompts teach, scope by scope, and gives whole windows to the key store.

    A window is a number of tokens: where requests, chunks or batches began and ended leaves no mark on it.
    Lessons come from the engine thread; `flush` may come from another.
    """

    def __init__(self, model: Transformer, store: KeyStore, gravity: GravityConfig, num_experts: int):
        self._model = model
        self._store = store
        self._gravity = gravity
        self._num_experts = num_experts
        self._anchor_norms: Mapping[int, float] = {
            layer: float(np.linalg.norm(keys, axis=1).mean())
            for layer, keys in store.view(ScopeId("anchor")).keys.items()
        }
        self._open: OrderedDict[ScopeId, OpenWindow] = OrderedDict()
        self._lock = threading.Lock()

    def lesson_taker(self, scope: ScopeId) -> Callable[[Lesson], None]:
        """What a sequence of this scope hands its prompt chunks to."""

        def take(lesson: Lesson) -> None:
            self.take(scope, lesson)

        return take

    def take(self, scope: ScopeId, lesson: Lesson) -> None:
        """Add one chunk's tokens to the scope's window, and submit every window that it fills."""
        added = self._rows(lesson)
        with self._lock:
            window = self._open.setdefault(scope, OpenWindow())
            self._open.move_to_end(scope)
            for layer, rows in added.items():
                window.rows.setdefault(layer, []).append(rows)
            window.tokens += len(lesson.targets)
            while window.tokens >= self._gravity.window_tokens:
                self._submit(scope, window, self._gravity.window_tokens)
            if not window.tokens:
                del self._open[scope]
            while len(self._open) > MAX_OPEN_WINDOWS:
                oldest, waiting = self._open.popitem(last=False)
                self._submit(oldest, waiting, waiting.tokens)

    def flush(self) -> None:
        """Submit what is left in windows that are not full, before a shutdown."""
        with self._lock:
            while self._open:
                scope, window = self._open.popitem(last=False)
                self._submit(scope, window, window.tokens)

    def discard(self, scope: ScopeId) -> None:
        """Drop the scope's open window: its credit was earned with keys that are being replaced."""
        with self._lock:
            self._open.pop(scope, None)

    def _rows(self, lesson: Lesson) -> dict[int, Rows]:
        count = len(lesson.targets)
        direct = self._gravity.rule == "direct"
        gradient = loss_gradient(self._model, lesson.hidden, lesson.targets) if direct else None
        added: dict[int, Rows] = {}
        for layer, trace in lesson.trace.by_layer.items():
            ids = trace.expert_ids[:count].numpy(force=True)
            queries = trace.queries[:count].numpy(force=True)
            credit = (
                np.ones(ids.shape, dtype=np.float32)
                if gradient is None
                else expert_credit(trace, gradient).numpy(force=True)
            )
            added[layer] = (ids, queries, credit)
        return added

    def _submit(self, scope: ScopeId, window: OpenWindow, tokens: int) -> None:
        """Cut the oldest `tokens` tokens out of the window and give their sums to the store."""
        traces: dict[int, TokenTrace] = {}
        for layer, pieces in window.rows.items():
            ids, queries, credit = (np.concatenate(parts) for parts in zip(*pieces, strict=True))
            window.rows[layer] = [(ids[tokens:], queries[tokens:], credit[tokens:])]
            traces[layer] = self._trace(layer, (ids[:tokens], queries[:tokens], credit[:tokens]))
        window.tokens -= tokens
        bonding = self._gravity.bonding_rate > 0
        try:
            stats = RoutingStats.from_tokens(scope, traces, coactivation=bonding)
        except NonFiniteStatistics:
            self._store.count_dropped("non_finite")
            return
        self._store.submit(stats)

    def _trace(self, layer: int, rows: Rows) -> TokenTrace:
        ids, queries, credit = rows
        if self._gravity.rule == "literal":
            return TokenTrace(ids, queries, None, self._num_experts)
        return TokenTrace(
            ids,
            scale_queries(queries, self._anchor_norms[layer]),
            credit_weights(credit, self._gravity.credit_clamp),
            self._num_experts,
        )
