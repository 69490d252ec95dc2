"""Large pools: inverted lists with an exact overlay of what changed, replaced while readers search."""

import threading
import time

import numpy as np
import pytest

from keystore import index_builder
from keystore.errors import NonFiniteQueries
from keystore.index import InvertedLists, KeyIndex
from keystore.index_builder import IndexBuilder
from keystore.large_index import MAX_CHANGED_SHARE
from keystore.records import ScopeId

TENANT = ScopeId("tenant", "default")
M, D, K = 4096, 32, 8


def clustered(rows: int = M, seed: int = 0, spread: float = 0.5) -> np.ndarray:
    """Keys as routers have them: in clusters, of similar length."""
    rng = np.random.default_rng(seed)
    centers = rng.standard_normal((64, D), dtype=np.float32)
    return centers[rng.integers(0, 64, rows)] + spread * rng.standard_normal((rows, D), dtype=np.float32)


def near(keys: np.ndarray, count: int, seed: int = 1) -> np.ndarray:
    rng = np.random.default_rng(seed)
    noise = 0.3 * rng.standard_normal((count, D), dtype=np.float32)
    return keys[rng.integers(0, len(keys), count)] + noise


def moved(keys: np.ndarray, rows: np.ndarray, seed: int, size: float = 0.3) -> np.ndarray:
    after = keys.copy()
    step = np.random.default_rng(seed).standard_normal((len(rows), D), dtype=np.float32)
    after[rows] += np.float32(size) * step
    return after


def recall(index, queries) -> float:
    wanted = KeyIndex(index.keys).search(queries, K)[1]
    found = index.search(queries, K)[1]
    return float(np.mean([np.isin(row, seen).mean() for row, seen in zip(wanted, found, strict=True)]))


def wait_until(condition, timeout_s: float = 20.0) -> None:
    deadline_s = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline_s
        time.sleep(0.005)


@pytest.fixture
def builder():
    made = IndexBuilder(exact_limit=1000)
    yield made
    made.close()


@pytest.fixture
def index(builder):
    """A large index whose lists are built."""
    made = builder.create({7: clustered()})[7]
    wait_until(lambda: made.overlay is not None)
    return made


def settled(builder) -> None:
    """Everything that was asked of the builder so far is done."""
    builder._thread.submit(lambda: None).result(timeout=20)


@pytest.fixture
def held_builds(monkeypatch):
    """Builds wait until this event is set."""
    release = threading.Event()

    class Held(InvertedLists):
        def __init__(self, *arguments) -> None:
            assert release.wait(20)
            super().__init__(*arguments)

    monkeypatch.setattr(index_builder, "InvertedLists", Held)
    yield release
    release.set()


def test_small_layers_stay_exact(builder) -> None:
    indexes = builder.create({1: clustered(1000), 2: clustered(1001)})
    assert isinstance(indexes[1], KeyIndex)
    assert not isinstance(indexes[2], KeyIndex)


def test_an_index_without_lists_is_exact(held_builds, builder) -> None:
    index, queries = builder.create({7: clustered()})[7], near(clustered(), 20)
    for mine, exact in zip(index.search(queries, K), KeyIndex(index.keys).search(queries, K), strict=True):
        np.testing.assert_array_equal(mine, exact)


def test_lists_find_what_the_exact_search_finds(index) -> None:
    assert index.overlay.base.probes < index.overlay.base.lists.count
    assert recall(index, near(index.keys, 200)) > 0.97


@pytest.mark.parametrize("changes", [0, 100])
def test_a_query_finds_the_same_bits_alone_and_in_any_batch(index, changes) -> None:
    rows = np.arange(0, changes * 7, 7)
    index, queries = index.derive(moved(index.keys, rows, 3)), near(index.keys, 70)
    scores, ids = index.search(queries, K)
    for batch in (1, 3, 8, 20, 69):
        some_scores, some_ids = index.search(queries[:batch], K)
        np.testing.assert_array_equal(some_scores.view(np.uint32), scores[:batch].view(np.uint32))
        np.testing.assert_array_equal(some_ids, ids[:batch])


@pytest.mark.parametrize("count", [1, 3, 40, 204])
def test_changed_rows_are_found_as_exactly_as_without_lists(index, count) -> None:
    for seed in range(5):
        rows = np.sort(np.random.default_rng(seed).choice(M, count, replace=False))
        after = index.derive(moved(index.keys, rows, seed, size=2.0))
        assert after.overlay.base is index.overlay.base
        queries = np.concatenate([near(after.keys, 40, seed), near(after.keys[rows], 40, seed)])
        scores, ids = after.search(queries, K)
        exact_scores, exact_ids = KeyIndex(after.keys).search(queries, K)
        for mine, exact in zip(ids, exact_ids, strict=True):
            wanted = exact[np.isin(exact, rows)]
            assert np.isin(wanted, mine).all()
        agree = ids == exact_ids
        np.testing.assert_array_equal(scores[agree], exact_scores[agree])
        np.testing.assert_allclose(
            scores, np.einsum("td,tkd->tk", queries, after.keys[ids]), rtol=1e-4, atol=1e-4
        )
        assert (np.diff(scores, axis=1) <= 0).all()


def test_a_row_is_never_found_where_it_was(index) -> None:
    queries = index.keys[:50].copy()
    after = index.derive(moved(index.keys, np.arange(50), 1, size=0))
    assert len(after.overlay.changed_ids) == 0, "the same bits are no change"
    away = index.keys.copy()
    away[:50] = -10 * away[:50]
    found = index.derive(away).search(queries, K)[1]
    assert not any(row in found[row] for row in range(50))


def test_recall_stays_high_over_many_updates(index, builder) -> None:
    rng = np.random.default_rng(0)
    for update in range(60):
        index = index.derive(moved(index.keys, rng.choice(M, 16, replace=False), update))
    settled(builder)
    index = index.derive(moved(index.keys, np.arange(1), 99))
    assert builder.builds()[7, "built"] > 1
    assert len(index.overlay.changed_ids) <= MAX_CHANGED_SHARE * M
    assert recall(index, near(index.keys, 200)) > 0.97


def test_too_many_changes_build_new_lists_for_the_newest_version_only(index, builder, held_builds) -> None:
    old = index.overlay.base
    builder._thread.submit(held_builds.wait)
    first = index.derive(moved(index.keys, np.arange(400), 1))
    second = first.derive(moved(first.keys, np.arange(400, 500), 2))
    assert first.overlay.base is second.overlay.base is old, "the overlay grows while lists are built"
    assert len(second.overlay.changed_ids) == 500
    held_builds.set()
    settled(builder)
    assert builder.builds() == {(7, "built"): 2, (7, "failed"): 0}
    assert second.overlay.base is not old
    assert len(second.overlay.changed_ids) == 0
    third = second.derive(moved(second.keys, np.arange(3), 3))
    assert third.overlay.base is second.overlay.base
    np.testing.assert_array_equal(third.overlay.changed_ids, [0, 1, 2])


def test_a_version_made_during_a_build_takes_over_its_lists_when_it_is_done(
    index, held_builds, builder
) -> None:
    first = index.derive(moved(index.keys, np.arange(400), 1))
    wait_until(lambda: not builder._thread._work_queue.qsize())
    second = first.derive(moved(first.keys, np.arange(400, 410), 2))
    held_builds.set()
    settled(builder)
    assert builder.builds()[7, "built"] == 2
    assert second.overlay.base is first.overlay.base
    np.testing.assert_array_equal(second.overlay.changed_ids, np.arange(400, 410))


def test_lists_of_a_version_that_nobody_holds_any_more_serve_the_next(index, held_builds, builder) -> None:
    first = index.derive(moved(index.keys, np.arange(400), 1))
    wait_until(lambda: not builder._thread._work_queue.qsize())
    second = first.derive(moved(first.keys, np.arange(400, 410), 2))
    del first
    held_builds.set()
    settled(builder)
    assert builder.builds()[7, "built"] == 2
    np.testing.assert_array_equal(second.overlay.changed_ids, np.arange(400, 410))


def test_a_scope_that_starts_from_the_anchors_shares_their_lists(index, builder) -> None:
    others = [index.derive(moved(index.keys, np.arange(n), n)) for n in (5, 9)]
    settled(builder)
    assert {id(each.overlay.base) for each in [index, *others]} == {id(index.overlay.base)}
    assert builder.builds()[7, "built"] == 1


def test_a_fall_of_sampled_recall_builds_new_lists(index, builder, monkeypatch) -> None:
    monkeypatch.setattr(index_builder, "SAMPLE_EVERY", 1)
    assert builder.recall() == {}
    random = np.random.default_rng(5).standard_normal((200, D), dtype=np.float32)  # unlike any key
    for query in random:
        index.search(query[None], K)
    settled(builder)
    assert builder.recall()[7] >= 0.98
    assert builder.builds()[7, "built"] == 2
    assert recall(index, random) > 0.97


def test_the_anchors_get_better_lists_too_while_others_have_moved_on(index, builder, monkeypatch) -> None:
    monkeypatch.setattr(index_builder, "SAMPLE_EVERY", 1)
    index.derive(moved(index.keys, np.arange(3), 1))
    random = np.random.default_rng(5).standard_normal((200, D), dtype=np.float32)
    before = recall(index, random)
    for query in random:
        index.search(query[None], K)
    settled(builder)
    assert before < 0.98 < recall(index, random)


def test_a_version_gets_better_lists_where_the_recall_fell_before_it_was_made(
    index, builder, monkeypatch
) -> None:
    monkeypatch.setattr(index_builder, "SAMPLE_EVERY", 1)
    release = threading.Event()
    builder._thread.submit(release.wait)
    first = index.derive(moved(index.keys, np.arange(3), 1))
    random = np.random.default_rng(5).standard_normal((64, D), dtype=np.float32)
    for query in random:
        first.search(query[None], K)
    second = first.derive(moved(first.keys, np.arange(3, 6), 2))
    release.set()
    settled(builder)
    assert recall(second, random) < 0.98
    third = second.derive(moved(second.keys, np.arange(6, 9), 3))
    settled(builder)
    assert recall(third, random) > 0.98


def test_a_query_that_is_refused_is_not_sampled(index, builder, monkeypatch) -> None:
    monkeypatch.setattr(index_builder, "SAMPLE_EVERY", 1)
    with pytest.raises(NonFiniteQueries):
        index.search(np.full((1, D), np.nan, np.float32), K)
    assert not builder._layers[7]._sample


def test_one_query_of_so_many_searches_is_sampled_and_huge_searches_are_not(index, builder) -> None:
    caretaker = builder._layers[7]
    for query in near(index.keys, 129):
        index.search(query[None], K)
        index.search(query[None], 100)
    assert 2 <= len(caretaker._sample) <= 5
    assert all(k == K for _, k in caretaker._sample)


def test_a_build_that_fails_is_counted_and_the_search_goes_on(builder, monkeypatch, caplog) -> None:
    def fail(*_) -> None:
        raise MemoryError("no room")

    monkeypatch.setattr(index_builder, "InvertedLists", fail)
    index = builder.create({7: clustered()})[7]
    settled(builder)
    assert builder.builds() == {(7, "built"): 0, (7, "failed"): 1}
    assert "key index not built" in caplog.text
    assert recall(index, near(index.keys, 20)) == 1


def test_closing_starts_no_more_builds(held_builds, builder) -> None:
    index = builder.create({7: clustered()})[7]
    builder.close()
    held_builds.set()
    builder._thread.shutdown(wait=True)
    assert index.overlay is None
    after = index.derive(moved(index.keys, np.arange(9), 1))
    assert recall(after, near(index.keys, 5)) == 1


def test_readers_see_whole_indexes_while_lists_are_built_and_replaced(index, builder) -> None:
    newest, done, problems, reads = [index], threading.Event(), [], [0, 0]

    def read(reader: int) -> None:
        rng = np.random.default_rng(reader)
        while not done.is_set():
            now = newest[0]
            queries = near(now.keys[:300], 4, int(rng.integers(1 << 30)))  # the rows that change
            overlay = now.overlay
            scores, ids = now.search(queries, K)
            # New lists hold the rows that changed before them: only those changed since are never missed.
            never_missed = set(overlay.changed_ids.tolist()) if overlay is not None else set(range(M))
            if now.overlay is not overlay:
                continue
            true = np.einsum("td,tkd->tk", queries, now.keys[ids])
            best = KeyIndex(now.keys).search(queries, 1)[1][:, 0]
            if not np.allclose(scores, true, rtol=1e-4, atol=1e-4) or len(set(ids[0].tolist())) != K:
                problems.append("wrong scores")
            if any(b in never_missed and b not in row for b, row in zip(best.tolist(), ids, strict=True)):
                problems.append("a changed row was missed")
            reads[reader] += 1

    readers = [threading.Thread(target=read, args=(reader,)) for reader in range(2)]
    for reader in readers:
        reader.start()
    for update in range(12):
        newest[0] = newest[0].derive(moved(newest[0].keys, np.arange(300), update, size=0.1))
        time.sleep(0.02)
    settled(builder)
    done.set()
    for reader in readers:
        reader.join()
    assert problems == []
    assert min(reads) > 10
    assert builder.builds()[7, "built"] > 2


@pytest.mark.parametrize("poison", [np.nan, np.inf, -np.inf, 3e38])
def test_a_query_that_is_not_finite_is_an_error(index, poison) -> None:
    queries = near(index.keys, 5)
    queries[-1] = poison
    with pytest.raises(NonFiniteQueries):
        index.derive(moved(index.keys * 100, np.arange(3), 1)).search(queries, 4)


def test_more_results_than_the_probed_lists_hold_are_found_exactly(index) -> None:
    scores, ids = index.search(near(index.keys, 3), M)
    assert (np.sort(ids, axis=1) == np.arange(M)).all()
    assert (np.diff(scores, axis=1) <= 0).all()


def test_a_store_with_a_large_layer_learns_restarts_and_counts(open_here, teach) -> None:
    store = open_here(exact_limit=10)  # the layers have 16 keys
    for seed in range(5):
        teach(store, seed)
    view = store.view(TENANT)
    queries = view.keys_of(3)[:2].copy()
    exact = KeyIndex(view.keys_of(3)).search(queries, 4)
    store = open_here(exact_limit=10)
    assert store.view(TENANT).checksum == view.checksum
    settled(store._index_builder)
    np.testing.assert_array_equal(store.view(TENANT).search(3, queries, 4)[1], exact[1])
    assert store.counters().index_builds[3, "built"] >= 1


@pytest.mark.parametrize("promoted", [False, True])
@pytest.mark.parametrize("added", [8, 64])
def test_experts_come_and_go_in_a_layer_that_has_lists(open_here, added, promoted) -> None:
    born = 512
    store = open_here(anchors={3: clustered(born)}, plastic_layers=[3], exact_limit=128)
    builder, other = store._index_builder, ScopeId("tenant", "other")
    settled(builder)
    new = 3 * clustered(added, seed=5)  # long, so that a search finds them where it can
    store.experts.add("extra", TENANT, {3: new}, "cafe")
    settled(builder)
    found = store.view(TENANT).search(3, new, K)[1]
    assert all(born + row in ids for row, ids in enumerate(found.tolist()))
    assert store.view(other).search(3, new, K)[1].max() < born
    if promoted:
        store.experts.promote("extra")
        settled(builder)
        assert all(born + row in ids for row, ids in enumerate(store.view(other).search(3, new, K)[1]))
    store.experts.retire("extra")
    queries = np.concatenate([new, near(clustered(born), 64)])
    for _ in range(2):  # before and after lists are built for the rows that are left
        for scope in (TENANT, other, ScopeId("tenant", "unknown")):
            view = store.view(scope)
            scores, ids = view.search(3, queries, K)
            assert 0 <= ids.min() <= ids.max() < born
            np.testing.assert_array_equal(view.score(3, queries, ids), scores)
            wanted = KeyIndex(view.keys_of(3)[:born]).search(queries, K)[1]
            assert np.mean([np.isin(row, seen) for row, seen in zip(wanted, ids, strict=True)]) > 0.9
        settled(builder)
