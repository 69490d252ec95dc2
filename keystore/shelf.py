"""Which versions are at hand: the latest of every live scope, a few older ones, pinned ones, the rest from
disk.

Readers swap by reference under a short lock that is never held during I/O. Knows no gravity and no commits.
"""

import threading
import weakref
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

from keystore.backends.base import ScopeHead
from keystore.errors import KeyVersionUnavailable
from keystore.records import Float32Array, ScopeId
from keystore.snapshot import KeySnapshot


class ScopeHistory:
    """The versions of one scope that are in memory, and what it has learned since the latest without moving a
    key.
    """

    __slots__ = ("latest", "pinned", "recent", "tokens", "usage")

    def __init__(self, latest: KeySnapshot) -> None:
        self.recent: OrderedDict[int, KeySnapshot] = OrderedDict()
        self.pinned: weakref.WeakValueDictionary[int, KeySnapshot] = weakref.WeakValueDictionary()
        self.latest = latest
        self.usage: Mapping[int, Float32Array] = latest.usage
        self.tokens = latest.tokens

    def remember(self, snapshot: KeySnapshot, capacity: int) -> None:
        self.pinned[snapshot.version] = snapshot
        self.recent[snapshot.version] = snapshot
        self.recent.move_to_end(snapshot.version)
        while len(self.recent) > capacity:
            self.recent.popitem(last=False)


@dataclass(frozen=True, slots=True)
class ShelfLimits:
    """How much stays in memory."""

    versions_per_scope: int
    sessions: int


class VersionShelf:
    """Thread-safe. `origin` is version 0; `load` reads a stored version; `heads` says what is stored."""

    def __init__(
        self,
        origin: KeySnapshot,
        heads: Sequence[ScopeHead],
        load: Callable[[ScopeId, int], KeySnapshot],
        limits: ShelfLimits,
        clock: Callable[[], float],
    ) -> None:
        self._origin, self._load, self._limits, self._clock = origin, load, limits, clock
        self._lock = threading.Lock()
        self._heads = {head.scope: head for head in heads}
        self._used_at = {head.scope: head.created_at for head in heads if head.scope.kind == "session"}
        self._standing: dict[ScopeId, ScopeHistory] = {}
        self._sessions: OrderedDict[ScopeId, ScopeHistory] = OrderedDict()

    def history(self, scope: ScopeId) -> ScopeHistory | None:
        """The scope's own history, from disk if need be; None before its first own version."""
        with self._lock:
            live = self._live(scope)
            head = self._heads.get(scope)
        if live is not None or head is None:
            return live
        loaded = ScopeHistory(self._load(scope, head.version))
        with self._lock:
            known = self._live(scope)
            return known if known is not None else self._admit(scope, loaded)

    def latest(self, scope: ScopeId) -> KeySnapshot:
        """The scope's latest version, or its parent's before its first own one."""
        own = self.history(scope)
        if own is not None:
            return own.latest
        return self.latest(scope.parent) if scope.parent else self._origin_of(scope)

    def find(self, scope: ScopeId, version: int) -> KeySnapshot:
        """Any version; one from before a session's fork is its tenant's. Raises KeyVersionUnavailable."""
        with self._lock:
            head = self._heads.get(scope)
        if version == 0 or (head is None and scope.parent is None):
            return self._find_origin(scope, version)
        if head is None or (version < head.first_version and version <= head.forked_from):
            return self.find(scope.parent, version) if scope.parent else self._find_origin(scope, version)
        if not head.first_version <= version <= head.version:
            raise KeyVersionUnavailable(f"{scope} has no version {version}; its latest is {head.version}")
        return self._find_own(scope, version)

    def publish(self, snapshot: KeySnapshot) -> None:
        """Make `snapshot` its scope's latest; usage and tokens go on from there."""
        scope, version = snapshot.scope, snapshot.version
        with self._lock:
            history = self._live(scope) or self._admit(scope, ScopeHistory(snapshot))
            history.latest, history.usage, history.tokens = snapshot, snapshot.usage, snapshot.tokens
            history.remember(snapshot, self._limits.versions_per_scope)
            old = self._heads.get(scope)
            first = old or ScopeHead(scope, version, snapshot.parent or 0, version, snapshot.created_at)
            self._heads[scope] = replace(first, version=version, created_at=snapshot.created_at)

    def carry(self, scope: ScopeId, usage: Mapping[int, Float32Array], tokens: int) -> None:
        """Usage and tokens of a window that moved no key; volatile until the next version."""
        with self._lock:
            history = self._live(scope)
            if history is None and scope.kind != "session":
                history = self._admit(scope, ScopeHistory(self._stamp_origin(scope)))
            if history is not None:
                history.usage, history.tokens = usage, tokens

    def idle_sessions(self, unused_since: float) -> list[ScopeId]:
        """Stored sessions nobody viewed or taught since that time."""
        with self._lock:
            return [scope for scope, used_at in self._used_at.items() if used_at < unused_since]

    def forget(self, scope: ScopeId) -> None:
        """Drop a deleted session."""
        with self._lock:
            self._sessions.pop(scope, None)
            self._heads.pop(scope, None)
            self._used_at.pop(scope, None)

    def head(self, scope: ScopeId) -> ScopeHead | None:
        """Where the scope's own versions stand; None before the first."""
        with self._lock:
            return self._heads.get(scope)

    def heads(self) -> list[ScopeHead]:
        """Every scope with versions of its own, by name."""
        with self._lock:
            return [self._heads[scope] for scope in sorted(self._heads, key=str)]

    def live_sessions(self) -> int:
        """Sessions in memory."""
        with self._lock:
            return len(self._sessions)

    def _live(self, scope: ScopeId) -> ScopeHistory | None:
        if scope.kind != "session":
            return self._standing.get(scope)
        history = self._sessions.get(scope)
        if history is not None:
            self._sessions.move_to_end(scope)
        if history is not None or scope in self._heads:
            self._used_at[scope] = self._clock()
        return history

    def _admit(self, scope: ScopeId, history: ScopeHistory) -> ScopeHistory:
        history.remember(history.latest, self._limits.versions_per_scope)
        if scope.kind != "session":
            self._standing[scope] = history
            return history
        self._sessions[scope] = history
        self._used_at[scope] = self._clock()
        while len(self._sessions) > self._limits.sessions:
            self._sessions.popitem(last=False)
        return history

    def _origin_of(self, scope: ScopeId) -> KeySnapshot:
        with self._lock:
            history = self._standing.get(scope)
            if history is None:
                history = self._admit(scope, ScopeHistory(self._stamp_origin(scope)))
            return history.latest

    def _stamp_origin(self, scope: ScopeId) -> KeySnapshot:
        return replace(self._origin, scope=scope)

    def _find_origin(self, scope: ScopeId, version: int) -> KeySnapshot:
        if version != 0:
            raise KeyVersionUnavailable(f"{scope} has no version {version}; it has learned nothing yet")
        return self._stamp_origin(scope.parent or scope)

    def _find_own(self, scope: ScopeId, version: int) -> KeySnapshot:
        with self._lock:
            live = self._live(scope)
            found = live.recent.get(version) or live.pinned.get(version) if live else None
        if found is not None:
            return found
        loaded = self._load(scope, version)
        with self._lock:
            live = self._live(scope)
            return live.pinned.setdefault(version, loaded) if live else loaded
