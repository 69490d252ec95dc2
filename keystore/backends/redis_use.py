"""When sessions were last read or taught, on whichever replica: so that a session ends for all of them at once."""

from collections.abc import Mapping, Sequence

from keystore.backends.redis_client import RedisClient
from keystore.backends.redis_names import RedisNames
from keystore.records import ScopeId


class SessionUse:
    """Times are unix seconds. Every method raises StoreUnavailable."""

    def __init__(self, client: RedisClient, names: RedisNames) -> None:
        self._client, self._names = client, names

    def note(self, used_at: Mapping[ScopeId, float]) -> None:
        """Later times take the place of earlier ones, never the other way round."""
        pairs = [word for session, at in used_at.items() for word in (at, str(session))]
        if pairs:
            self._client.call("ZADD", self._names.used, "GT", *pairs)

    def of(self, sessions: Sequence[ScopeId]) -> Mapping[ScopeId, float]:
        """Of those that were noted."""
        found = self._client.batch([("ZSCORE", self._names.used, str(session)) for session in sessions])
        return {session: float(at) for session, at in zip(sessions, found, strict=True) if at is not None}

    def forget(self, sessions: Sequence[ScopeId]) -> None:
        """These were deleted."""
        if sessions:
            self._client.call("ZREM", self._names.used, *map(str, sessions))
