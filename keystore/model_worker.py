"""A worker's part in one model: its fair share of the shards, each under a lease, each learned by a thread of its own.

Every third of a lease's life: say that we live, renew what we hold, give away what is above our share, take what is
free below it.
"""

import logging
import math
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from keystore.backends.redis_client import RedisClient
from keystore.backends.redis_lease import Lease, Leases
from keystore.backends.redis_leased import LeasedBackend
from keystore.backends.redis_model import ModelCard
from keystore.backends.redis_names import RedisNames
from keystore.backends.redis_producers import Producers
from keystore.backends.redis_seal import Seal
from keystore.backends.redis_streams import StatsStream
from keystore.backends.redis_use import SessionUse
from keystore.errors import Fenced, StoreUnavailable
from keystore.index_builder import IndexBuilder
from keystore.learner_counters import LearnerCounters
from keystore.learning import create_origin
from keystore.records import GravityConfig, SessionEviction
from keystore.session_ends import SessionEnds, SessionLimits
from keystore.shard_learner import ShardLearner
from keystore.shelf import ShelfLimits

BLOCK_MS = 250
TIDY_EVERY_S = 30.0
FIRST_RETRY_S, LAST_RETRY_S = 0.05, 1.0
NEVER_SEARCHED = 2**62  # keys a layer up to which no inverted lists are built

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class WorkerLimits:
    """What a worker keeps, in memory and in Redis, and how long a lease lives without it. With `session_eviction`
    "discard" no more than `max_sessions` stay in Redis either.
    """

    max_sessions: int
    session_eviction: SessionEviction
    versions_on_disk: int
    session_ttl_s: float
    lease_s: float


@dataclass(slots=True, eq=False)
class _HeldShard:
    lease: Lease
    stopping: threading.Event
    thread: threading.Thread


class ModelWorker:
    """Learns one model from `start` to `stop`. `worker` is unique to the process."""

    def __init__(
        self,
        client: RedisClient,
        names: RedisNames,
        card: ModelCard,
        shards: int,
        gravity: GravityConfig,
        seal: Seal,
        worker: str,
        limits: WorkerLimits,
        clock: Callable[[], float] = time.time,
    ) -> None:
        self.card, self.shards, self.counters = card, shards, LearnerCounters()
        self._client, self._names, self._seal, self._gravity = client, names, seal, gravity
        self._limits, self._clock = limits, clock
        self._stats, self._producers = StatsStream(client, names, seal), Producers(client, names)
        self._leases = Leases(client, names, worker, ttl_ms=int(1000 * limits.lease_s))
        self._builder = IndexBuilder(NEVER_SEARCHED)
        self._origin = create_origin(
            card.model_id, card.anchors, gravity, card.plastic_layers, self._builder, clock()
        )
        self._held: dict[int, _HeldShard] = {}
        self._pending: Mapping[int, int] = {}
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self._keep_share, name=f"leases-{card.endpoint}")
        self.seen_at_s = -math.inf  # monotonic, when Redis last answered

    @property
    def held(self) -> list[int]:
        """Shards that are learned here."""
        return sorted(self._held)

    @property
    def pending(self) -> Mapping[int, int]:
        """Entries that wait in the streams of the shards held here, as last seen."""
        return self._pending

    @property
    def alive(self) -> bool:
        """Whether it still looks after its leases."""
        return self._thread.is_alive()

    def start(self) -> None:
        """Begin in threads of its own."""
        self._thread.start()

    def stop(self) -> None:
        """End after the commits at hand; others may have the shards at once."""
        self._stopping.set()
        self._thread.join()
        self._builder.close()

    def _keep_share(self) -> None:
        while not self._stopping.is_set():
            try:
                self._look_around()
                self.seen_at_s = time.monotonic()
            except StoreUnavailable as error:
                logger.warning("no news of the leases: %s", error)
            except Exception:
                logger.exception("looking after the leases failed")
            self._stopping.wait(self._limits.lease_s / 3)
        for shard in list(self._held):
            self._give_back(shard)
        try:
            self._leases.sign_out()
        except StoreUnavailable as error:
            logger.warning("not signed out: %s", error)

    def _look_around(self) -> None:
        share = math.ceil(self.shards / max(1, self._leases.sign_in()))
        for shard, held in list(self._held.items()):
            if not held.thread.is_alive() or not self._renew(held.lease):
                self._drop(shard)
        for shard in self.held[share:]:
            self._give_back(shard)
        holders = self._leases.holders(self.shards)
        for shard, holder in enumerate(holders):
            if holder is None and shard not in self._held and len(self._held) < share:
                lease = self._leases.take(shard)
                if lease is not None:
                    self._begin(lease)
        self._pending = {shard: self._stats.pending(shard) for shard in self.held}

    def _renew(self, lease: Lease) -> bool:
        try:
            self._leases.renew(lease)
        except Fenced as error:
            self.counters.count_fenced()
            logger.warning("a lease is over: %s", error)
            return False
        return True

    def _begin(self, lease: Lease) -> None:
        stopping = threading.Event()
        thread = threading.Thread(
            target=self._learn, args=(lease, stopping), name=f"{self.card.endpoint}-{lease.shard}"
        )
        self._held[lease.shard] = _HeldShard(lease, stopping, thread)
        thread.start()
        logger.info("shard taken", extra={"endpoint": self.card.endpoint, "shard": lease.shard})

    def _drop(self, shard: int) -> Lease:
        """End a shard's thread after the commit at hand."""
        held = self._held.pop(shard)
        held.stopping.set()
        held.thread.join()
        return held.lease

    def _give_back(self, shard: int) -> None:
        lease = self._drop(shard)
        try:
            self._leases.release(lease)
        except (Fenced, StoreUnavailable) as error:
            logger.info("a lease ends by itself: %s", error)

    def _learn(self, lease: Lease, stopping: threading.Event) -> None:
        """Learn a shard until it is to stop or the lease is over."""
        limits = self._limits
        most = limits.max_sessions if limits.session_eviction == "discard" else None
        use, ttl_s = SessionUse(self._client, self._names), limits.session_ttl_s
        learner = ShardLearner(
            lease.shard,
            LeasedBackend(self._client, self._names, lease, seal=self._seal, shards=self.shards),
            self._stats,
            self._origin,
            self._gravity,
            self.card.num_experts_per_tok,
            self.counters,
            ends=SessionEnds(use, lease.shard, self.shards, SessionLimits(ttl_s, most)),
            limits=ShelfLimits(1, limits.max_sessions),
            versions_on_disk=limits.versions_on_disk,
            clock=self._clock,
        )
        retry_s, tidy_at_s = 0.0, 0.0  # monotonic
        while not stopping.wait(retry_s):
            try:
                learner.learn_some(BLOCK_MS)
                if time.monotonic() > tidy_at_s:
                    self._producers.forget_unknown(lease.shard)
                    learner.end_sessions()
                    tidy_at_s = time.monotonic() + min(TIDY_EVERY_S, ttl_s / 2)
                retry_s = 0.0
            except Fenced as error:
                self.counters.count_fenced()
                logger.warning("a commit came too late: %s", error)
                return
            except Exception as error:
                self.counters.count_failure()
                logger.log(
                    logging.WARNING if isinstance(error, StoreUnavailable) else logging.ERROR,
                    "a batch failed and is tried again: %s",
                    error,
                    exc_info=not isinstance(error, StoreUnavailable),
                )
                retry_s = min(max(FIRST_RETRY_S, 2 * retry_s), LAST_RETRY_S)
