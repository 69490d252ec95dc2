"""Redis goes away, comes back, loses its newest data, or its answer is lost: what is acknowledged is there, once."""

import select
import signal
import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import closing, suppress
from uuid import UUID

import numpy as np
import pytest

from keystore.backends.base import RowChanges, VersionRecord, VersionRow
from keystore.backends.redis import RedisBackend
from keystore.backends.redis_client import RedisClient, RedisSettings
from keystore.backends.redis_journal import Position
from keystore.backends.redis_lease import Leases
from keystore.backends.redis_leased import LeasedBackend
from keystore.backends.redis_seal import Seal
from keystore.backends.redis_streams import DeltaStream, StatsStream
from keystore.backends.stats_blob import SentWindow
from keystore.errors import (
    Fenced,
    InvalidConfig,
    StoreUnavailable,
    VersionConflict,
)
from keystore.records import ScopeId

TENANT = ScopeId("tenant", "default")


def record(version: int, value: float = 1.0) -> VersionRecord:
    row = VersionRow(TENANT, version, version - 1, 1e6, 32 * version, 0.5, 0.1, f"{value}", "learned", 0)
    rows = RowChanges(np.array([1]), np.full((1, 8), value, np.float32))
    return VersionRecord(row, version == 1, {3: rows}, {3: np.ones(16, np.float32)})


class Proxy:
    """Stands between a client and the server, and may lose one EXEC (or other `command`) or its answer.

    "request": the command never arrives. "answer": it is carried out, and the client hears nothing. "delay": as
    "request", but it arrives when `let_through` is called. With `then_gone` nobody gets through afterwards.
    """

    def __init__(self, port: int) -> None:
        self.server_port, self.lose, self.then_gone = port, "", False
        self.command = b"EXEC"
        self.on_loss: Callable[[], object] = lambda: None
        self.delayed: list[tuple[socket.socket, bytes]] = []
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.url = f"redis://127.0.0.1:{self._listener.getsockname()[1]}/0"
        self._threads = [threading.Thread(target=self._accept)]
        self._threads[0].start()

    def let_through(self) -> list[bytes]:
        """The server's answers to what was delayed."""
        answers: list[bytes] = []
        for server, request in self.delayed:
            server.sendall(request)
            answers.append(server.recv(65_536))
            server.close()
        return answers

    def close(self) -> None:
        self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        for thread in self._threads:
            thread.join()

    def _accept(self) -> None:
        with suppress(OSError):
            while True:
                client, _ = self._listener.accept()
                self._threads.append(threading.Thread(target=self._serve, args=(client,)))
                self._threads[-1].start()

    def _serve(self, client: socket.socket) -> None:
        server, lost = socket.create_connection(("127.0.0.1", self.server_port)), ""
        with client:
            while not self._is_gone(lost):
                ready, _, _ = select.select([client, server], [], [])
                data = ready[0].recv(1 << 20)
                if not data or self._is_gone(lost):
                    break
                if ready[0] is server:
                    if lost:
                        self.on_loss()
                        break
                    client.sendall(data)
                    continue
                if self.lose and self.command in data:
                    lost, self.lose = self.lose, ""
                if lost == "delay":
                    self.delayed.append((server, data))
                if lost in ("request", "delay"):
                    break
                server.sendall(data)
            if lost != "delay":
                server.close()

    def _is_gone(self, lost: str) -> bool:
        return self.then_gone and not self.lose and not lost


@pytest.fixture
def proxy(redis_server) -> Iterator[Proxy]:
    proxy = Proxy(redis_server.port)
    yield proxy
    proxy.close()


@pytest.fixture
def behind_proxy(proxy, card) -> Iterator[RedisBackend]:
    with closing(RedisClient(RedisSettings(proxy.url, timeout_s=30.0))) as client:
        yield RedisBackend(client, card.names)


@pytest.mark.parametrize("lost", ["request", "answer"])
def test_a_commit_whose_answer_is_lost_happens_once(behind_proxy, proxy, lost) -> None:
    behind_proxy.commit([record(1)])
    proxy.lose = lost
    behind_proxy.commit([record(2)])
    assert proxy.lose == "", "or nothing was lost"
    behind_proxy.commit([record(3)])
    assert [row.version for row in behind_proxy.versions(TENANT)] == [3, 2, 1]
    assert behind_proxy.verify_audit() == 3


def test_a_commit_that_arrives_late_finds_that_it_was_made_again(behind_proxy, proxy) -> None:
    proxy.lose = "delay"
    behind_proxy.commit([record(1)])
    (answer,) = proxy.let_through()
    assert answer.endswith(b"*-1\r\n"), "EXEC was refused: what it had read has changed"
    assert behind_proxy.verify_audit() == 1


def test_who_cannot_learn_whether_a_commit_happened_is_told_so(
    behind_proxy, proxy, redis_client, card
) -> None:
    behind_proxy.commit([record(1)])
    proxy.lose, proxy.then_gone = "answer", True
    with pytest.raises(StoreUnavailable):
        behind_proxy.commit([record(2)])
    proxy.then_gone = False
    assert behind_proxy.heads()[0].version == 2, "this time it had"
    with pytest.raises(VersionConflict):
        behind_proxy.commit([record(2)])


def test_a_commit_that_had_happened_is_not_fenced_afterwards(behind_proxy, proxy, redis_client, card) -> None:
    lease = Leases(redis_client, card.names, "first", ttl_ms=600_000).take(0)
    backend = LeasedBackend(behind_proxy._client, card.names, lease, seal=Seal(), shards=8)
    proxy.lose, proxy.on_loss = "answer", lambda: redis_client.call("PEXPIRE", card.names.lease(0), 0)
    backend.commit([record(1)])
    assert backend.verify_audit() == 1
    with pytest.raises(Fenced):
        backend.commit([record(2)])


@pytest.mark.parametrize(("lost", "arrived"), [("request", 1), ("answer", 2)])
def test_a_send_whose_answer_is_lost_is_never_repeated_unasked(
    behind_proxy, proxy, card, window, lost, arrived
) -> None:
    stream = StatsStream(behind_proxy._client, card.names, Seal())
    entry = stream.entry(0, SentWindow(UUID(int=1), 1, window()))
    proxy.lose, proxy.command = lost, b"XADD"
    with pytest.raises(StoreUnavailable):
        stream.send(0, entry)
    stream.send(0, entry)
    assert stream.pending(0) == arrived, "who sends the same bytes again leaves it to the watermark"
    sequences = [
        each.window.sequence for each in stream.read(0, b"0", {3: (16, 8), 5: (16, 8)}, bonding=False)
    ]
    assert sequences == [1] * arrived


@pytest.mark.parametrize("lost", ["request", "answer"])
def test_a_renewal_whose_answer_is_lost_does_not_lose_the_lease(behind_proxy, proxy, card, lost) -> None:
    leases = Leases(behind_proxy._client, card.names, "first", ttl_ms=600_000)
    lease = leases.take(0)
    proxy.lose = lost
    leases.renew(lease)
    assert proxy.lose == "", "or nothing was lost"
    LeasedBackend(behind_proxy._client, card.names, lease, seal=Seal(), shards=8).commit([record(1)])


def test_what_was_acknowledged_survives_a_crash_of_redis(redis_server, redis_client, card) -> None:
    backend = RedisBackend(redis_client, card.names)
    for version in range(1, 21):
        backend.commit([record(version)])
        if version % 5 == 0:
            redis_server.restart(signal.SIGKILL)
    assert [row.version for row in backend.versions(TENANT)] == list(range(20, 0, -1))
    assert backend.verify_audit() == 20


def test_without_redis_everything_says_so_and_goes_on_when_it_is_back(
    redis_server, redis_client, card
) -> None:
    backend, deltas = RedisBackend(redis_client, card.names), DeltaStream(redis_client, card.names, Seal())
    backend.commit([record(1)])
    redis_server.stop()
    calls: list[Callable[[], object]] = [
        backend.heads,
        deltas.position,
        lambda: deltas.read(Position()),
        lambda: backend.load(TENANT, 1),
        lambda: backend.commit([record(2)]),
        lambda: backend.adopt_model("tiny", "anchors"),
        lambda: backend.thin(TENANT, 1),
    ]
    for call in calls:
        with pytest.raises(StoreUnavailable):
            call()
    redis_server.start()
    backend.commit([record(2)])
    assert backend.heads()[0].version == 2


def test_a_redis_that_hangs_is_unavailable(redis_server, redis_client, card) -> None:
    RedisBackend(redis_client, card.names).commit([record(1)])
    with closing(redis_server.client(timeout_s=0.1)) as client:
        backend = RedisBackend(client, card.names)
        redis_server.send_signal(signal.SIGSTOP)
        with pytest.raises(StoreUnavailable):
            backend.heads()
        redis_server.send_signal(signal.SIGCONT)
        while True:
            with suppress(StoreUnavailable):
                assert backend.heads()[0].version == 1
                break


def test_a_full_redis_is_unavailable_and_has_nothing_of_the_commit(redis_client, card) -> None:
    backend = RedisBackend(redis_client, card.names)
    backend.commit([record(1)])
    redis_client.call("CONFIG", "SET", "maxmemory", "1")
    with pytest.raises(StoreUnavailable, match="memory"):
        backend.commit([record(2)])
    redis_client.call("CONFIG", "SET", "maxmemory", "0")
    assert (backend.heads()[0].version, backend.verify_audit()) == (1, 1)
    backend.commit([record(2)])


def test_a_store_has_one_number_of_shards(redis_client, card) -> None:
    RedisBackend(redis_client, card.names, shards=4).adopt_model("tiny", "anchors")
    with pytest.raises(InvalidConfig, match="shards is '8'; allowed: 4"):
        RedisBackend(redis_client, card.names, shards=8).adopt_model("tiny", "anchors")
