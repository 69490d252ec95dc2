"""Value offsets while serving: those of each session, in memory alone, moved by every window of its prompts.

Knows lessons and when a session is forgotten; the formula is `model.value_offsets`. E experts, H hidden.
"""

import threading
import time
from collections import Counter, OrderedDict
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from weakref import WeakValueDictionary

import torch
import torch.nn.functional as F
from torch import Tensor

from keystore.fairness import who_makes_room
from keystore.records import ScopeId
from model.keys import KeyView
from model.transformer import Transformer
from model.value_offsets import directions, head_metric, moved, pulls
from server.crediting import direct_gradient
from server.engine.sequence import Lesson


@dataclass(frozen=True, slots=True)
class OffsetLimits:
    """How far a window moves offsets, and how many sessions may hold some for how long."""

    rate: float  # eta, of a Gauss-Newton step of the logits
    bound: float  # longest offset, of the same length
    window_tokens: int
    max_sessions: int
    session_ttl_s: float


@dataclass(frozen=True, slots=True, eq=False)
class SessionOffsets:
    """One session's offsets after some windows. Never written again: the next window makes new ones."""

    windows: int = 0
    by_layer: Mapping[int, Tensor] = field(default_factory=dict[int, Tensor])  # (E, H) float32


@dataclass(slots=True, eq=False, weakref_slot=True)
class Session:
    """A session's offsets in force, and the sums of a window that is not full yet."""

    scope: ScopeId
    used_at: float
    offsets: SessionOffsets = field(default_factory=SessionOffsets)
    tokens: int = 0
    pulled: dict[int, Tensor] = field(default_factory=dict[int, Tensor])  # (E, H)
    output_norms: dict[int, list[Tensor]] = field(default_factory=dict[int, list[Tensor]])

    def newest(self, keys: KeyView) -> Mapping[int, Tensor]:
        """Offsets by layer, a row for every expert of `keys`: zero for those that have come since."""
        by_layer = self.offsets.by_layer
        return {layer: _with_rows(rows, len(keys.keys_of(layer))) for layer, rows in by_layer.items()}


class ValueOffsets:
    """Every session's offsets of one endpoint. Lessons come from the engine's thread, the rest from any."""

    def __init__(self, model: Transformer, limits: OffsetLimits, clock: Callable[[], float] = time.monotonic):
        self._model, self._limits, self._clock = model, limits, clock
        self._metric = head_metric(model.final_norm, model.head)
        self._sessions: OrderedDict[ScopeId, Session] = OrderedDict()  # that were taught, in order of use
        self._opened = WeakValueDictionary[ScopeId, Session]()  # those, and others that requests hold
        self._lock = threading.Lock()
        self.windows: Counter[str] = Counter()  # by outcome: "moved", "non_finite"

    def open(self, scope: ScopeId) -> Session:
        """The session's own, new if nobody used it within its time to live. Nobody makes room for one that reads."""
        with self._lock:
            self._expire()
            if scope in self._sessions:
                self._use(self._sessions[scope])
            return self._opened.setdefault(scope, Session(scope, self._clock()))

    def take(self, session: Session, lesson: Lesson) -> None:
        """Add one chunk's tokens to the session's window, and move the offsets by every window that they fill.

        Above `max_sessions` the longest unused of the tenant that has the most makes room. A session that was
        dropped since it was opened learns nothing more.
        """
        with self._lock:
            if self._opened.get(session.scope) is not session:
                return
            self._sessions[session.scope] = session
            self._use(session)
            for scope in who_makes_room(
                self._sessions, max(0, len(self._sessions) - self._limits.max_sessions)
            ):
                self._forget(scope)
        gradient = direct_gradient(self._model, lesson)
        wanted = directions(gradient, lesson.hidden[: len(gradient)], self._metric)
        first = 0
        while first < len(wanted):
            rows = slice(first, min(len(wanted), first + self._limits.window_tokens - session.tokens))
            _collect(session, lesson, wanted, rows)
            first = rows.stop
            if session.tokens == self._limits.window_tokens:
                self._move(session, lesson)

    def drop(self, scope: ScopeId) -> None:
        """Forget a session's offsets, if it has any; requests that are running keep what they read."""
        with self._lock:
            self._forget(scope)

    def held(self) -> tuple[int, int]:
        """How many sessions have offsets, and the bytes of all that is held for sessions."""
        with self._lock:
            self._expire()
            sessions = list(self._sessions.values())
        tensors = [t for s in sessions for t in (*s.offsets.by_layer.values(), *s.pulled.copy().values())]
        return sum(s.offsets.windows > 0 for s in sessions), sum(t.nbytes for t in tensors)

    def _use(self, session: Session) -> None:
        session.used_at = self._clock()
        self._sessions.move_to_end(session.scope)

    def _forget(self, scope: ScopeId) -> None:
        self._sessions.pop(scope, None)
        self._opened.pop(scope, None)

    def _expire(self) -> None:
        oldest = self._clock() - self._limits.session_ttl_s
        while self._sessions and (first := next(iter(self._sessions.values()))).used_at < oldest:
            self._forget(first.scope)

    def _move(self, session: Session, lesson: Lesson) -> None:
        """One window's worth of learning; the window is empty afterwards."""
        by_layer: dict[int, Tensor] = {}
        for layer, pulled in session.pulled.items():
            before = session.offsets.by_layer.get(layer, torch.zeros_like(pulled))
            experts = max(len(before), len(pulled))
            by_layer[layer] = moved(
                _with_rows(before, experts),
                _with_rows(pulled, experts),
                torch.cat(session.output_norms[layer]),
                self._limits.rate,
                self._limits.bound,
                lesson.trace.by_layer[layer].expert_ids.shape[1],
            )
        finite = all(offsets.isfinite().all() for offsets in by_layer.values())
        if finite:
            session.offsets = SessionOffsets(session.offsets.windows + 1, by_layer)
        self.windows["moved" if finite else "non_finite"] += 1
        session.pulled, session.output_norms, session.tokens = {}, {}, 0


def _collect(session: Session, lesson: Lesson, wanted: Tensor, rows: slice) -> None:
    for layer, trace in lesson.trace.by_layer.items():
        experts = len(lesson.keys.keys_of(layer))
        pulled = pulls(trace.expert_ids[rows], trace.gates[rows], wanted[rows], experts)
        before = session.pulled.get(layer, torch.zeros_like(pulled))
        experts = max(len(before), experts)
        session.pulled[layer] = _with_rows(before, experts) + _with_rows(pulled, experts)
        assert trace.output_norms is not None, layer
        session.output_norms.setdefault(layer, []).append(trace.output_norms[rows])
    session.tokens += rows.stop - rows.start


def _with_rows(offsets: Tensor, count: int) -> Tensor:
    """Filled up with zero rows to `count`; longer ones lose experts that the reader's keys do not know."""
    missing = count - len(offsets)
    return F.pad(offsets, (0, 0, 0, missing)) if missing > 0 else offsets[:count]
