"""The audit chain in Redis, page by page."""

import json
from collections.abc import Iterable, Mapping, Sequence

from keystore.backends.base import EVERY_SCOPE
from keystore.backends.redis_client import RedisClient
from keystore.backends.redis_names import RedisNames
from keystore.records import ScopeId

PAGE = 512


def audit_trail(
    client: RedisClient, names: RedisNames, scope: ScopeId | None, limit: int
) -> Sequence[Mapping[str, object]]:
    """The newest events, of everybody or those that name a scope or all scopes, newest first."""
    wanted = None if scope is None else (str(scope), EVERY_SCOPE)
    found: list[Mapping[str, object]] = []
    last = "+"
    while len(found) < limit:
        page = client.call("XREVRANGE", names.audit, last, "-", "COUNT", PAGE)
        for entry_id, link in page:
            event = json.loads(link[b"event"])
            if wanted is None or event.get("scope") in wanted:
                found.append({"id": _number(entry_id), "hash": link[b"hash"].decode(), **event})
        if len(page) < PAGE:
            break
        last = f"({page[-1][0].decode()}"
    return found[:limit]


def audit_rows(client: RedisClient, names: RedisNames) -> Iterable[tuple[int, str, str]]:
    """(id, event, hash) of every link that was not trimmed, oldest first."""
    after = "-"
    while page := client.call("XRANGE", names.audit, after, "+", "COUNT", PAGE):
        for entry_id, link in page:
            yield _number(entry_id), link[b"event"].decode(), link[b"hash"].decode()
        after = f"({page[-1][0].decode()}"


def _number(entry_id: bytes) -> int:
    return int(entry_id.partition(b"-")[0])
