"""One shard learned by the worker that holds its lease: entries of its stream become versions, each exactly once.

Entries are taken in stream order. What they teach, their watermarks and their removal are one commit; whoever holds
the lease next goes on at the front of the stream. Reads the store again whenever it is not sure of it.
"""

import logging
import threading
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from uuid import UUID

from keystore.backends.base import VersionRecord
from keystore.backends.redis_leased import LeasedBackend, Receipt
from keystore.backends.redis_names import shard_of
from keystore.backends.redis_streams import StatsEntry, StatsStream
from keystore.backends.redis_use import SessionUse
from keystore.errors import Fenced, KeyStoreError, StoreUnavailable, VersionConflict
from keystore.freezing import FrozenScopes
from keystore.learning import Learner, Progress
from keystore.ledger import Ledger, Stored
from keystore.records import GravityConfig, ScopeId
from keystore.shelf import ShelfLimits
from keystore.snapshot import LEARNED, KeySnapshot, checksum_of, read_only
from keystore.statistics import RoutingStats

BATCH_ENTRIES = 64
ENTRY_OUTCOMES = ("learned", "duplicate", "refused", "rejected", "frozen", "superseded")

logger = logging.getLogger(__name__)


class LearnerCounters:
    """What a worker has done for one model, on all its shards. Thread-safe."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._entries: Counter[str] = Counter(dict.fromkeys(ENTRY_OUTCOMES, 0))
        self.tokens = self.versions = self.conflicts = self.fenced = self.failures = 0
        self.last_batch_s = 0.0

    def add(self, outcomes: Counter[str], tokens: int, versions: int, batch_s: float) -> None:
        """One commit."""
        with self._lock:
            self._entries.update(outcomes)
            self.tokens, self.versions = self.tokens + tokens, self.versions + versions
            self.last_batch_s = batch_s

    def count_conflict(self) -> None:
        """A commit found that somebody had changed its scopes by hand."""
        with self._lock:
            self.conflicts += 1

    def count_fenced(self) -> None:
        """A commit, or a renewal, came after the lease's end."""
        with self._lock:
            self.fenced += 1

    def count_failure(self) -> None:
        """A batch failed for another reason, and is tried again."""
        with self._lock:
            self.failures += 1

    def entries(self) -> Mapping[str, int]:
        """Entries by what became of them."""
        with self._lock:
            return dict(self._entries)


@dataclass(slots=True, eq=False)
class _Batch:
    """What some entries lead to."""

    entry_ids: list[bytes] = field(default_factory=list[bytes])
    watermarks: dict[UUID, int] = field(default_factory=dict[UUID, int])
    outcomes: Counter[str] = field(default_factory=Counter[str])
    bases: dict[ScopeId, KeySnapshot] = field(default_factory=dict[ScopeId, KeySnapshot])
    progress: dict[ScopeId, Progress] = field(default_factory=dict[ScopeId, Progress])
    tokens: int = 0


class ShardLearner:
    """Used by one thread. `origin` is version 0 of the model; `num_experts_per_tok` its experts for a token."""

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
        use: SessionUse,
        shards: int,
        limits: ShelfLimits,
        versions_on_disk: int,
        session_ttl_s: float,
        clock: Callable[[], float] = time.time,
    ) -> None:
        self._shard, self._backend, self._stats, self._origin = shard, backend, stats, origin
        self._gravity, self._num_experts_per_tok = gravity, num_experts_per_tok
        self.counters, self._limits, self._keep, self._clock = counters, limits, versions_on_disk, clock
        self._use, self._shards, self._session_ttl_s = use, shards, session_ttl_s
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

    def expire_sessions(self) -> list[ScopeId]:
        """Delete the shard's sessions that no replica has read and nobody has taught for `session_ttl_s`.

        Raises Fenced, StoreUnavailable.
        """
        ledger, now = self._read(), self._clock()
        unused_since = now - self._session_ttl_s
        untaught = [
            session
            for session in ledger.shelf.idle_sessions(unused_since)
            if shard_of(session, self._shards) == self._shard
        ]
        read_at = self._use.of(untaught)
        expired = [session for session in untaught if read_at.get(session, 0.0) < unused_since]
        ledger.delete(expired, now)
        self._use.forget(expired)
        return expired

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
        if frozen.has(stats.scope):
            return "frozen"
        try:
            before = batch.progress.get(stats.scope) or ledger.progress(stats.scope)
            if _is_older(entry, before.snapshot):
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

    def _advance(self, learner: Learner, before: Progress, stats: RoutingStats, version: int) -> Progress:
        learner.check_fits(stats)
        return learner.advance(before, stats, version, self._clock())

    def _commit(self, ledger: Ledger, batch: _Batch) -> Sequence[KeySnapshot]:
        """One version of every scope that was taught, also where no key moved: its tokens and usage are learned."""
        snapshots: list[KeySnapshot] = []
        records: list[VersionRecord] = []
        for scope, progress in batch.progress.items():
            base = batch.bases[scope]
            snapshot = self._version_after(base, progress, scope, ledger.next_version(scope, base))
            snapshots.append(snapshot)
            records.append(replace(ledger.record(snapshot, base), settling=progress.settling))
        self._backend.expect(Receipt(batch.entry_ids, batch.watermarks))
        if records:
            ledger.commit(records, snapshots)
        else:
            self._backend.consume()
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
    """Whether an entry was sent before somebody replaced the scope's keys by `snapshot`: it is about others.

    An entry's id begins with the milliseconds of Redis's clock.
    """
    if snapshot.is_learned or snapshot.version == 0:
        return False
    return int(entry.entry_id.partition(b"-")[0]) <= 1000 * snapshot.created_at
