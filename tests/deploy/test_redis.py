"""What Redis keeps, and what its users may do."""

from collections.abc import Callable, Iterator
from contextlib import closing
from uuid import UUID

import pytest
from redis.exceptions import NoPermissionError

from keystore.backends.redis_client import RedisClient
from keystore.backends.redis_lease import Lease, Leases
from keystore.backends.redis_leased import LeasedBackend, Receipt
from keystore.backends.redis_names import GLOBAL_SHARD, RedisNames
from keystore.backends.redis_producers import Producers
from keystore.backends.redis_seal import Seal
from keystore.errors import StoreUnavailable
from keystore.records import ScopeId

NAMES, SCOPE = RedisNames("cafe"), ScopeId("tenant", "default")
OF_WORKERS = {NAMES.lease(0), NAMES.epoch(0), NAMES.workers}
GIVEN = dict.fromkeys(("stats", "watermarks", "lease", "epoch"), 0) | {"producer": UUID(int=1)}


def names_in_redis() -> Iterator[str]:
    """One name of every kind."""
    for kind in (kind for kind in dir(NAMES) if not kind.startswith("_") and kind != "tag"):
        found = getattr(NAMES, kind)
        yield found if isinstance(found, str) else found(GIVEN.get(kind, SCOPE))


@pytest.fixture
def log_in(redis, secrets) -> Iterator[Callable[[str], RedisClient]]:
    """log_in(user): a client with the password that was made for it."""
    clients: list[RedisClient] = []

    def client(user: str) -> RedisClient:
        password = (secrets / f"redis_{user}_password").read_text()
        clients.append(redis.client(username=user, password=password))
        return clients[-1]

    yield client
    for each in clients:
        each.close()


def test_what_was_written_survives_a_kill(redis, log_in) -> None:
    log_in("server").call("HSET", NAMES.tip, "sequence", 7)
    redis.restart()
    assert log_in("server").call("HGET", NAMES.tip, "sequence") == b"7"


def refused(client: RedisClient) -> set[str]:
    """The names that a user cannot touch."""
    found: set[str] = set()
    for name in names_in_redis():
        try:
            client.call("DEL", name)
        except NoPermissionError:
            found.add(name)
    return found


def test_leases_and_nothing_else_are_out_of_a_servers_reach(log_in) -> None:
    assert refused(log_in("server")) == OF_WORKERS
    assert refused(log_in("worker")) == set()


def test_a_server_may_learn_the_global_scope_and_nobody_elses(log_in) -> None:
    leases = Leases(log_in("server"), NAMES, "a server")
    lease = leases.take(GLOBAL_SHARD)
    assert lease == Lease(GLOBAL_SHARD, "a server", 1)
    leases.renew(lease)
    backend = LeasedBackend(log_in("server"), NAMES, lease, seal=Seal(), shards=8)
    backend.expect(Receipt([b"1-0"], {UUID(int=1): 1}))
    backend.consume()
    assert Producers(log_in("server"), NAMES).forget_unknown(GLOBAL_SHARD) == 1
    leases.release(lease)
    with pytest.raises(NoPermissionError):
        leases.take(0)


@pytest.mark.parametrize("user", ["server", "worker"])
@pytest.mark.parametrize(
    "words",
    [
        ("EVAL", "return 1", 0),
        ("SCRIPT", "FLUSH"),
        ("KEYS", "*"),
        ("FLUSHALL",),
        ("CONFIG", "GET", "*"),
        ("ACL", "LIST"),
        ("DEBUG", "SLEEP", 0),
        ("SHUTDOWN",),
        ("GET", "somebody:else"),
    ],
    ids=lambda words: words[0],
)
def test_nobody_scripts_administers_or_reads_what_is_not_ours(log_in, user, words) -> None:
    with pytest.raises(NoPermissionError):
        log_in(user).call(*words)


def test_without_a_password_nothing_is_answered(redis) -> None:
    for username, password in ((None, None), ("server", "wrong"), ("default", "")):
        client = redis.client(username=username, password=password)
        with closing(client), pytest.raises(StoreUnavailable):
            client.call("PING")
