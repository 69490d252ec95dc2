"""A replica's way to the shared store: what it reads, sends and claims, over connections of its own."""

from uuid import uuid4

from keystore.backends.base import StoredVersion
from keystore.backends.redis import RedisBackend
from keystore.backends.redis_client import RedisClient
from keystore.backends.redis_lease import Lease, Leases
from keystore.backends.redis_leased import LeasedBackend
from keystore.backends.redis_model import ModelCard
from keystore.backends.redis_producers import Producers
from keystore.backends.redis_seal import Seal
from keystore.backends.redis_streams import DeltaStream, StatsStream
from keystore.backends.redis_use import SessionUse
from keystore.errors import StoreUnavailable
from keystore.records import ScopeId

CLAIM_S = 60  # a probe takes seconds


class ReplicaBackend(RedisBackend):
    """The Backend of a model that others have too. Closing drops the connections of `client`.

    While Redis is known to be away `load` fails at once: requests wait for it.
    """

    def __init__(self, client: RedisClient, card: ModelCard, seal: Seal, shards: int) -> None:
        super().__init__(client, card.names, seal=seal, card=card, shards=shards)
        self.card, self.shards, self.away = card, shards, False
        self.stats = StatsStream(client, card.names, seal)
        self.producers = Producers(client, card.names)
        self.deltas = DeltaStream(client, card.names, seal)
        self.use = SessionUse(client, card.names)

    def load(self, scope: ScopeId, version: int) -> StoredVersion:
        """As RedisBackend's."""
        if self.away:
            raise StoreUnavailable(f"Redis is away, and version {version} of {scope} is not in memory")
        return super().load(scope, version)

    def claim_canary(self, scope: ScopeId, claim: str) -> bool:
        """Whether whoever makes this claim, and nobody else, is to judge the scope for now. Raises StoreUnavailable."""
        name = self._names.canary(scope)
        if self._client.call("SET", name, claim, "NX", "EX", CLAIM_S) is not None:
            return True
        return self._client.call("GET", name) == claim.encode()

    def leases(self, ttl_ms: int) -> Leases:
        """The model's shards, as this process takes and leaves them."""
        return Leases(self._client, self._names, uuid4().hex, ttl_ms=ttl_ms)

    def leased(self, lease: Lease) -> LeasedBackend:
        """The store as the holder of a lease writes it."""
        return LeasedBackend(self._client, self._names, lease, seal=self._seal, shards=self.shards)

    def close(self) -> None:
        """Drop the connections."""
        self._client.close()
