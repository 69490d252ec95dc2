"""The store as the worker that holds a shard's lease writes it: commits are fenced, and take in what they learned from."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from uuid import UUID

from keystore.backends.base import CanaryNote, PoolEvent, ScopeHead, VersionRecord
from keystore.backends.redis import RedisBackend
from keystore.backends.redis_client import RedisClient
from keystore.backends.redis_lease import Lease
from keystore.backends.redis_names import RedisNames
from keystore.backends.redis_records import Command
from keystore.backends.redis_seal import Seal


@dataclass(frozen=True, slots=True)
class Receipt:
    """Statistics that a commit makes part of the store: from then on they are neither sent again nor read again.

    Whatever they taught must be in that very commit, or in an earlier one: nobody learns them after it.
    """

    entry_ids: Sequence[bytes]  # of the leased shard's stream
    watermarks: Mapping[UUID, int]  # producer to the highest sequence among the entries


class LeasedBackend(RedisBackend):
    """A Backend that raises Fenced, with nothing written, once `lease` is over.

    Several shards of one process have one each; closing leaves `client` open.
    """

    def __init__(
        self, client: RedisClient, names: RedisNames, lease: Lease, *, seal: Seal, shards: int
    ) -> None:
        super().__init__(client, names, seal=seal, shards=shards, lease=lease)
        self._shard, self._expected = lease.shard, Receipt((), {})

    def heads(self) -> Sequence[ScopeHead]:
        """Every scope that has versions. Commits raise StoreRegressed if the store loses some of them afterwards."""
        self._journal.remember()
        return super().heads()

    def expect(self, receipt: Receipt) -> None:
        """The next commit that succeeds takes these statistics in; in place of what was expected before."""
        self._expected = receipt

    def commit(
        self,
        records: Sequence[VersionRecord],
        canary: CanaryNote | None = None,
        pool_event: PoolEvent | None = None,
    ) -> None:
        """Keep all or none, with the expected receipt.

        Raises VersionConflict, Fenced, StoreUnavailable, StoreRegressed once: the heads must be read again.
        """
        self._commit(records, canary, pool_event, self._receipt_commands())
        self._expected = Receipt((), {})

    def consume(self) -> None:
        """Take in what is expected without any version: duplicates, and what was refused."""
        self.commit([])

    def _receipt_commands(self) -> list[Command]:
        commands: list[Command] = []
        if self._expected.entry_ids:
            commands.append(("XDEL", self._names.stats(self._shard), *self._expected.entry_ids))
        for producer, sequence in self._expected.watermarks.items():
            commands.append(("HSET", self._names.watermarks(self._shard), producer.hex, sequence))
        return commands
