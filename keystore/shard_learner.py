"""One shard learned by the worker that holds its lease: entries of its stream become versions, each exactly once.

Entries are taken in stream order. What they teach, their watermarks and their removal are one commit; whoever holds
the lease next goes on at the front of the stream. Reads the store again whenever it is not sure of it.
"""

import logging
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from uuid import UUID

from keystore.backends.base import CanaryNote
from keystore.backends.redis_leased import LeasedBackend, Receipt
from keystore.backends.redis_names import GLOBAL_SHARD
from keystore.backends.redis_streams import StatsEntry, StatsStream
from keystore.canary import CanaryReading, log_failed, note_of
from keystore.errors import Fenced, KeyStoreError, StoreUnavailable, VersionConflict
from keystore.freezing import FrozenScopes
from keystore.learner_counters import LearnerCounters
from keystore.learning import Learner, Progress
from keystore.ledger import Ledger, Stored
from keystore.records import GravityConfig, ScopeId
from keystore.session_ends import SessionEnds
from keystore.shelf import ShelfLimits
from keystore.snapshot import LEARNED, KeySnapshot, checksum_of, read_only
from keystore.statistics import RoutingStats

BATCH_ENTRIES = 64

Judge = Callable[[KeySnapshot, KeySnapshot], CanaryReading]  # of a version, and of what it was learned from

logger = logging.getLogger(__name__)


@dataclass(slots=True, eq=False)
class _Batch:
    """What some entries lead to."""

    entry_ids: list[bytes] = field(default_factory=list[bytes])
    watermarks: dict[UUID, int] = field(default_factory=dict[UUID, int])
    outcomes: Counter[str] = field(default_factory=Counter[str])
    bases: dict[ScopeId, KeySnapshot] = field(default_factory=dict[ScopeId, KeySnapshot])
    progress: dict[ScopeId, Progress] = field(default_factory=dict[ScopeId, Progress])
    tokens: int = 0

    def reject(self, reading: CanaryReading) -> None:
        """What they led to is not stored: they are all of one scope, whose version has failed."""
        self.outcomes["guard_rejected"] += self.outcomes.pop("learned")
        self.tokens = 0
        log_failed(reading, f"{self.outcomes['guard_rejected']} entries are not published")


class ShardLearner:
    """Used by one thread. `origin` is version 0 of the model; `num_experts_per_tok` its experts for a token. With a
    `judge` nothing is stored that fails.
    """

    def __init__(
        self,
        shard: int,
        backend: LeasedBackend,
        stats: StatsStream,
        origin: KeySnapshot,
        gravity: GravityConfig,
        num_experts_per_tok: int,
        counters: LearnerCounters,
        *,
        ends: SessionEnds,
        limits: ShelfLimits,
        versions_on_disk: int,
        judge: Judge | None = None,
        clock: Callable[[], float] = time.time,
    ) -> None:
        self._shard, self._backend, self._stats, self._origin = shard, backend, stats, origin
        self._gravity, self._num_experts_per_tok = gravity, num_experts_per_tok
        self.counters, self._limits, self._keep, self._clock = counters, limits, versions_on_disk, clock
        self._judge = judge
        self._ends, self._ended_at = (
            ends,
            dict[ScopeId, float](),
        )  # unix seconds, of what may still have entries
        self._shapes = {layer: origin.keys_of(layer).shape for layer in origin.usage}
        self._ledger: Ledger | None = None  # None: to be read
        self._watermarks: Mapping[UUID, int] = {}

    def learn_some(self, block_ms: int = 0) -> int:
        """Take in what waits, up to BATCH_ENTRIES entries, in one commit; waits up to `block_ms` for some.

        Returns how many entries. Raises Fenced, StoreUnavailable, and as reading a store does; nothing is lost then,
        and the next call begins with reading.
        """
        try:
            entries = self._read_entries(block_ms)
            if not entries:
                return 0
            started_s = time.monotonic()
            if self._judge is not None:
                self._ledger = None  # what fails is dropped: it has to have had the newest version
            ledger = self._ledger or self._read()
            batch = self._learn(ledger, entries)
            published = self._commit(ledger, batch)
        except VersionConflict:
            self._ledger = None
            self.counters.count_conflict()
            return 0
        except BaseException:
            self._ledger = None  # after an interruption the store may even be an older one
            raise
        elapsed_s = time.monotonic() - started_s
        self.counters.add(batch.outcomes, batch.tokens, len(published), elapsed_s)
        return len(entries)

    def _read_entries(self, block_ms: int) -> Sequence[StatsEntry]:
        bonding = self._gravity.bonding_rate > 0
        return self._stats.read(
            self._shard, b"0", self._shapes, bonding=bonding, count=BATCH_ENTRIES, block_ms=block_ms
        )

    def end_sessions(self) -> list[ScopeId]:
        """Delete the shard's sessions that are due. What was sent to teach them before teaches nobody.

        Raises Fenced, StoreUnavailable.
        """
        ledger, now = self._read(), self._clock()
        ended = ledger.delete(self._ends.due(ledger.shelf.heads(), now), now)
        self._ends.forget(ended)
        self._ended_at.update(dict.fromkeys(ended, now))
        return ended

    def _read(self) -> Ledger:
        self._watermarks = self._stats.watermarks(self._shard)
        stored = Stored.of(self._backend)
        self._ledger = Ledger(self._origin, self._gravity, self._backend, stored, self._limits, self._clock)
        return self._ledger

    def _learn(self, ledger: Ledger, entries: Sequence[StatsEntry]) -> _Batch:
        learner = Learner(ledger.pool, self._gravity, self._num_experts_per_tok)
        frozen = FrozenScopes(self._backend.frozen(), self._backend, self._clock)
        batch = _Batch()
        for entry in entries:
            batch.entry_ids.append(entry.entry_id)
            batch.outcomes[self._take_in(entry, batch, ledger, learner, frozen)] += 1
        return batch

    def _take_in(
        self, entry: StatsEntry, batch: _Batch, ledger: Ledger, learner: Learner, frozen: FrozenScopes
    ) -> str:
        """Let one entry teach; the word for what became of it."""
        window = entry.window
        if window is None:
            logger.warning("entry refused: %s", entry.refusal, extra={"shard": self._shard})
            return "refused"
        known = batch.watermarks.get(window.producer, self._watermarks.get(window.producer, 0))
        if window.sequence <= known:
            return "duplicate"
        batch.watermarks[window.producer] = window.sequence
        stats = window.stats
        if (stats.scope.kind == "global") != (self._shard == GLOBAL_SHARD):
            return "refused"
        if frozen.has(stats.scope):
            return "frozen"
        try:
            before = batch.progress.get(stats.scope) or ledger.progress(stats.scope)
            if _is_older(entry, before.snapshot) or self._came_before_the_end(entry, stats.scope):
                return "superseded"
            base = batch.bases.get(stats.scope, before.snapshot)
            after = self._advance(learner, before, stats, ledger.next_version(stats.scope, base))
        except (Fenced, StoreUnavailable):
            raise
        except (KeyStoreError, ArithmeticError, ValueError):
            logger.exception("window rejected", extra={"scope": str(stats.scope), "tokens": stats.tokens})
            return "rejected"
        batch.bases[stats.scope], batch.progress[stats.scope] = base, after
        batch.tokens += stats.tokens
        return "learned"

    def _came_before_the_end(self, entry: StatsEntry, session: ScopeId) -> bool:
        """Whether an entry was sent before its session was deleted."""
        self._ended_at = {each: at for each, at in self._ended_at.items() if at >= _sent_at(entry)}
        return session in self._ended_at

    def _advance(self, learner: Learner, before: Progress, stats: RoutingStats, version: int) -> Progress:
        learner.check_fits(stats)
        return learner.advance(before, stats, version, self._clock())

    def _commit(self, ledger: Ledger, batch: _Batch) -> Sequence[KeySnapshot]:
        """One version of every scope that was taught, also where no key moved: its tokens and usage are learned."""
        snapshots: list[KeySnapshot] = []
        note: CanaryNote | None = None
        for scope, progress in batch.progress.items():
            base = batch.bases[scope]
            snapshot = self._version_after(base, progress, scope, ledger.next_version(scope, base))
            if self._judge is not None:
                reading = self._judge(snapshot, base)
                snapshot, note = replace(snapshot, reason=f"{snapshot.reason}; {reading}"), note_of(reading)
                if not reading.passed:
                    batch.reject(reading)
                    continue
            snapshots.append(snapshot)
        records = [
            replace(
                ledger.record(each, batch.bases[each.scope]), settling=batch.progress[each.scope].settling
            )
            for each in snapshots
        ]
        self._backend.expect(Receipt(batch.entry_ids, batch.watermarks))
        if records:
            ledger.commit(records, snapshots, note)
        else:
            self._backend.commit([], note)
        self._watermarks = {**self._watermarks, **batch.watermarks}
        ledger.thin(snapshots, self._keep)
        return snapshots

    def _version_after(
        self, base: KeySnapshot, progress: Progress, scope: ScopeId, version: int
    ) -> KeySnapshot:
        learned, usage = progress.snapshot, read_only(dict(progress.usage))
        forked = "" if base.scope == scope else f", forked from {base.scope} version {base.version}"
        return replace(
            learned,
            scope=scope,
            version=version,
            parent=base.version,
            reason=f"{LEARNED} {progress.tokens - base.tokens} tokens{forked}",
            created_at=self._clock(),
            tokens=progress.tokens,
            usage=usage,
            checksum=checksum_of(learned.keys, usage, learned.visible),
        )


def _is_older(entry: StatsEntry, snapshot: KeySnapshot) -> bool:
    """Whether an entry was sent before somebody replaced the scope's keys by `snapshot`: it is about others."""
    if snapshot.is_learned or snapshot.version == 0:
        return False
    return _sent_at(entry) <= snapshot.created_at


def _sent_at(entry: StatsEntry) -> float:
    """Unix seconds, by Redis's clock: an entry's id begins with its milliseconds."""
    return int(entry.entry_id.partition(b"-")[0]) / 1000
