"""Which sessions of a shard end, for all replicas: those that nobody uses, and those that are too many if so wished.

Every worker sees all sessions and ends those of its own shards, so that together they end what one would.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from keystore.backends.base import ScopeHead
from keystore.backends.redis_names import shard_of
from keystore.backends.redis_use import SessionUse
from keystore.fairness import who_makes_room
from keystore.records import ScopeId


@dataclass(frozen=True, slots=True)
class SessionLimits:
    """How long a session lives unused, and how many there may be in the store; None: any number."""

    ttl_s: float
    most: int | None


class SessionEnds:
    """Of one shard of `shards`. A session is used when any replica reads it, and when it is taught."""

    def __init__(self, use: SessionUse, shard: int, shards: int, limits: SessionLimits) -> None:
        self._use, self._shard, self._shards, self._limits = use, shard, shards, limits

    def due(self, heads: Sequence[ScopeHead], now: float) -> list[ScopeId]:
        """Those that end now (unix seconds): unused for `ttl_s`, and, of more than `most`, those used longest ago of
        the tenants that have the most. Raises StoreUnavailable.
        """
        taught_at = {head.scope: head.created_at for head in heads if head.scope.kind == "session"}
        expired = self._expired(taught_at, now - self._limits.ttl_s)
        for session in expired:
            del taught_at[session]
        return [*expired, *self._excess(taught_at)]

    def forget(self, ended: Sequence[ScopeId]) -> None:
        """These were deleted. Raises StoreUnavailable."""
        self._use.forget(ended)

    def _expired(self, taught_at: Mapping[ScopeId, float], unused_since: float) -> list[ScopeId]:
        untaught = [each for each, at in taught_at.items() if at < unused_since and self._is_ours(each)]
        read_at = self._use.of(untaught)
        return [session for session in untaught if read_at.get(session, 0.0) < unused_since]

    def _excess(self, taught_at: Mapping[ScopeId, float]) -> list[ScopeId]:
        most = self._limits.most
        if most is None or len(taught_at) <= most:
            return []
        read_at = self._use.of(list(taught_at))
        by_use = sorted(taught_at, key=lambda each: max(taught_at[each], read_at.get(each, 0.0)))
        return [each for each in who_makes_room(by_use, len(by_use) - most) if self._is_ours(each)]

    def _is_ours(self, session: ScopeId) -> bool:
        return shard_of(session, self._shards) == self._shard
