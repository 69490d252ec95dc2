"""A process that consolidates until it is killed, and says so on standard output after every commit.

    python consolidating.py STORE [STEP COUNT]

STORE is a file, or the URL of a Redis. What it teaches depends on the version alone, so every history of such processes on one store goes through the
same checksums. With STEP, "open ..." or "commit ...", it kills itself by -9 ahead of the COUNTth step of that name.
"""

import json
import os
import signal
import sys
from collections import Counter
from pathlib import Path

import apsw
import numpy as np
from redis.connection import Connection

from keystore.backends.base import Backend
from keystore.backends.embedded import EmbeddedBackend
from keystore.backends.redis import RedisBackend
from keystore.backends.redis_client import RedisClient, RedisSettings
from keystore.backends.redis_names import RedisNames
from keystore.records import GravityConfig, ScopeId
from keystore.shelf import VersionShelf
from keystore.statistics import RoutingStats, TokenCredit, TokenTrace
from keystore.store import KeyStore

TENANTS = ScopeId("tenant", "one"), ScopeId("tenant", "two")  # of one commit: both move or neither does
EXPERTS, DIM, TOKENS, CHOSEN = 8, 4, 16, 2


class Steps:
    """Counts what the process does, and ends it ahead of one of them."""

    def __init__(self, last: str, count: int) -> None:
        self.taken: Counter[str] = Counter()
        self.phase = "open"
        self._last, self._count = last, count

    def take(self, what: str) -> None:
        name = f"{self.phase} {what}"
        self.taken[name] += 1
        if name == self._last and self.taken[name] == self._count:
            os.kill(os.getpid(), signal.SIGKILL)

    def follow(self, owner: type, method: str) -> None:
        """Take a step ahead of every call of a method."""
        inner = getattr(owner, method)

        def called(*arguments: object, **options: object) -> object:
            self.take(method)
            return inner(*arguments, **options)

        setattr(owner, method, called)


class File(apsw.VFSFile):
    """One file of the disk; the methods are here to be followed."""

    def xWrite(self, data: bytes, offset: int) -> None:
        super().xWrite(data, offset)

    def xSync(self, flags: int) -> None:
        super().xSync(flags)

    def xTruncate(self, size: int) -> None:
        super().xTruncate(size)


class Disk(apsw.VFS):
    """The system's file system, under a name of its own and in place of it."""

    def __init__(self) -> None:
        super().__init__("followed", "unix", makedefault=True)

    def xOpen(self, name: apsw.URIFilename | str | None, flags: list[int]) -> File:
        return File("unix", name, flags)

    def xDelete(self, name: str, sync_folder: bool) -> None:
        super().xDelete(name, sync_folder)


def embedded(path: Path, steps: Steps) -> Backend:
    """One that follows every call to the disk and every statement of the writer."""
    for owner, method in ((File, "xWrite"), (File, "xSync"), (File, "xTruncate"), (Disk, "xDelete")):
        steps.follow(owner, method)
    backend = EmbeddedBackend(path)

    def follow_statement(_: object, statement: str, __: object) -> bool:
        steps.take(statement.partition(" VALUES")[0].partition(" FROM")[0])
        return True

    backend._writer.exec_trace = follow_statement
    backend._writer.wal_autocheckpoint(16)  # pages: the log goes into the file every few commits
    return backend


def shared(url: str, steps: Steps) -> Backend:
    """One that follows everything that is sent to Redis, and every answer."""
    for method in ("send_packed_command", "read_response"):
        steps.follow(Connection, method)
    return RedisBackend(RedisClient(RedisSettings(url)), RedisNames("killed"))


def window(tenant: ScopeId, version: int) -> RoutingStats:
    rng = np.random.default_rng([version, TENANTS.index(tenant)])
    ids = rng.random((TOKENS, EXPERTS)).argsort(axis=1)[:, :CHOSEN]
    queries = rng.standard_normal((TOKENS, DIM), dtype=np.float32)
    weights = rng.standard_normal((TOKENS, CHOSEN), dtype=np.float32)
    return RoutingStats.from_tokens(tenant, {0: TokenTrace(ids, queries, EXPERTS, TokenCredit(ids, weights))})


def say(word: str, **more: object) -> None:
    print(json.dumps({"word": word, **more}), flush=True)


def state(store: KeyStore) -> dict[str, object]:
    views = [store.view(tenant) for tenant in TENANTS]
    return {"versions": [view.version for view in views], "checksums": [view.checksum for view in views]}


def consolidate_for_ever(backend: Backend, steps: Steps) -> None:
    anchors = {0: np.random.default_rng(0).standard_normal((EXPERTS, DIM), dtype=np.float32)}
    store = KeyStore(
        "tiny", anchors, GravityConfig(), backend, num_experts_per_tok=CHOSEN, plastic_layers=(0,)
    )
    say("opened", audited=store.verify_audit(), **state(store))
    steps.phase = "commit"
    while True:
        for tenant in TENANTS:
            store.submit(window(tenant, store.view(tenant).version))
        store.consolidate_once()
        steps.take("acknowledge")
        say("committed", steps=steps.taken, **state(store))


if __name__ == "__main__":
    where, last, count = (*sys.argv[1:], "", "0")[:3]
    following, disk = Steps(last, int(count)), Disk()
    following.follow(VersionShelf, "publish")
    say("opening")
    is_shared = where.startswith("redis://")
    consolidate_for_ever(
        shared(where, following) if is_shared else embedded(Path(where), following), following
    )
