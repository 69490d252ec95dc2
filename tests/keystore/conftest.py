"""A small store on disk, and windows that move its keys."""

# M = 16 experts, D = 8, two layers of which layer 3 and 5 are plastic and layer 1 is not

import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import numpy as np
import pytest

sys.path.append(str(Path(__file__).parent))  # tests are not a package

from cluster import Cluster

from keystore.backends.base import Backend
from keystore.backends.embedded import EmbeddedBackend
from keystore.backends.redis import RedisBackend
from keystore.backends.redis_client import RedisClient
from keystore.backends.redis_model import ModelCard
from keystore.records import GravityConfig, ScopeId
from keystore.statistics import RoutingStats, TokenCredit, TokenTrace
from keystore.store import KeyStore

NUM_EXPERTS, DIM, NUM_EXPERTS_PER_TOK = 16, 8, 4
PLASTIC_LAYERS = (3, 5)
TENANT = ScopeId("tenant", "default")


class Clock:
    """A clock that only moves when told to."""

    def __init__(self) -> None:
        self.now_s = 1_000_000.0

    def __call__(self) -> float:
        return self.now_s


def make_anchors(seed: int = 0) -> dict[int, np.ndarray]:
    rng = np.random.default_rng(seed)
    return {layer: rng.standard_normal((NUM_EXPERTS, DIM), dtype=np.float32) for layer in (1, 3, 5)}


def make_window(
    scope: ScopeId = TENANT, seed: int = 0, tokens: int = 32, num_experts: int = NUM_EXPERTS
) -> RoutingStats:
    rng = np.random.default_rng(seed)
    traces: dict[int, TokenTrace] = {}
    for layer in PLASTIC_LAYERS:
        ids = rng.random((tokens, num_experts)).argsort(axis=1)[:, :NUM_EXPERTS_PER_TOK]
        queries = rng.standard_normal((tokens, DIM), dtype=np.float32)
        weights = rng.standard_normal((tokens, NUM_EXPERTS_PER_TOK), dtype=np.float32)
        traces[layer] = TokenTrace(ids, queries, num_experts, TokenCredit(ids, weights))
    return RoutingStats.from_tokens(scope, traces)


def make_store(backend: Backend, gravity: GravityConfig | None = None, **options: object) -> KeyStore:
    settings: dict[str, object] = {
        "model_id": "tiny",
        "anchors": make_anchors(),
        "gravity": gravity or GravityConfig(),
        "num_experts_per_tok": NUM_EXPERTS_PER_TOK,
        "plastic_layers": PLASTIC_LAYERS,
    }
    try:
        return KeyStore(backend=backend, **(settings | options))
    except BaseException:
        backend.close()
        raise


def open_store(path: Path, gravity: GravityConfig | None = None, **options: object) -> KeyStore:
    return make_store(EmbeddedBackend(path), gravity, **options)


def learn(store: KeyStore, seed: int = 0, scope: ScopeId = TENANT) -> None:
    """One window that moves keys, consolidated."""
    assert store.submit(make_window(scope, seed))
    assert len(store.consolidate_once()) == 1


@pytest.fixture
def window() -> Callable[..., RoutingStats]:
    """make_window(scope, seed, tokens, num_experts)"""
    return make_window


@pytest.fixture
def teach() -> Callable[..., None]:
    """learn(store, seed, scope)"""
    return learn


@pytest.fixture
def store_on() -> Callable[..., KeyStore]:
    """make_store(backend, gravity, **options): the caller closes it"""
    return make_store


@pytest.fixture
def card() -> ModelCard:
    """The tiny model as workers hear of it."""
    return ModelCard("some", "tiny", NUM_EXPERTS_PER_TOK, PLASTIC_LAYERS, make_anchors())


@pytest.fixture
def redis_client(redis_server) -> Iterator[RedisClient]:
    client = redis_server.client()
    yield client
    client.close()


@pytest.fixture(params=["embedded", "redis"])
def backend_kind(request: pytest.FixtureRequest) -> str:
    """Every backend in turn."""
    return request.param


@pytest.fixture
def open_backend(
    backend_kind: str, request: pytest.FixtureRequest, path: Path, card: ModelCard
) -> Callable[[], Backend]:
    """Opens the test's store: on its file, or on a Redis of its own."""
    if backend_kind == "embedded":
        return lambda: EmbeddedBackend(path)
    client = request.getfixturevalue("redis_client")
    return lambda: RedisBackend(client, card.names, card=card)


@pytest.fixture
def open_at() -> Callable[..., KeyStore]:
    """open_store(path, gravity, **options): the caller closes it"""
    return open_store


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "keys-tiny.sqlite3"


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def open_here(path: Path) -> Iterator[Callable[..., KeyStore]]:
    """Opens stores on the test's own file and closes whatever is still open."""
    opened: list[KeyStore] = []

    def reopen(gravity: GravityConfig | None = None, **options: object) -> KeyStore:
        if opened:
            opened.pop().close()
        opened.append(open_store(path, gravity, **options))
        return opened[-1]

    yield reopen
    for store in opened:
        store.close()


@pytest.fixture
def store(open_here: Callable[..., KeyStore], clock: Clock) -> KeyStore:
    return open_here(clock=clock)


@pytest.fixture
def cluster(redis_server, card: ModelCard) -> Iterator[Cluster]:
    """Replicas and workers of a Redis of their own."""
    with ExitStack() as ending:
        yield Cluster(redis_server, card, ending)
