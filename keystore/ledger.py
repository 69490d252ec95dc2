"""What is durable and what is at hand, changed together: numbers, commits, and generations of the expert pool.

One writer at a time (the store's lock); reading needs no lock. Knows no windows, no law and no subscribers.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from types import MappingProxyType

from keystore.backends.base import Backend, CanaryNote, PoolEvent, ScopeHead, VersionRecord
from keystore.durations import Durations
from keystore.errors import VersionConflict
from keystore.generations import Content, Generation, Generations
from keystore.learning import Progress
from keystore.pool import ExpertPool
from keystore.records import GravityConfig, ScopeId
from keystore.replay import follow, rebuild, record_of
from keystore.settling import SettlingState
from keystore.shelf import ScopeHistory, ShelfLimits, VersionShelf
from keystore.snapshot import KeySnapshot

CHECKPOINT_EVERY = 16
NOTHING_SETTLES: Mapping[int, SettlingState] = MappingProxyType({})

_PAST = {"add": "added", "promote": "promoted", "retire": "retired"}


@dataclass(frozen=True, slots=True)
class Stored:
    """What a backend holds, without the versions themselves; by default nothing."""

    heads: Sequence[ScopeHead] = ()
    pool_events: Sequence[PoolEvent] = ()
    session_floor: int = 0
    frozen: frozenset[str] = frozenset()

    @classmethod
    def of(cls, backend: Backend) -> "Stored":
        """As it is now."""
        return cls(backend.heads(), backend.pool_events(), backend.session_floor(), backend.frozen())


class Ledger:
    """The versions of every scope, numbered, stored and at hand."""

    def __init__(
        self,
        origin: KeySnapshot,
        gravity: GravityConfig,
        backend: Backend,
        stored: Stored,
        in_memory: ShelfLimits,
        clock: Callable[[], float],
    ) -> None:
        self._gravity, self._backend, self._clock = gravity, backend, clock
        self.durations = Durations(("commit", "load", "thin", "delete"))
        self.generations = Generations(origin, stored.pool_events, gravity)
        self.shelf = VersionShelf(
            lambda scope: self.generations.now.origin_of(scope),
            self.pool.generation,
            stored.heads,
            self.load,
            in_memory,
            clock,
        )
        self._session_floor = stored.session_floor

    @property
    def pool(self) -> ExpertPool:
        """The expert pool as it is now."""
        return self.generations.now.pool

    @property
    def anchors(self) -> KeySnapshot:
        """Version 0 as everybody has it in whose scope no experts settle."""
        return self.generations.now.anchors

    def progress(self, scope: ScopeId) -> Progress:
        """Where the scope's learning goes on."""
        history = self.shelf.history(scope)
        if history is not None:
            settling = history.settling
            if settling is None:
                settling = self.shelf.note_settling(history, self._backend.settling(scope))
            return Progress(history.latest, history.usage, history.tokens, settling)
        snapshot = self.shelf.latest(scope)
        return Progress(snapshot, snapshot.usage, snapshot.tokens)

    def is_latest(self, snapshot: KeySnapshot) -> bool:
        """Whether learning may go on from `snapshot`: nobody changed the scope or the pool since."""
        latest = self.progress(snapshot.scope).snapshot
        return (latest.version, latest.generation) == (snapshot.version, snapshot.generation)

    def pool_of(self, snapshot: KeySnapshot) -> ExpertPool:
        """The expert pool that a version has."""
        return self.generations.pool_of(snapshot.generation)

    def next_version(self, scope: ScopeId, base: KeySnapshot) -> int:
        """The number of the version after `base`."""
        forks = base.scope != scope
        return max(base.version, self._session_floor if forks else 0) + 1

    def record(self, snapshot: KeySnapshot, base: KeySnapshot, *, lasting: bool = False) -> VersionRecord:
        """What to store of a version made from `base`; a `lasting` one outlives thinning."""
        head = self.shelf.head(base.scope)
        starts = base.version == 0 or base.scope != snapshot.scope
        was_lifted = head is not None and head.version == base.version and head.generation < base.generation
        is_checkpoint = starts or was_lifted or lasting or snapshot.version % CHECKPOINT_EVERY == 0
        radius = self._gravity.for_scope(snapshot.scope).trust_radius
        return record_of(snapshot, base, self.pool, radius, is_checkpoint=is_checkpoint)

    def commit(
        self,
        records: Sequence[VersionRecord],
        snapshots: Sequence[KeySnapshot],
        canary: CanaryNote | None = None,
    ) -> None:
        """Store versions durably, then let readers have them."""
        if records:
            with self.durations.measured("commit"):
                self._backend.commit(records, canary=canary)
        for snapshot in snapshots:
            self.shelf.publish(snapshot)

    def publish_content(
        self, scope: ScopeId, target: Callable[[], KeySnapshot], reason: str, if_version: int | None
    ) -> KeySnapshot:
        """Keys, usage and tokens of `target` as the scope's next version.

        Raises VersionConflict when the scope is at another version or `target` is of an old generation of the pool.
        """
        head = self.shelf.head(scope)
        current = head.version if head else self.shelf.latest(scope).version
        if if_version is not None and if_version != current:
            raise VersionConflict(f"{scope} is at version {current}, not {if_version}")
        content, generation = target(), self.pool.generation
        if content.generation != generation:
            raise VersionConflict(
                f"the expert pool went on to generation {generation}; the keys for {scope} are of"
                f" {content.generation}"
            )
        floor = self._session_floor if head is None and scope.kind == "session" else 0
        snapshot = replace(
            content,
            scope=scope,
            version=max(current, floor) + 1,
            parent=current,
            reason=reason,
            created_at=self._clock(),
        )
        self.commit([self._checkpoint(snapshot, self.pool)], [snapshot])
        # What was learned on the way to the keys that are being left would lead straight back to them.
        self.shelf.carry(scope, snapshot.usage, snapshot.tokens, NOTHING_SETTLES)
        return snapshot

    def change_pool(self, event: PoolEvent) -> list[KeySnapshot]:
        """The next generation of the expert pool, durably, and the new versions of those who see a difference.

        Of the scopes in memory each one that the experts come to, change for or leave gets a version of its own
        number in the same commit. All others keep their number and, bit for bit, what they see. What is on disk
        is lifted when it is loaded.
        """
        then, now = self.pool, self.generations.after(event)
        self.shelf.latest(event.scope)  # from now on in memory
        histories: dict[ScopeId, ScopeHistory] = {}
        published: list[KeySnapshot] = []
        for scope, history in self.shelf.in_memory():
            lifted = _lift_history(history, then, now, scope)
            if self._concerns(event, scope):
                latest = replace(
                    now.adopt(lifted.latest, _content(lifted), base=lifted.latest),
                    version=lifted.latest.version + 1,
                    parent=lifted.latest.version,
                    reason=f"experts {_PAST[event.kind]}: {event.name}",
                    created_at=event.at,
                    tokens=lifted.tokens,
                )
                published.append(latest)
                settling = lifted.settling
                lifted = ScopeHistory(latest)
                lifted.settling = settling
            histories[scope] = lifted
        records = [self._checkpoint(each, now.pool, settling=None) for each in published]
        with self.durations.measured("commit"):
            self._backend.commit(records, pool_event=event)
        self.generations.turn(event, now)
        self.shelf.turn(now.pool.generation, histories)
        return published

    def start_over(self, stored: Stored, latest: Sequence[KeySnapshot]) -> None:
        """Forget everything in favour of what somebody else has stored; `latest` are versions of it, read already."""
        self._session_floor = stored.session_floor
        self.shelf.start_over(stored.heads, latest)

    def follow(self, record: VersionRecord, base: KeySnapshot | None) -> KeySnapshot:
        """The version that somebody else has stored after `base`, verified. Raises StoreCorrupted, OutOfBounds, and
        as `Backend.load` does where `base` is not what it was made from.
        """
        row, now = record.row, self.generations.now
        known = record.is_checkpoint or (base is not None and base.version == row.parent)
        if not known or row.generation != now.pool.generation:
            return self.load(row.scope, row.version)
        radius = self._gravity.for_scope(row.scope).trust_radius
        return follow(record, base or now.anchors, now, radius)

    def forget(self, sessions: Sequence[ScopeId]) -> None:
        """Somebody else has deleted these."""
        self._session_floor = self._backend.session_floor()
        for scope in sessions:
            self.shelf.forget(scope)

    def expire_sessions(self, unused_since: float, now: float) -> list[ScopeId]:
        """Delete, durably, sessions that nobody viewed or taught since then."""
        return self.delete(self.shelf.idle_sessions(unused_since), now)

    def discard_excess_sessions(self, now: float) -> list[ScopeId]:
        """Delete, durably, the sessions used longest ago, down to as many as memory holds."""
        return self.delete(self.shelf.excess_sessions(), now)

    def thin(self, published: Sequence[KeySnapshot], keep: int) -> None:
        """Drop old versions of the scopes that have just passed a checkpoint."""
        for scope in {each.scope for each in published if each.version % CHECKPOINT_EVERY == 0}:
            with self.durations.measured("thin"):
                self._backend.thin(scope, keep)

    def delete(self, sessions: list[ScopeId], now: float) -> list[ScopeId]:
        """Delete these, durably; returns them."""
        if sessions:
            with self.durations.measured("delete"):
                self._backend.delete_scopes(sessions, now)
            self.forget(sessions)
        return sessions

    def _concerns(self, event: PoolEvent, scope: ScopeId) -> bool:
        settles = event.scope in (scope, scope.parent)
        if self.shelf.head(scope) is None:  # at version 0, the anchors, whatever they are
            return settles and event.kind == "add"
        was_promoted = event.kind == "retire" and self.pool.groups[event.name].state == "promoted"
        return settles or event.kind == "promote" or was_promoted

    def _checkpoint(
        self,
        snapshot: KeySnapshot,
        pool: ExpertPool,
        settling: Mapping[int, SettlingState] | None = NOTHING_SETTLES,
    ) -> VersionRecord:
        radius = self._gravity.for_scope(snapshot.scope).trust_radius
        record = record_of(snapshot, snapshot, pool, radius, is_checkpoint=True)
        return record if settling is None else replace(record, settling=settling)

    def load(self, scope: ScopeId, version: int) -> KeySnapshot:
        """A stored version, verified. Raises as `Backend.load`, OutOfBounds."""
        with self.durations.measured("load"):
            stored = self._backend.load(scope, version)
        now, radius = self.generations.now, self._gravity.for_scope(scope).trust_radius
        return rebuild(stored, self.generations.pool_of(stored.row.generation), now, radius)


def _lift_history(history: ScopeHistory, then: ExpertPool, now: Generation, scope: ScopeId) -> ScopeHistory:
    """The scope's latest version in another generation, with what it has learned since."""
    old = history.latest
    if old.version == 0:
        lifted = ScopeHistory(replace(now.origin_of(scope), scope=scope))
    else:
        lifted = ScopeHistory(now.lift_snapshot(old, then, scope))
    since = now.lift(Content(old.keys, history.usage, old.visible), then, scope)
    lifted.usage, lifted.tokens, lifted.settling = since.usage, history.tokens, history.settling
    return lifted


def _content(history: ScopeHistory) -> Content:
    return Content(history.latest.keys, history.usage, history.latest.visible)
