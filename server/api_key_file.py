"""API keys made with `libration keys api`: one JSON file in the data folder, always replaced as a whole.

A running server looks at it with every request, so that a new key works and a revoked one stops working at once. Only
digests are kept. Knows nothing of requests.
"""

import fcntl
import hashlib
import os
import secrets
from collections.abc import Callable, Generator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from keystore.backends.data_file import make_folder
from server.settings import ApiKeyLimits, Name

FILE_NAME = "api_keys.json"
ID_LENGTH = 12
KEY_PREFIX = "lib-"
KEY_BYTES = 32
DAY_S = 86_400


class ApiKeyFileError(ValueError):
    """The file cannot be understood, or does not hold what was asked of it."""


class StoredApiKey(ApiKeyLimits):
    """One API key as the file keeps it. Times are unix seconds."""

    name: Name
    digest: Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]  # SHA-256 of the key
    created_at: Annotated[float, Field(allow_inf_nan=False)]
    expires_at: Annotated[float, Field(allow_inf_nan=False)] | None = None

    @property
    def id(self) -> str:
        """Enough of the digest to tell keys apart in lists and logs."""
        return self.digest[:ID_LENGTH]


class _Content(BaseModel):
    model_config = ConfigDict(extra="forbid")

    format: Literal[1] = 1
    api_keys: tuple[StoredApiKey, ...]


def digest_of(secret: str) -> str:
    """SHA-256 in hexadecimal. API keys are random, so a slow hash would protect nothing."""
    return hashlib.sha256(secret.encode()).hexdigest()


def read_api_keys(path: Path) -> tuple[StoredApiKey, ...]:
    """The keys in a file; none when there is no file. Raises ApiKeyFileError, OSError."""
    try:
        data = path.read_bytes()
    except FileNotFoundError:
        return ()
    try:
        return _Content.model_validate_json(data).api_keys
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"])) or "content"
        raise ApiKeyFileError(f"{path}: {where}: {first['msg']}") from error


def create_api_key(
    path: Path, name: str, limits: ApiKeyLimits, days: float | None, now: float
) -> tuple[StoredApiKey, str]:
    """Add a key; gives it as it is kept, and the key itself, which is kept nowhere. Raises ApiKeyFileError."""
    secret = KEY_PREFIX + secrets.token_urlsafe(KEY_BYTES)
    expires_at = None if days is None else now + days * DAY_S
    made = StoredApiKey(
        name=name,
        digest=digest_of(secret),
        created_at=now,
        expires_at=expires_at,
        **limits.model_dump(),
    )

    def with_it(held: Sequence[StoredApiKey]) -> list[StoredApiKey]:
        if any(each.name == name for each in held):
            raise ApiKeyFileError(
                f"there is an API key named {name!r}; revoke it first, or take another name"
            )
        return [*held, made]

    _change(path, with_it)
    return made, secret


def revoke_api_key(path: Path, name_or_id: str) -> StoredApiKey:
    """Take a key out, for ever. Raises ApiKeyFileError when there is none."""
    found: list[StoredApiKey] = []

    def without_it(held: Sequence[StoredApiKey]) -> list[StoredApiKey]:
        found.extend(each for each in held if name_or_id in (each.name, each.id))
        if not found:
            names = ", ".join(each.name for each in held) or "none"
            raise ApiKeyFileError(f"there is no API key {name_or_id!r}; there are: {names}")
        return [each for each in held if each not in found]

    _change(path, without_it)
    return found[0]


def _change(path: Path, change: Callable[[Sequence[StoredApiKey]], list[StoredApiKey]]) -> None:
    """One writer at a time; a reader sees the file before or after, never between, and so does a power failure."""
    make_folder(path.parent)
    with _locked(path.with_suffix(".lock")):
        content = _Content(api_keys=tuple(change(read_api_keys(path))))
        partial = path.with_suffix(".partial")
        fd = os.open(partial, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
        with os.fdopen(fd, "w") as file:
            file.write(content.model_dump_json(indent=1) + "\n")
            file.flush()
            os.fsync(file.fileno())
        partial.replace(path)
        folder = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)


@contextmanager
def _locked(path: Path) -> Generator[None]:
    fd = os.open(path, os.O_CREAT | os.O_RDWR, 0o600)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX)
        yield
    finally:
        os.close(fd)
