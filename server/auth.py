"""Who a request is from and what it may do. Attached in front of the router, so no route can forget it."""

import hmac
import logging
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Receive, Scope, Send

from server.api_key_file import ApiKeyFileError, StoredApiKey, digest_of, read_api_keys
from server.budgets import HOUR_S, MINUTE_S, Budget
from server.exchange import Caller, Exchange, Level
from server.refusals import Forbidden, OverBudget, Unauthenticated
from server.settings import ApiKeyLimits

PUBLIC_PATHS = frozenset({"/health", "/health/live", "/health/ready"})  # the whole list
METRICS_PATH = "/metrics"
ADMIN_PREFIX = "/admin/"
NOBODY = Caller("", "public")
EVERYBODY = Caller("default", "admin")

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class ApiKey:
    """One API key that is let in. The key itself is not kept."""

    digest: str  # SHA-256, hexadecimal
    caller: Caller
    expires_at: float | None = None  # unix seconds

    @classmethod
    def of(
        cls,
        secret: str,
        tenant: str,
        level: Literal["user", "admin"],
        learned_tokens_per_hour: int | None = None,
    ) -> "ApiKey":
        limits = ApiKeyLimits(tenant=tenant, level=level, learned_tokens_per_hour=learned_tokens_per_hour)
        return cls.limited(digest_of(secret), limits)

    @classmethod
    def limited(cls, digest: str, limits: ApiKeyLimits, expires_at: float | None = None) -> "ApiKey":
        """A key with full budgets of its own."""
        per_hour, per_minute = limits.learned_tokens_per_hour, limits.requests_per_minute
        caller = Caller(
            limits.tenant,
            limits.level,
            None if per_hour is None else Budget(per_hour, HOUR_S),
            None if per_minute is None else Budget(per_minute, MINUTE_S),
            limits.plasticity,
        )
        return cls(digest, caller, expires_at)


class StoredApiKeys:
    """The API keys in a file, which may change at any time. A key that stays as it is keeps what it has spent.

    A file that cannot be read leaves the keys that were read before, and says so in `error`. Raises ApiKeyFileError
    and OSError when that happens at the start.
    """

    def __init__(self, path: Path):
        self._path = path
        self._seen: tuple[int, int, int] | None = None
        self._found: dict[StoredApiKey, ApiKey] = {}
        self.exist = False  # once there is a file, nobody gets in without a key
        self.error: str | None = None
        self._read()

    def current(self) -> Iterable[ApiKey]:
        """Every key of the file as it is now."""
        try:
            self._read()
        except (ApiKeyFileError, OSError) as error:
            if self.error is None:
                logger.exception("the API key file cannot be read: the keys that were read before stay")
            self.error = type(error).__name__
        return self._found.values()

    def _read(self) -> None:
        try:
            stat = self._path.stat()
        except FileNotFoundError:
            if self.exist:
                raise
            return
        now = (stat.st_ino, stat.st_mtime_ns, stat.st_size)
        if now != self._seen:
            kept = read_api_keys(self._path)
            self._found = {
                each: self._found.get(each) or ApiKey.limited(each.digest, each, each.expires_at)
                for each in kept
            }
            self._seen, self.exist = now, True
        self.error = None


class ApiKeys:
    """Every API key, of the configuration and of the file. Without any, everybody is the admin of "default"."""

    def __init__(
        self,
        configured: Iterable[ApiKey] = (),
        stored: StoredApiKeys | None = None,
        clock: Callable[[], float] = time.time,
    ):
        self._configured = tuple(configured)
        self._stored = stored
        self._clock = clock

    @property
    def fault(self) -> str | None:
        """What is wrong with the file of keys, if anything."""
        return self._stored and self._stored.error

    def identify(self, authorization: str | None) -> Caller:
        """The caller of an `Authorization: Bearer` header. Raises Unauthenticated."""
        api_keys = [*self._configured, *(self._stored.current() if self._stored else ())]
        if not api_keys and not (self._stored and self._stored.exist):
            return EVERYBODY
        scheme, _, secret = (authorization or "").partition(" ")
        if scheme.lower() != "bearer" or not secret.strip():
            raise Unauthenticated("an API key is required: send 'Authorization: Bearer <API key>'")
        given, now = digest_of(secret.strip()), self._clock()
        found = [each for each in api_keys if hmac.compare_digest(each.digest, given)]
        if not found:
            raise Unauthenticated("this API key is not known")
        if found[0].expires_at is not None and now >= found[0].expires_at:
            raise Unauthenticated("this API key has expired")
        return found[0].caller


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
        caller = exchange.caller = self._api_keys.identify(Headers(scope=scope).get("authorization"))
        _charge(caller)
        needed: Level = "admin" if path.startswith(ADMIN_PREFIX) else "user"
        if needed == "admin" and caller.level != "admin":
            raise Forbidden("this needs an API key of level 'admin'")


def _charge(caller: Caller) -> None:
    """One request. Raises OverBudget."""
    if caller.rate is None:
        return
    if not caller.rate.allows(1):
        raise OverBudget("this API key has made all the requests that it may make now", caller.rate.wait_s(1))
    caller.rate.spend(1)
