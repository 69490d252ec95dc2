"""Every change of a model's store in Redis: checked, numbered, audited and told to readers in one transaction.

Knows no versions. Never blindly repeats: a change carries a mark of its own, by which an answer that was lost is found.
"""

import json
import os
import random
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from keystore.backends.audit import GENESIS, canonical_json, chain_hash
from keystore.backends.redis_client import Interrupted, RedisClient, Reply, Transaction, Word
from keystore.backends.redis_lease import Lease
from keystore.backends.redis_names import RedisNames
from keystore.errors import StoreRegressed, StoreUnavailable

ATTEMPTS = 200  # each failed one means that another change went through
AUDIT_KEPT = 100_000
DELTAS_KEPT = 10_000


@dataclass(frozen=True, slots=True)
class Position:
    """A place in the store's history. The hash is the audit chain's: another history has another one."""

    sequence: int = 0  # of the last commit
    audit_hash: str = GENESIS


class Change:
    """One change being put together: first reads, then `begin`, then writes."""

    def __init__(self, transaction: Transaction, audit_id: int, audit_hash: str, names: RedisNames) -> None:
        self._transaction, self._names = transaction, names
        self.audit_id, self.audit_hash = audit_id, audit_hash

    def read(self, *words: Word) -> Reply:
        """The reply to a command, as it will still be when the change happens."""
        return self._transaction.read(*words)

    def begin(self) -> None:
        """End of reading."""
        self._transaction.begin()

    def write(self, *words: Word) -> None:
        """One command of the change."""
        self._transaction.write(*words)

    def audit(self, event: Mapping[str, object]) -> None:
        """Add a link to the audit chain."""
        text = canonical_json(event)
        self.audit_id, self.audit_hash = self.audit_id + 1, chain_hash(self.audit_hash, text)
        link = (f"{self.audit_id}-0", "event", text, "hash", self.audit_hash)
        self.write("XADD", self._names.audit, "MAXLEN", "~", AUDIT_KEPT, *link)


class Journal:
    """The changes of one model's store, one after the other whoever makes them.

    With a `lease` it is used by one thread, which goes on from what it has read: see `remember`.
    """

    def __init__(self, client: RedisClient, names: RedisNames, lease: Lease | None = None) -> None:
        self._client, self._names, self._lease = client, names, lease
        self._remembered: Position | None = None

    def remember(self) -> None:
        """What is read from now on is the basis of later changes: they fail if the store has lost it by then."""
        self._remembered = self.position()

    def position(self) -> Position:
        """Where the store stands. Raises StoreUnavailable."""
        return _position(self._client.call("HMGET", self._names.tip, *_TIP))

    def change(self, kind: str, told: Mapping[str, object], write: Callable[[Change], None]) -> None:
        """Carry out what `write` puts together, all of it or nothing; `told` goes to the readers with it.

        `write` is called again when somebody else was faster. Raises Fenced, StoreRegressed, and StoreUnavailable when
        nobody knows whether it happened; what `write` raises passes through and nothing happened.
        """
        mark, first = os.urandom(16).hex(), None
        guarded = self._lease.watched(self._names) if self._lease else ()
        for attempt in range(ATTEMPTS):
            try:
                with self._client.transaction(self._names.tip, *guarded) as transaction:
                    tip = transaction.read("HMGET", self._names.tip, *_TIP)
                    here = _position(tip)
                    first = here if first is None else first
                    if attempt and self._was_done(transaction, first, mark):
                        return
                    if self._lease:
                        self._lease.check(transaction, self._names)
                    self._check_remembered(transaction, here)
                    change = Change(transaction, int(tip[1] or 0), here.audit_hash, self._names)
                    write(change)
                    if change.audit_hash != here.audit_hash:
                        told_now = {"kind": kind, "mark": mark, "at": time.time(), **told}
                        self._tell(change, here, told_now)
                    transaction.run()
                    if self._remembered is not None and change.audit_hash != here.audit_hash:
                        self._remembered = Position(here.sequence + 1, change.audit_hash)
                    return
            except Interrupted:
                time.sleep(random.uniform(0, 0.0005 * min(attempt, 20)))  # noqa: S311 - who goes first
        raise StoreUnavailable(f"Redis: somebody else was faster {ATTEMPTS} times")

    def _check_remembered(self, transaction: Transaction, here: Position) -> None:
        known = self._remembered
        if known is None or known == here or here.sequence > known.sequence + DELTAS_KEPT:
            return
        place = f"{known.sequence + 1}-0"
        following = transaction.read("XRANGE", self._names.delta, place, place)
        if [fields[b"before"].decode() for _, fields in following] != [known.audit_hash]:
            self._remembered = None
            raise StoreRegressed(f"the store has lost commit {known.sequence}, or has another one")

    def _was_done(self, transaction: Transaction, first: Position, mark: str) -> bool:
        since = transaction.read("XRANGE", self._names.delta, f"{first.sequence + 1}-0", "+")
        return any(json.loads(fields[b"told"])["mark"] == mark for _, fields in since)

    def _tell(self, change: Change, before: Position, told: Mapping[str, object]) -> None:
        sequence, names = before.sequence + 1, self._names
        tip: tuple[Word, ...] = (sequence, change.audit_id, change.audit_hash)
        change.write("HSET", names.tip, *(word for pair in zip(_TIP, tip, strict=True) for word in pair))
        links = ("before", before.audit_hash, "after", change.audit_hash)
        entry = (f"{sequence}-0", "told", canonical_json(told), *links)
        change.write("XADD", names.delta, "MAXLEN", "~", DELTAS_KEPT, *entry)


_TIP = ("sequence", "audit_id", "audit_hash")


def _position(tip: Reply) -> Position:
    sequence, _, audit_hash = tip
    return Position(int(sequence), audit_hash.decode()) if sequence else Position()
