"""The models that a worker learns: found in Redis as servers put them there, each in threads of its own."""

import logging
import os
import socket
import time
from uuid import uuid4

from keystore.backends.redis_client import RedisClient
from keystore.backends.redis_model import read_card, read_models
from keystore.errors import KeyStoreError
from keystore.model_worker import ModelWorker, WorkerLimits
from server.redis_access import seal_of
from server.settings import Settings

MISSED_LEASES = 3  # silent for so long a worker is not ready

logger = logging.getLogger(__name__)


class WorkedModels:
    """Every model of the configured endpoints, from when the first server has brought it. Used by one thread.

    A server that comes with other weights brings another model; what the old one was taught is learned on beside it.
    """

    def __init__(self, client: RedisClient, settings: Settings) -> None:
        self._client, self._settings = client, settings
        self._seal, shared = seal_of(settings.key_store), settings.key_store
        self._limits = WorkerLimits(
            max_sessions=shared.max_sessions,
            session_eviction=shared.session_eviction,
            versions_on_disk=shared.versions_on_disk,
            session_ttl_s=shared.session_ttl_s,
            lease_s=settings.worker.lease_s,
        )
        self.name = f"{socket.gethostname()}-{os.getpid()}-{uuid4().hex[:8]}"
        self.running: dict[str, ModelWorker] = {}  # by tag; swapped, never changed
        self._seen_at_s = -float("inf")
        self._refused: set[str] = set()

    def look(self) -> None:
        """Begin with models that were not there before. Raises StoreUnavailable."""
        for endpoint, names in read_models(self._client).items():
            configured = self._settings.endpoints.get(endpoint)
            if names.tag in self.running or names.tag in self._refused:
                continue
            try:
                found = read_card(self._client, names, self._seal)
            except KeyStoreError:
                logger.exception("a model cannot be read", extra={"endpoint": endpoint})
                found = None
            if configured is None or not configured.has_keys:
                logger.warning("not configured, and not learned", extra={"endpoint": endpoint})
                self._refused.add(names.tag)
            elif found is not None:
                card, shards = found
                law, worker = configured.gravity.config(), self.name
                model = ModelWorker(self._client, names, card, shards, law, self._seal, worker, self._limits)
                model.start()
                self.running = {**self.running, names.tag: model}
                logger.info("model found", extra={"endpoint": endpoint, "shards": shards})
        self._seen_at_s = time.monotonic()

    @property
    def alive(self) -> bool:
        """Whether every model is looked after."""
        return all(model.alive for model in self.running.values())

    @property
    def in_touch(self) -> bool:
        """Whether Redis has answered lately, for every model."""
        seen = (self._seen_at_s, *(model.seen_at_s for model in self.running.values()))
        return time.monotonic() - min(seen) < MISSED_LEASES * self._limits.lease_s

    def stop(self) -> None:
        """End after the commits at hand and give the leases back."""
        for model in self.running.values():
            model.stop()
