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
from keystore.fairness import who_makes_room
from keystore.records import Float32Array, ScopeId
from keystore.settling import SettlingState
from keystore.snapshot import KeySnapshot


class ScopeHistory:
    """The versions of one scope that are in memory, and what it has learned since the latest without moving a
    key.
    """

    __slots__ = ("latest", "pinned", "recent", "settling", "tokens", "usage")

    def __init__(self, latest: KeySnapshot) -> None:
        self.recent: OrderedDict[int, KeySnapshot] = OrderedDict()
        self.pinned: weakref.WeakValueDictionary[int, KeySnapshot] = weakref.WeakValueDictionary()
        self.latest = latest
        self.usage: Mapping[int, Float32Array] = latest.usage
        self.tokens = latest.tokens
        self.settling: Mapping[int, SettlingState] | None = None  # None: as the backend has it

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
    """Thread-safe. `origin_of` is version 0; `load` reads a stored version; `heads` says what is stored.

    All that is at hand is of one generation of the expert pool; what was loaded in another is loaded again.
    """

    def __init__(
        self,
        origin_of: Callable[[ScopeId], KeySnapshot],
        generation: int,
        heads: Sequence[ScopeHead],
        load: Callable[[ScopeId, int], KeySnapshot],
        limits: ShelfLimits,
        clock: Callable[[], float],
    ) -> None:
        self._origin_of, self._load, self._limits, self._clock = origin_of, load, limits, clock
        self._generation = generation
        self._lock = threading.Lock()
        self._heads = {head.scope: head for head in heads}
        by_age = sorted(heads, key=lambda head: head.created_at)
        self._used_at = {head.scope: head.created_at for head in by_age if head.scope.kind == "session"}
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
            if known is not None:
                return known
            if loaded.latest.generation == self._generation:
                return self._admit(scope, loaded)
        return self.history(scope)

    def latest(self, scope: ScopeId) -> KeySnapshot:
        """The scope's latest version, or its parent's before its first own one."""
        own = self.history(scope)
        if own is not None:
            return own.latest
        return self.latest(scope.parent) if scope.parent else self._standing_origin(scope)

    def at_hand(self, scope: ScopeId) -> KeySnapshot | None:
        """The scope's latest version if it is its own and in memory."""
        with self._lock:
            history = self._sessions.get(scope) or self._standing.get(scope)
            return history.latest if history is not None and history.latest.version else None

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
        scope = snapshot.scope
        with self._lock:
            history = self._live(scope) or self._admit(scope, ScopeHistory(snapshot))
            history.latest, history.usage, history.tokens = snapshot, snapshot.usage, snapshot.tokens
            history.remember(snapshot, self._limits.versions_per_scope)
            self._move_head(snapshot)

    def in_memory(self) -> list[tuple[ScopeId, ScopeHistory]]:
        """Every scope that is in memory, the session used longest ago first."""
        with self._lock:
            return [*self._standing.items(), *self._sessions.items()]

    def turn(self, generation: int, histories: Mapping[ScopeId, ScopeHistory]) -> None:
        """Go on in another generation of the expert pool with these in memory and nothing else.

        A latest version that is newer than what is stored was committed just now.
        """
        with self._lock:
            self._generation = generation
            self._standing = {}
            self._sessions = OrderedDict()
            for scope, history in histories.items():
                history.remember(history.latest, self._limits.versions_per_scope)
                (self._sessions if scope.kind == "session" else self._standing)[scope] = history
                if history.latest.version:
                    self._move_head(history.latest)

    def note_head(self, scope: ScopeId, head: ScopeHead) -> None:
        """A version that somebody else has stored is the latest; it is read when somebody asks for it."""
        with self._lock:
            self._heads[scope] = head
            self._standing.pop(scope, None)
            self._sessions.pop(scope, None)

    def start_over(self, heads: Sequence[ScopeHead], latest: Sequence[KeySnapshot]) -> None:
        """Forget everything in favour of what is stored now, and of `latest`, versions of it that were read already."""
        with self._lock:
            self._heads = {head.scope: head for head in heads}
            self._used_at = {scope: at for scope, at in self._used_at.items() if scope in self._heads}
            self._standing, self._sessions = {}, OrderedDict()
            for snapshot in latest:
                self._admit(snapshot.scope, ScopeHistory(snapshot))

    def carry(
        self,
        scope: ScopeId,
        usage: Mapping[int, Float32Array],
        tokens: int,
        settling: Mapping[int, SettlingState],
    ) -> None:
        """What a window that moved no key taught; volatile until the next version."""
        with self._lock:
            history = self._live(scope)
            if history is None and scope.kind != "session":
                history = self._admit(scope, ScopeHistory(self._stamp_origin(scope)))
            if history is not None:
                history.usage, history.tokens, history.settling = usage, tokens, settling

    def note_settling(
        self, history: ScopeHistory, stored: Mapping[int, SettlingState]
    ) -> Mapping[int, SettlingState]:
        """What a scope knows of its settling experts: as `stored`, unless it has learned since that was read."""
        with self._lock:
            if history.settling is None:
                history.settling = stored
            return history.settling

    def idle_sessions(self, unused_since: float) -> list[ScopeId]:
        """Stored sessions nobody viewed or taught since that time."""
        with self._lock:
            return [scope for scope, used_at in self._used_at.items() if used_at < unused_since]

    def used_since(self, at: float) -> dict[ScopeId, float]:
        """Stored sessions that were viewed or taught since then, and when they last were."""
        with self._lock:
            return {scope: used_at for scope, used_at in self._used_at.items() if used_at >= at}

    def excess_sessions(self) -> list[ScopeId]:
        """Stored sessions beyond what memory holds: used longest ago, of the tenants that hold the most."""
        with self._lock:
            excess = max(0, len(self._used_at) - self._limits.sessions)
            return who_makes_room(self._used_at, excess)

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
            self._note_use(scope)
        return history

    def _admit(self, scope: ScopeId, history: ScopeHistory) -> ScopeHistory:
        history.remember(history.latest, self._limits.versions_per_scope)
        if scope.kind != "session":
            self._standing[scope] = history
            return history
        self._sessions[scope] = history
        self._note_use(scope)
        while len(self._sessions) > self._limits.sessions:
            self._sessions.popitem(last=False)
        return history

    def _note_use(self, session: ScopeId) -> None:
        self._used_at.pop(session, None)  # so that the dictionary stays in the order of use
        self._used_at[session] = self._clock()

    def _move_head(self, latest: KeySnapshot) -> None:
        scope, version = latest.scope, latest.version
        old = self._heads.get(scope)
        if old is not None and old.version == version:
            return
        first, parent = (old.first_version, old.forked_from) if old else (version, latest.parent or 0)
        self._heads[scope] = ScopeHead(scope, first, parent, version, latest.created_at, latest.generation)

    def _standing_origin(self, scope: ScopeId) -> KeySnapshot:
        with self._lock:
            history = self._standing.get(scope)
            if history is None:
                history = self._admit(scope, ScopeHistory(self._stamp_origin(scope)))
            return history.latest

    def _stamp_origin(self, scope: ScopeId) -> KeySnapshot:
        return replace(self._origin_of(scope), scope=scope)

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
            if live is None or loaded.generation != self._generation:
                return loaded
            return live.pinned.setdefault(version, loaded)
