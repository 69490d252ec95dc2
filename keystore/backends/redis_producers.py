"""Which producers of statistics may still send an entry again; what was learned of all others need not be remembered.

A producer is known from before its first entry until it has left or been silent for a month, and never again after
that. Only a known one sends anything again, in a transaction that fails once it is unknown; only watermarks of unknown
ones are forgotten, and not while anything waits in the stream. So no entry is learned twice, whoever slept how long.
"""

from uuid import UUID

from keystore.backends.redis_client import Interrupted, RedisClient
from keystore.backends.redis_names import RedisNames
from keystore.errors import StoreUnavailable

SILENT_MS = 30 * 24 * 3_600_000  # an outage of Redis is silence too
LEFT_MS = 3_600_000  # what a broken connection still has under way arrives within minutes or never
ATTEMPTS = 3


class Producers:
    """The producers of one model. Every method raises StoreUnavailable."""

    def __init__(self, client: RedisClient, names: RedisNames) -> None:
        self._client, self._names = client, names

    def introduce(self, producer: UUID) -> None:
        """To be called before the producer sends anything, and never after it has."""
        self._client.call("SET", self._names.producer(producer), 1, "PX", SILENT_MS)

    def renew(self, producer: UUID) -> None:
        """The producer is still there. One that is unknown by now stays so."""
        self._client.call("PEXPIRE", self._names.producer(producer), SILENT_MS)

    def leave(self, producer: UUID) -> None:
        """Everything that the producer has sent has arrived, and it will send nothing again."""
        self._client.call("PEXPIRE", self._names.producer(producer), LEFT_MS)

    def send_again(self, producer: UUID, shard: int, entry: bytes) -> bool:
        """Append an entry that may have arrived before; False, and nothing happens, when the producer is unknown."""
        name = self._names.producer(producer)
        for _ in range(ATTEMPTS):
            try:
                with self._client.transaction(name) as transaction:
                    if transaction.read("GET", name) is None:
                        return False
                    transaction.begin()
                    transaction.write("XADD", self._names.stats(shard), "*", "window", entry)
                    transaction.run()
                    return True
            except Interrupted:
                continue  # if it has happened after all, the watermark tells duplicates apart
        raise StoreUnavailable(f"Redis broke off {ATTEMPTS} times over an entry of shard {shard}")

    def forget_unknown(self, shard: int) -> int:
        """Drop the shard's watermarks of producers that are unknown; how many. None while entries wait."""
        names, stats = self._names, self._names.stats(shard)
        seen = self._client.call("HKEYS", names.watermarks(shard))
        if not seen:
            return 0
        marks = self._client.call("MGET", *(names.producer(UUID(hex=each.decode())) for each in seen))
        unknown = [producer for producer, mark in zip(seen, marks, strict=True) if mark is None]
        if not unknown:
            return 0
        try:
            with self._client.transaction(stats) as transaction:
                if transaction.read("XLEN", stats):
                    return 0
                transaction.begin()
                transaction.write("HDEL", names.watermarks(shard), *unknown)
                transaction.run()
        except Interrupted:
            return 0  # the next time
        return len(unknown)
