"""What becomes of the session used longest ago, above the cap."""

import pytest

from keystore.errors import KeyVersionUnavailable
from keystore.records import ScopeId

TENANT = ScopeId("tenant", "default")
SESSIONS = [ScopeId("session", "default", name) for name in "abcd"]
A, B, C, D = SESSIONS


def test_with_discard_it_is_deleted_durably_and_its_numbers_are_not_used_again(open_here, teach) -> None:
    store = open_here(max_sessions=2, session_eviction="discard")
    for seed, session in enumerate((A, A, B, C)):
        teach(store, seed, session)
    assert store.scopes() == [B, C]
    assert store.view(A).version == 0, "its tenant's"
    with pytest.raises(KeyVersionUnavailable):
        store.view(A, 1)
    store = open_here(max_sessions=2, session_eviction="discard")
    assert store.scopes() == [B, C]
    teach(store, 9, A)
    assert store.view(A).version == 3, "versions 1 and 2 belonged to the discarded session"
    store.verify_audit()


def test_reading_a_session_is_using_it(open_here, teach) -> None:
    store = open_here(max_sessions=2, session_eviction="discard")
    teach(store, 0, A)
    teach(store, 1, B)
    store.view(A)
    teach(store, 2, C)
    assert store.scopes() == [A, C]


def test_one_tenants_many_sessions_push_no_other_tenants_out(open_here, teach) -> None:
    store = open_here(max_sessions=3, session_eviction="discard")
    theirs = [ScopeId("session", "other", name) for name in "wxyz"]
    for seed, session in enumerate((A, B, *theirs)):
        teach(store, seed, session)
    assert store.scopes() == [B, *theirs[2:]], "of equally many the one used longest ago"


def test_a_store_that_saved_more_before_comes_down_to_the_cap(open_here, teach) -> None:
    store = open_here(max_sessions=2)
    for seed, session in enumerate(SESSIONS):
        teach(store, seed, session)
    assert store.scopes() == SESSIONS, "saved"
    store = open_here(max_sessions=2, session_eviction="discard")
    teach(store, 7, A)
    assert store.scopes() == [A, D]


def test_who_holds_something_of_a_session_hears_of_its_end(open_here, clock, teach, window) -> None:
    store = open_here(clock=clock, max_sessions=1, session_eviction="discard", session_ttl_s=100)
    gone: list[ScopeId] = []
    end = store.news.deleted.add(gone.append)
    teach(store, 0, A)
    teach(store, 1, TENANT)
    assert gone == []
    teach(store, 2, B)
    assert gone == [A]
    clock.now_s += 200
    store.learning.expire_sessions(clock.now_s)
    assert gone == [A, B]
    end()
    teach(store, 3, C)
    teach(store, 4, D)
    assert gone == [A, B]


def test_windows_that_wait_for_a_session_go_with_it(open_here, clock, teach, window) -> None:
    store = open_here(clock=clock, session_ttl_s=100)
    teach(store, 0, A)
    clock.now_s += 200
    store.submit(window(A, 1))
    store.submit(window(TENANT, 2))
    store.learning.expire_sessions(clock.now_s)
    assert [each.scope for each in store.consolidate_once()] == [TENANT]
    assert store.counters().dropped["superseded"] == 1


def test_whoever_waits_for_a_window_is_told_when_it_is_through(open_here, window) -> None:
    store = open_here()
    told: list[int] = []
    assert store.submit(window(A, 0), lambda: told.append(store.view(A).version))
    assert store.submit(window(B, 1), lambda: told.append(store.view(B).version))
    assert told == []
    store.rollback(B, 0)
    assert told == [1], "dropped by the rollback, after which version 1 is served"
    store.consolidate_once()
    assert told == [1, 1], "published before it is told"
    store.submit(window(A, 2), lambda: told.append(-1))
    store.freeze(A)
    store.consolidate_once()
    assert told == [1, 1, -1]
