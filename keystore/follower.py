"""Follows the versions that others store: commit by commit, or from the newest ones after a gap.

Every version is verified before readers have it: checksum, trust radius, shape. What fails is counted, and readers
keep what they had. Publishes nothing of its own: a store that has gone back in time is followed back.
"""

import bisect
import logging
import threading
from collections.abc import Sequence

from keystore.backends.base import ScopeHead, VersionRecord
from keystore.backends.redis_journal import Position
from keystore.backends.redis_streams import Delta
from keystore.errors import (
    FellBehind,
    KeyVersionUnavailable,
    OutOfBounds,
    StoreCorrupted,
    StoreRegressed,
)
from keystore.learning_side import StoreParts
from keystore.ledger import Stored
from keystore.outbox import Outbox
from keystore.records import ScopeId
from keystore.replica_backend import ReplicaBackend
from keystore.snapshot import KeySnapshot

DELAY_BOUNDS_S = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 60.0)
EAGER_SCOPES = 1024  # tenants read ahead of their first request after a gap; the rest when they come

logger = logging.getLogger(__name__)


class Delays:
    """How long versions took to get here. Written by one thread."""

    def __init__(self) -> None:
        self.counts = [0] * (len(DELAY_BOUNDS_S) + 1)
        self.sum_s = 0.0

    def add(self, delay_s: float) -> None:
        self.counts[bisect.bisect_left(DELAY_BOUNDS_S, delay_s)] += 1
        self.sum_s += max(0.0, delay_s)


class Follower:
    """Keeps the versions at hand like those stored. Thread-safe; everything raises StoreUnavailable."""

    def __init__(self, parts: StoreParts, backend: ReplicaBackend, outbox: Outbox) -> None:
        self._parts, self._backend, self._outbox = parts, backend, outbox
        self._following = threading.Lock()  # before the store's `writing`
        self.position: Position | None = None  # None: to be read from the start
        self.delays = Delays()
        self.resyncs = self.regressions = self.refused = 0
        self.refusal: Exception | None = None  # of the newest version that was not adopted, until one is

    def catch_up(self, block_ms: int = 0) -> bool:
        """Adopt what was stored since; waits up to `block_ms` for something. True when there was something.

        Raises ModelMismatch and InvalidConfig when the store is another model's or made otherwise.
        """
        position = self.position
        if position is None:
            return self._start_over()
        try:
            deltas = self._backend.deltas.read(position, block_ms=block_ms)
        except FellBehind as error:
            self.resyncs += 1
            logger.warning("following anew: %s", error)
        except StoreRegressed as error:
            self.regressions += 1
            logger.error("the shared store went back: %s", error)  # noqa: TRY400 - no fault of this process
        except StoreCorrupted as error:
            self._refuse("a commit", error)
        else:
            self._backend.away = False
            with self._following:
                return self._adopt_all(deltas)
        return self._start_over()

    def _start_over(self) -> bool:
        """Go on from what is stored now, whatever was known before."""
        parts, anchors = self._parts, self._parts.ledger.anchors
        with self._following:
            self._backend.adopt_model(anchors.model_id, anchors.checksum)
            position, stored = self._backend.deltas.position(), Stored.of(self._backend)
            self._backend.away = False
            latest = [snapshot for head in _eager(stored.heads) if (snapshot := self._load(head)) is not None]
            with parts.writing:
                # what was served before the first reading was nobody's version: it is not replaced, windows stay good
                known = {} if self.position is None else self._known()
                parts.ledger.start_over(stored, latest)
                parts.frozen.names, self.position = stored.frozen, position
                heads, new = (
                    {head.scope: head for head in stored.heads},
                    {each.scope: each for each in latest},
                )
                self._tell_replaced(
                    [
                        scope
                        for scope, old in known.items()
                        if _is_replaced(old, heads.get(scope), new.get(scope))
                    ]
                )
                parts.news.published.notify([each for each in latest if each is not known.get(each.scope)])
        return True

    def _known(self) -> dict[ScopeId, KeySnapshot]:
        return {scope: history.latest for scope, history in self._parts.ledger.shelf.in_memory()}

    def _load(self, head: ScopeHead) -> KeySnapshot | None:
        """The version that a head names; the one that readers have, or None, when it is refused."""
        try:
            return self._parts.ledger.load(head.scope, head.version)
        except (OutOfBounds, StoreCorrupted, KeyVersionUnavailable) as error:
            self._refuse(f"{head.scope} version {head.version}", error)
            return self._parts.ledger.shelf.at_hand(head.scope)

    def _adopt_all(self, deltas: Sequence[Delta]) -> bool:
        for delta in deltas:
            if self.position is not None and delta.position.sequence > self.position.sequence:
                with self._parts.writing:
                    self._adopt(delta)
                    self.position = delta.position
                self.delays.add(self._parts.clock() - delta.at)
        return bool(deltas)

    def _adopt(self, delta: Delta) -> None:
        parts = self._parts
        if delta.kind == "frozen":
            parts.frozen.names = self._backend.frozen()
        if delta.deleted:
            parts.ledger.forget(delta.deleted)
            for scope in delta.deleted:
                self._outbox.discard(scope)
            parts.news.deleted.notify(delta.deleted)
        for scope, version in delta.versions:
            head, record = parts.ledger.shelf.head(scope), delta.records.get((scope, version))
            if record is None or (head is not None and head.version >= version):
                continue  # thinned out since, so a newer one follows; or this process made it
            self._adopt_version(record, head)

    def _adopt_version(self, record: VersionRecord, head: ScopeHead | None) -> None:
        ledger, row = self._parts.ledger, record.row
        base = ledger.shelf.at_hand(row.scope)
        try:
            if base is None and row.scope.kind == "session":  # nobody reads it here
                ledger.shelf.note_head(row.scope, _head_after(head, record))
                return
            snapshot = ledger.follow(record, base)
        except (OutOfBounds, StoreCorrupted, KeyVersionUnavailable) as error:
            self._refuse(f"{row.scope} version {row.version}", error)
            return
        ledger.shelf.publish(snapshot)
        self.refusal = None
        if not snapshot.is_learned:
            self._tell_replaced([row.scope])
        self._parts.news.published.notify([snapshot])

    def _tell_replaced(self, scopes: Sequence[ScopeId]) -> None:
        self._parts.news.replaced.notify(scopes)
        for scope in scopes:
            self._outbox.discard(scope)

    def _refuse(self, what: str, error: Exception) -> None:
        self.refused += 1
        self.refusal = error
        logger.error("%s is not adopted: %s", what, error)


def _head_after(head: ScopeHead | None, record: VersionRecord) -> ScopeHead:
    row = record.row
    first, forked_from = (head.first_version, head.forked_from) if head else (row.version, row.parent)
    return ScopeHead(row.scope, first, forked_from, row.version, row.created_at, row.generation)


def _eager(heads: Sequence[ScopeHead]) -> Sequence[ScopeHead]:
    standing = [head for head in heads if head.scope.kind != "session"]
    return sorted(standing, key=lambda head: head.created_at, reverse=True)[:EAGER_SCOPES]


def _is_replaced(old: KeySnapshot, head: ScopeHead | None, new: KeySnapshot | None) -> bool:
    """Whether what is stored now did not come about by learning from what readers have."""
    if head is None or head.version < old.version:
        return old.version > 0
    if new is None or new is old:
        return False
    return new.checksum != old.checksum if new.version == old.version else not new.is_learned
