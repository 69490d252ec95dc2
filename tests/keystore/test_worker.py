import threading
import time

import pytest

from keystore.records import ScopeId
from keystore.worker import ConsolidationWorker

TENANT = ScopeId("tenant", "default")


def wait_until(condition, timeout_s: float = 30.0) -> None:
    deadline_s = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline_s
        time.sleep(0.005)


@pytest.fixture
def failing_commits(store, monkeypatch) -> list[Exception]:
    """Commits raise what is in this list, until it is empty."""
    errors: list[Exception] = []
    commit = store._backend.commit

    def commit_or_fail(records, **beside) -> None:
        if errors:
            raise errors.pop(0)
        commit(records, **beside)

    monkeypatch.setattr(store._backend, "commit", commit_or_fail)
    return errors


def test_the_worker_wakes_for_a_window_and_stops_at_once(store, clock, window) -> None:
    worker = ConsolidationWorker(store, clock, expiry_interval_s=1000)
    worker.start()
    store.submit(window())
    wait_until(lambda: store.view(TENANT).version == 1)
    worker.stop()  # had it gone on sleeping, for a thousand seconds
    assert not any(thread.name == "consolidation" for thread in threading.enumerate())


def test_stop_flushes_what_waits(store, clock, window) -> None:
    worker = ConsolidationWorker(store, clock)
    store.submit(window())
    worker.stop(flush=False)
    assert store.view(TENANT).version == 0
    worker.stop()
    assert store.view(TENANT).version == 1


def test_a_failed_commit_is_seen_retried_and_loses_no_window(
    store, clock, window, failing_commits, caplog
) -> None:
    failing_commits += [OSError("disk full"), OSError("disk full")]
    worker = ConsolidationWorker(store, clock)
    store.submit(window(seed=1))
    store.submit(window(seed=2))
    assert worker.run_once() == []
    assert store.degraded
    assert str(store.last_error) == "disk full"
    assert store.view(TENANT).version == 0
    assert store.counters().waiting_windows == 2
    worker.start()
    wait_until(lambda: store.view(TENANT).version == 2)
    worker.stop()
    assert not store.degraded
    assert store.counters().updates == {
        "published": 2,
        "unchanged": 0,
        "rejected": 0,
        "guard_rejected": 0,
        "failed": 2,
    }
    assert "consolidation failed" in caplog.text


def test_the_worker_expires_sessions_when_due(open_here, clock, teach) -> None:
    store = open_here(clock=clock, session_ttl_s=50)
    session = ScopeId("session", "default", "abc")
    teach(store, 1, session)
    worker = ConsolidationWorker(store, clock, expiry_interval_s=60)
    clock.now_s += 59
    worker.run_once()
    assert store.scopes() == [session]
    clock.now_s += 2
    worker.run_once()
    assert store.scopes() == []
