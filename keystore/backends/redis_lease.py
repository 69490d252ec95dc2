"""Who writes a shard: one worker at a time, each time with a higher number, so that a late one is told apart."""

from dataclasses import dataclass

from keystore.backends.redis_client import Interrupted, RedisClient, Reply, Transaction
from keystore.backends.redis_names import RedisNames
from keystore.errors import Fenced, StoreUnavailable

ATTEMPTS = 3


@dataclass(frozen=True, slots=True)
class Lease:
    """A shard that `worker` may write while Redis says so. `epoch` is the fencing token."""

    shard: int
    worker: str  # unique to one process
    epoch: int

    def check(self, transaction: Transaction, names: RedisNames) -> None:
        """Within a transaction that watches `watched`. Raises Fenced."""
        holder = transaction.read("GET", names.lease(self.shard))
        epoch = transaction.read("GET", names.epoch(self.shard))
        if holder != self.worker.encode() or int(epoch or 0) != self.epoch:
            raise Fenced(f"shard {self.shard} is no longer written by {self.worker} in epoch {self.epoch}")

    def watched(self, names: RedisNames) -> tuple[str, str]:
        """The names in Redis that say whether the lease holds."""
        return names.lease(self.shard), names.epoch(self.shard)


class Leases:
    """The shards of one model, as one worker takes and leaves them. Every method raises StoreUnavailable."""

    def __init__(self, client: RedisClient, names: RedisNames, worker: str, *, ttl_ms: int = 5_000) -> None:
        self._client, self._names, self.worker, self._ttl_ms = client, names, worker, ttl_ms

    def take(self, shard: int) -> Lease | None:
        """The lease of a shard that nobody holds, or that this worker holds already; None: it is somebody else's."""
        name = self._names.lease(shard)
        try:
            with self._client.transaction(name) as transaction:
                if transaction.read("GET", name) not in (None, self.worker.encode()):
                    return None
                transaction.begin()
                transaction.write("SET", name, self.worker, "PX", self._ttl_ms)
                transaction.write("INCR", self._names.epoch(shard))
                return Lease(shard, self.worker, int(transaction.run()[1]))
        except Interrupted:
            return None

    def renew(self, lease: Lease) -> None:
        """Hold on for another `ttl_ms`. Raises Fenced when the lease is over."""
        self._if_held(lease, "PEXPIRE", self._names.lease(lease.shard), self._ttl_ms)

    def release(self, lease: Lease) -> None:
        """Let others have the shard. Raises Fenced when the lease is over already."""
        self._if_held(lease, "DEL", self._names.lease(lease.shard))

    def holders(self, shards: int) -> list[str | None]:
        """Who holds each shard now."""
        found = self._client.call("MGET", *(self._names.lease(shard) for shard in range(shards)))
        return [None if worker is None else worker.decode() for worker in found]

    def sign_in(self) -> int:
        """Say that this worker is alive; how many were within the last lease's time."""
        seconds, microseconds = self._client.call("TIME")
        now_ms = 1000 * int(seconds) + int(microseconds) // 1000
        replies: list[Reply] = self._client.batch(
            [
                ("ZADD", self._names.workers, now_ms, self.worker),
                ("ZREMRANGEBYSCORE", self._names.workers, "-inf", now_ms - self._ttl_ms),
                ("ZCARD", self._names.workers),
            ]
        )
        return int(replies[2])

    def sign_out(self) -> None:
        """Say that this worker is gone."""
        self._client.call("ZREM", self._names.workers, self.worker)

    def _if_held(self, lease: Lease, *words: str | int) -> None:
        for _ in range(ATTEMPTS):
            try:
                with self._client.transaction(*lease.watched(self._names)) as transaction:
                    lease.check(transaction, self._names)
                    transaction.begin()
                    transaction.write(*words)
                    transaction.run()
                    return
            except Interrupted:
                continue  # who holds it now shows when it is read again
        raise StoreUnavailable(f"Redis broke off {ATTEMPTS} times over the lease of shard {lease.shard}")
