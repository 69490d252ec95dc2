"""A connection to Redis: plain commands, batches, optimistic transactions. Never a script.

What cannot reach the server becomes StoreUnavailable; everything else passes through as the library raised it.
"""

from collections.abc import Generator, Iterable, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import redis
from redis.backoff import NoBackoff
from redis.client import Pipeline
from redis.exceptions import OutOfMemoryError, ReadOnlyError
from redis.retry import Retry

from keystore.errors import StoreUnavailable

Word = str | bytes | int | float
Reply = Any  # the library's reply to one command: what it is depends on the command

_UNREACHABLE = (redis.ConnectionError, redis.TimeoutError, ReadOnlyError, OutOfMemoryError)
_REFUSALS = ("MISCONF", "MASTERDOWN", "CLUSTERDOWN", "NOREPLICAS")


@dataclass(frozen=True, slots=True)
class RedisSettings:
    """Where Redis is. `url` is redis://HOST:PORT/DB, rediss:// with TLS, or unix://PATH."""

    url: str
    username: str | None = None
    password: str | None = field(default=None, repr=False)
    tls_ca_file: Path | None = None
    tls_cert_file: Path | None = None
    tls_key_file: Path | None = None
    timeout_s: float = 5.0  # of connecting, and of one reply


class RedisClient:
    """Thread-safe. Connects when first used, and again after a failure; a command is never sent twice."""

    def __init__(self, settings: RedisSettings) -> None:
        files = {
            "ssl_ca_certs": settings.tls_ca_file,
            "ssl_certfile": settings.tls_cert_file,
            "ssl_keyfile": settings.tls_key_file,
        }
        given = {"username": settings.username, "password": settings.password}
        options = {name: str(value) for name, value in (given | files).items() if value is not None}
        self.timeout_s = settings.timeout_s
        self._redis = redis.Redis.from_url(
            settings.url,
            protocol=2,
            socket_timeout=settings.timeout_s,
            socket_connect_timeout=settings.timeout_s,
            retry=Retry(NoBackoff(), 0),
            **options,
        )

    def call(self, *words: Word) -> Reply:
        """One command. Raises StoreUnavailable: nobody knows then whether it was carried out."""
        with _reaching():
            return self._redis.execute_command(*words)

    def batch(self, commands: Iterable[Sequence[Word]], *, atomic: bool = False) -> list[Reply]:
        """Several commands in one round trip; `atomic`: nobody sees some of them only. Raises StoreUnavailable."""
        with _reaching(), self._redis.pipeline(transaction=atomic) as pipe:
            for words in commands:
                pipe.execute_command(*words)
            return pipe.execute()

    @contextmanager
    def transaction(self, *names: str) -> Generator["Transaction"]:
        """Reads, then writes that happen all, or, with Interrupted from `run`, not at all: when one of `names` has
        changed since. Raises StoreUnavailable.
        """
        with _reaching(), self._redis.pipeline() as pipe:
            pipe.watch(*names)
            yield Transaction(pipe)

    def close(self) -> None:
        """Drop every connection."""
        self._redis.close()


class Interrupted(Exception):
    """Somebody changed what a transaction has read, or the connection broke: nobody knows whether it happened."""


class Transaction:
    """`read` comes before the first `write`."""

    def __init__(self, pipe: Pipeline) -> None:
        self._pipe = pipe

    def read(self, *words: Word) -> Reply:
        """The reply to one command, now."""
        try:
            return self._pipe.execute_command(*words)
        except redis.WatchError as error:
            raise Interrupted(str(error)) from error

    def begin(self) -> None:
        """From here on commands wait for `run`."""
        self._pipe.multi()

    def write(self, *words: Word) -> None:
        """Add a command."""
        self._pipe.execute_command(*words)

    def run(self) -> list[Reply]:
        """Carry out what was written. Raises Interrupted."""
        try:
            return self._pipe.execute()
        except redis.WatchError as error:
            raise Interrupted(str(error)) from error


@contextmanager
def _reaching() -> Generator[None]:
    try:
        yield
    except _UNREACHABLE as error:
        raise StoreUnavailable(f"Redis: {error}") from error
    except redis.ResponseError as error:
        if str(error).startswith(_REFUSALS):
            raise StoreUnavailable(f"Redis: {error}") from error
        raise
