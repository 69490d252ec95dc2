"""Who a request is from and what it may do. Attached in front of the router, so no route can forget it.

Keys are kept as SHA-256 digests: they are random, so a slow hash would protect nothing.
"""

import hashlib
import hmac
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Receive, Scope, Send

from server.exchange import Caller, Exchange, Level
from server.learning_budget import LearningBudget
from server.refusals import Forbidden, Unauthenticated

PUBLIC_PATHS = frozenset({"/health", "/health/live", "/health/ready"})  # the whole list
METRICS_PATH = "/metrics"
ADMIN_PREFIX = "/admin/"
NOBODY = Caller("", "public")


@dataclass(frozen=True, slots=True)
class ApiKey:
    """One configured API key. The key itself is not kept."""

    digest: bytes
    caller: Caller

    @classmethod
    def of(
        cls,
        secret: str,
        tenant: str,
        level: Literal["user", "admin"],
        learned_tokens_per_hour: int | None = None,
    ) -> "ApiKey":
        per_hour = learned_tokens_per_hour
        return cls(
            _digest(secret), Caller(tenant, level, None if per_hour is None else LearningBudget(per_hour))
        )


class ApiKeys:
    """Every configured API key. Without any, everybody is the admin of the tenant "default"."""

    def __init__(self, api_keys: Iterable[ApiKey] = ()):
        self._api_keys = tuple(api_keys)

    def identify(self, authorization: str | None) -> Caller:
        """The caller of an `Authorization: Bearer` header. Raises Unauthenticated."""
        if not self._api_keys:
            return Caller("default", "admin")
        scheme, _, secret = (authorization or "").partition(" ")
        if scheme.lower() != "bearer" or not secret.strip():
            raise Unauthenticated("an API key is required: send 'Authorization: Bearer <API key>'")
        given = _digest(secret.strip())
        found = [each.caller for each in self._api_keys if hmac.compare_digest(each.digest, given)]
        if not found:
            raise Unauthenticated("this API key is not known")
        return found[0]


class Authentication:
    """ASGI middleware: every path needs a key, those of `/admin/` an admin's, except the listed ones."""

    def __init__(self, app: ASGIApp, api_keys: ApiKeys, *, public_metrics: bool):
        self._app = app
        self._api_keys = api_keys
        self._public = PUBLIC_PATHS | ({METRICS_PATH} if public_metrics else frozenset[str]())

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http":
            self._admit(scope)
        await self._app(scope, receive, send)

    def _admit(self, scope: Scope) -> None:
        path: str = scope["path"]
        exchange = Exchange.of(scope)
        if path in self._public:
            exchange.caller = NOBODY
            return
        exchange.caller = self._api_keys.identify(Headers(scope=scope).get("authorization"))
        needed: Level = "admin" if path.startswith(ADMIN_PREFIX) else "user"
        if needed == "admin" and exchange.caller.level != "admin":
            raise Forbidden("this needs an API key of level 'admin'")


def _digest(secret: str) -> bytes:
    return hashlib.sha256(secret.encode()).digest()
