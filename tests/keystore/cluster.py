"""Replicas and workers of one Redis, in one process."""

import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass

from redis_server import RedisServer

from keystore.backends.redis_lease import Leases
from keystore.backends.redis_leased import LeasedBackend
from keystore.backends.redis_model import ModelCard, read_card, read_models
from keystore.backends.redis_seal import Seal
from keystore.backends.redis_streams import StatsStream
from keystore.backends.redis_use import SessionUse
from keystore.index_builder import IndexBuilder
from keystore.learner_counters import LearnerCounters
from keystore.learning import create_origin
from keystore.model_worker import ModelWorker, WorkerLimits
from keystore.records import GravityConfig, SessionEviction
from keystore.replica import Replica
from keystore.replica_backend import ReplicaBackend
from keystore.session_ends import SessionEnds, SessionLimits
from keystore.shard_learner import ShardLearner
from keystore.shelf import ShelfLimits
from keystore.store import KeyStore

SEAL, SHARDS, LAW = Seal(b"secret"), 4, GravityConfig()


@dataclass
class Cluster:
    """Makes replicas and workers of one model on one Redis, and ends them."""

    redis: RedisServer
    card: ModelCard
    ending: ExitStack

    def replica(
        self,
        *,
        start: bool = True,
        gravity: GravityConfig = LAW,
        shards: int = SHARDS,
        session_ttl_s: float = 3600.0,
        learn_global: bool = False,
        **options,
    ) -> KeyStore:
        client = self.redis.client()
        backend, scopes = ReplicaBackend(client, self.card, SEAL, shards), options.pop("capacity", 16)
        self.ending.callback(backend.close)
        store = KeyStore(
            self.card.model_id,
            self.card.anchors,
            gravity,
            backend,
            num_experts_per_tok=self.card.num_experts_per_tok,
            plastic_layers=self.card.plastic_layers,
            learning_side=lambda parts: Replica(
                parts,
                backend,
                outbox_scopes=scopes,
                session_ttl_s=session_ttl_s,
                learn_global=learn_global,
            ),
            **options,
        )
        self.ending.callback(store.close)
        if start:
            store.learning.start()
        self.ending.callback(store.learning.stop, flush=False)
        return store

    def worker(
        self,
        name: str = "w",
        lease_s: float = 1.0,
        gravity: GravityConfig = LAW,
        session_ttl_s: float = 3600.0,
        max_sessions: int = 64,
        session_eviction: SessionEviction = "save",
        clock: Callable[[], float] = time.time,
    ) -> ModelWorker:
        client = self.redis.client()
        names = read_models(client)[self.card.endpoint]
        card, shards = read_card(client, names, SEAL)
        limits = WorkerLimits(max_sessions, session_eviction, 64, session_ttl_s, lease_s)
        worker = ModelWorker(client, names, card, shards, gravity, SEAL, name, limits, clock)
        self.ending.callback(client.close)
        self.ending.callback(worker.stop)
        worker.start()
        return worker

    def learner(self, shard: int, most_sessions: int | None = None) -> ShardLearner:
        """What a worker's thread uses, without the thread."""
        client = self.redis.client()
        self.ending.callback(client.close)
        names = self.card.names
        lease = Leases(client, names, "by hand", ttl_ms=60_000).take(shard)
        builder = IndexBuilder(2**62)
        self.ending.callback(builder.close)
        return ShardLearner(
            shard,
            LeasedBackend(client, names, lease, seal=SEAL, shards=SHARDS),
            StatsStream(client, names, SEAL),
            create_origin(self.card.model_id, self.card.anchors, LAW, self.card.plastic_layers, builder, 0.0),
            LAW,
            self.card.num_experts_per_tok,
            LearnerCounters(),
            ends=SessionEnds(SessionUse(client, names), shard, SHARDS, SessionLimits(3600.0, most_sessions)),
            limits=ShelfLimits(1, 64),
            versions_on_disk=64,
        )
