"""Any order of teaching, sending, losing, repeating, learning and crashing leaves what learning in sequence would.

Hypothesis invents the histories. The model is the law alone, applied to every window once, in the order of arrival;
both backends must end with its keys, its usage and its token counts, bit for bit.
"""

import hashlib
from collections import defaultdict, deque
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import closing, contextmanager, suppress
from itertools import count
from pathlib import Path
from signal import SIGKILL
from uuid import UUID

import apsw
import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, precondition, rule, run_state_machine_as_test
from redis_server import RedisServer, running

from keystore.backends.embedded import EmbeddedBackend
from keystore.backends.redis import RedisBackend
from keystore.backends.redis_client import RedisClient, RedisSettings, Transaction
from keystore.backends.redis_lease import Leases
from keystore.backends.redis_leased import LeasedBackend
from keystore.backends.redis_model import ModelCard
from keystore.backends.redis_names import GLOBAL_SHARD, shard_of
from keystore.backends.redis_seal import Seal
from keystore.backends.redis_streams import StatsStream
from keystore.backends.redis_use import SessionUse
from keystore.backends.stats_blob import SentWindow
from keystore.errors import Fenced, StoreUnavailable
from keystore.index_builder import IndexBuilder
from keystore.learner_counters import LearnerCounters
from keystore.learning import Learner, Progress, create_origin
from keystore.pool import ExpertPool
from keystore.records import GravityConfig, ScopeId
from keystore.session_ends import SessionEnds, SessionLimits
from keystore.shard_learner import ShardLearner
from keystore.shelf import ShelfLimits
from keystore.statistics import RoutingStats
from keystore.store import KeyStore

SHARDS, PRODUCERS = 2, 3
ALL_SHARDS = (*range(SHARDS), GLOBAL_SHARD)
SCOPES = [ScopeId("tenant", name) for name in "abc"] + [ScopeId("global")]
GRAVITY = GravityConfig(warmup_tokens=64)  # dark energy takes part
FAILURES = st.tuples(
    st.integers(0, 9), st.sampled_from(["before", "after"])
)  # of which step, on which side of it

State = dict[ScopeId, tuple[int, str]]  # tokens, hash of keys and usage


class SequentialModel:
    """The law, applied to one window after the other in memory."""

    def __init__(self, card: ModelCard) -> None:
        with closing(IndexBuilder(2**62)) as builder:
            self.origin = create_origin(
                card.model_id, card.anchors, GRAVITY, card.plastic_layers, builder, 0.0
            )
        pool = ExpertPool.born(self.origin.keys, self.origin.usage)
        self._learner = Learner(pool, GRAVITY, card.num_experts_per_tok)

    def after(self, windows: Sequence[RoutingStats]) -> State:
        start = Progress(self.origin, self.origin.usage, 0)
        reached: dict[ScopeId, Progress] = {}
        for version, stats in enumerate(windows, start=1):
            before = reached.get(stats.scope, start)
            reached[stats.scope] = self._learner.advance(before, stats, version, 0.0)
        return {
            scope: (each.tokens, hash_of(each.snapshot.keys, each.usage)) for scope, each in reached.items()
        }


def hash_of(keys, usage) -> str:
    digest = hashlib.sha256()
    for layer in sorted(keys):
        digest.update(keys[layer].tobytes())
    for layer in sorted(usage):
        digest.update(usage[layer].tobytes())
    return digest.hexdigest()


def state_of(store: KeyStore) -> State:
    views = [store.view(scope) for scope in store.scopes()]
    return {view.scope: (view.tokens, hash_of(view.keys, view.usage)) for view in views}


class Steps:
    """Counts the steps towards a failure, once armed."""

    def __init__(self) -> None:
        self._left: int | None = None
        self._side = ""

    @contextmanager
    def armed(self, failure: tuple[int, str]) -> Generator[None]:
        self._left, self._side = failure
        try:
            yield
        finally:
            self._left = None

    def take(self, act: Callable[[], object]) -> object:
        if self._left is None:
            return act()
        self._left -= 1
        if self._left == -1 and self._side == "before":
            raise StoreUnavailable("a step failed")
        done = act()
        if self._left == -1:
            raise StoreUnavailable("a step's answer was lost")
        return done


class FaultyClient(RedisClient):
    """Every command and every transaction is a step."""

    def __init__(self, settings: RedisSettings) -> None:
        super().__init__(settings)
        self.steps = Steps()

    def call(self, *words):
        return self.steps.take(lambda: RedisClient.call(self, *words))

    def batch(self, commands, *, atomic=False):
        return self.steps.take(lambda: RedisClient.batch(self, commands, atomic=atomic))

    @contextmanager
    def transaction(self, *names):
        with super().transaction(*names) as transaction:
            yield FaultyTransaction(transaction, self.steps)


class FaultyTransaction(Transaction):
    def __init__(self, inner: Transaction, steps: Steps) -> None:
        super().__init__(inner._pipe)
        self._steps = steps

    def run(self):
        return self._steps.take(lambda: Transaction.run(self))


class OnRedis(RuleBasedStateMachine):
    """Producers send to one Redis, one worker a shard learns; workers that died may wake up again."""

    numbers = count()

    def __init__(self, server: RedisServer, card: ModelCard, window, store_on) -> None:
        super().__init__()
        self.server, self.window, self.store_on = server, window, store_on
        self.card = ModelCard(
            f"some-{next(self.numbers)}",
            card.model_id,
            card.num_experts_per_tok,
            card.plastic_layers,
            card.anchors,
        )
        self.names, self.model = self.card.names, SequentialModel(card)
        self.client = FaultyClient(RedisSettings(server.url, timeout_s=30.0))
        self.stream = StatsStream(self.client, self.names, Seal())
        backend = RedisBackend(self.client, self.names, card=self.card, shards=SHARDS)
        backend.adopt_model(card.model_id, self.model.origin.checksum)
        self.outboxes: dict[tuple[int, int], deque[tuple[bytes, RoutingStats]]] = defaultdict(deque)
        self.made: dict[tuple[int, int], int] = defaultdict(int)
        self.arrived: list[RoutingStats] = []
        self.delivered: dict[int, list[bytes]] = defaultdict(list)
        self.seen: set[bytes] = set()
        self.restarts = 0
        self.asleep: list[tuple[int, ShardLearner]] = []
        self.workers = {shard: self._start_worker(shard) for shard in ALL_SHARDS}

    def teardown(self) -> None:
        for producer, shard in list(self.outboxes):
            while self.outboxes[producer, shard]:
                self.send(producer, shard, "nothing")
        self._learn_everything()
        self._compare()
        self.client.close()

    @rule(
        producer=st.integers(0, PRODUCERS - 1),
        scope=st.sampled_from(SCOPES),
        seed=st.integers(0, 2**32 - 1),
        lost=st.sampled_from(["nothing", "request", "answer"]),
    )
    def teach(self, producer: int, scope: ScopeId, seed: int, lost: str) -> None:
        shard, stats = shard_of(scope, SHARDS), self.window(scope, seed, tokens=16)
        self.made[producer, shard] += 1
        sent = SentWindow(UUID(int=producer + 1), self.made[producer, shard], stats)
        self.outboxes[producer, shard].append((self.stream.entry(shard, sent), stats))
        self.send(producer, shard, lost)

    @rule(
        producer=st.integers(0, PRODUCERS - 1),
        shard=st.sampled_from(ALL_SHARDS),
        lost=st.sampled_from(["nothing", "answer"]),
    )
    def send(self, producer: int, shard: int, lost: str) -> None:
        outbox = self.outboxes[producer, shard]
        if not outbox or lost == "request":
            return
        entry, stats = outbox[0]
        self.stream.send(shard, entry)
        if entry not in self.seen:
            self.seen.add(entry)
            self.arrived.append(stats)
            self.delivered[shard].append(entry)
        if lost == "nothing":
            outbox.popleft()

    @rule(shard=st.sampled_from(ALL_SHARDS), data=st.data())
    def send_again_what_arrived_long_ago(self, shard: int, data: st.DataObject) -> None:
        if self.delivered[shard]:
            self.stream.send(shard, data.draw(st.sampled_from(self.delivered[shard])))

    @rule(shard=st.sampled_from(ALL_SHARDS))
    def learn(self, shard: int) -> None:
        self.workers[shard].learn_some()

    @rule(shard=st.sampled_from(ALL_SHARDS), failure=FAILURES, dies=st.booleans())
    def fail_while_learning(self, shard: int, failure: tuple[int, str], dies: bool) -> None:
        with self.client.steps.armed(failure), suppress(StoreUnavailable):
            self.workers[shard].learn_some()
        if dies:
            self.crash(shard)

    @rule(shard=st.sampled_from(ALL_SHARDS))
    def crash(self, shard: int) -> None:
        self.asleep.append((shard, self.workers[shard]))
        self.client.call("DEL", self.names.lease(shard))  # its time is up
        self.workers[shard] = self._start_worker(shard)

    @precondition(lambda self: self.asleep)
    @rule(data=st.data())
    def a_worker_wakes_past_its_lease(self, data: st.DataObject) -> None:
        shard, late = data.draw(st.sampled_from(self.asleep))
        self.send_again_what_arrived_long_ago(shard, data)
        before = [self.client.call("HGETALL", self.names.tip), self.stream.pending(shard)]
        with suppress(Fenced):
            assert late.learn_some() == 0
        assert [self.client.call("HGETALL", self.names.tip), self.stream.pending(shard)] == before

    @precondition(lambda self: self.restarts < 2)
    @rule()
    def restart_redis(self) -> None:
        self.restarts += 1
        self.server.restart(SIGKILL)

    @rule()
    def compare_once_all_is_learned(self) -> None:
        self._learn_everything()
        self._compare()

    def _learn_everything(self) -> None:
        for shard, worker in self.workers.items():
            while self.stream.pending(shard):
                worker.learn_some()

    def _compare(self) -> None:
        store = self.store_on(RedisBackend(self.client, self.names, card=self.card, shards=SHARDS), GRAVITY)
        with closing(store):
            assert state_of(store) == self.model.after(self.arrived)

    def _start_worker(self, shard: int) -> ShardLearner:
        lease = Leases(self.client, self.names, f"worker {next(self.numbers)}", ttl_ms=600_000).take(shard)
        assert lease is not None
        use = SessionUse(self.client, self.names)
        return ShardLearner(
            shard,
            LeasedBackend(self.client, self.names, lease, seal=Seal(), shards=SHARDS),
            self.stream,
            self.model.origin,
            GRAVITY,
            self.card.num_experts_per_tok,
            LearnerCounters(),
            ends=SessionEnds(use, shard, SHARDS, SessionLimits(86_400.0, most=None)),
            limits=ShelfLimits(1, 16),
            versions_on_disk=8,
        )


class OnFile(RuleBasedStateMachine):
    """One process with its file: what waits is lost with the process, what was committed never is."""

    numbers = count()

    def __init__(self, folder: Path, card: ModelCard, window, store_on) -> None:
        super().__init__()
        self.path = folder / f"keys-{next(self.numbers)}.sqlite3"
        self.window, self.store_on, self.model = window, store_on, SequentialModel(card)
        self.learned: list[RoutingStats] = []
        self.waiting: list[RoutingStats] = []
        self.steps = Steps()
        self._open()

    def teardown(self) -> None:
        self.learn()
        self.crash()
        self.store.close()

    @rule(scope=st.sampled_from(SCOPES), seed=st.integers(0, 2**32 - 1))
    def teach(self, scope: ScopeId, seed: int) -> None:
        stats = self.window(scope, seed, tokens=16)
        assert self.store.submit(stats)
        self.waiting.append(stats)

    @rule()
    def learn(self) -> None:
        self.store.consolidate_once()
        self.learned, self.waiting = [*self.learned, *self.waiting], []
        self._compare()

    @rule(failure=st.integers(0, 20), dies=st.booleans())
    def fail_while_learning(self, failure: int, dies: bool) -> None:
        with self.steps.armed((failure, "before")):
            try:
                self.store.consolidate_once()
            except StoreUnavailable:
                pass
            else:
                self.learned, self.waiting = [*self.learned, *self.waiting], []
        if dies:
            self.crash()

    @rule()
    def crash(self) -> None:
        self.store.close()
        self.waiting = []
        self._open()
        self._compare()

    def _open(self) -> None:
        backend = EmbeddedBackend(self.path)
        self.store = self.store_on(backend, GRAVITY)

        def trace(cursor: apsw.Cursor, statement: str, bindings: object) -> bool:
            if not statement.startswith("ROLLBACK"):
                self.steps.take(lambda: None)
            return True

        backend._writer.exec_trace = trace

    def _compare(self) -> None:
        assert state_of(self.store) == self.model.after(self.learned)


@pytest.fixture(scope="module")
def lasting_server(tmp_path_factory) -> Iterator[RedisServer]:
    """One server for many histories. It may be killed but the machine stays up, so nothing needs to be synced."""
    with running(tmp_path_factory.mktemp("redis"), "appendfsync no") as server:
        yield server


def explore(machine: Callable[[], RuleBasedStateMachine], examples: int) -> None:
    limits = settings(
        max_examples=examples,
        stateful_step_count=30,
        deadline=None,
        suppress_health_check=list(HealthCheck),
        print_blob=True,
    )
    run_state_machine_as_test(machine, settings=limits)


@pytest.mark.parametrize("examples", [20, pytest.param(200, marks=pytest.mark.slow)])
def test_histories_on_redis_end_where_the_sequential_model_does(
    lasting_server, card, window, store_on, examples
) -> None:
    explore(lambda: OnRedis(lasting_server, card, window, store_on), examples)


@pytest.mark.parametrize("examples", [20, pytest.param(200, marks=pytest.mark.slow)])
def test_histories_on_a_file_end_where_the_sequential_model_does(
    tmp_path, card, window, store_on, examples
) -> None:
    explore(lambda: OnFile(tmp_path, card, window, store_on), examples)
