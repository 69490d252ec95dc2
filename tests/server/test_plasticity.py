"""From traces to windows: counted in tokens, the same however the tokens came."""

import threading
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from keystore.backends.embedded import EmbeddedBackend
from keystore.records import GravityConfig, ScopeId
from keystore.store import KeyStore
from model.blocks.base import RoutingTrace
from model.credit import loss_gradient
from server.crediting import LayerRows, direct_gradient, plain_rows
from server.engine.sequence import Lesson
from server.plasticity import Teacher
from server.prompt_windows import PromptWindows

TENANT = ScopeId("tenant", "default")
TOKENS = [(7 * i * i + 3 * i) % 97 for i in range(81)]


class Reader:
    """Stands where a sequence does: whose chunks belong together."""


class Recorder:
    """Stands where the key store does and keeps what it is given."""

    def __init__(self, store):
        self._store = store
        self.news, self.experts = store.news, store.experts
        self.windows = []
        self.dropped = []

    def view(self, scope, version=None):
        return self._store.view(scope, version)

    def submit(self, stats, done=None):
        self.windows.append(stats)
        return True

    def count_dropped(self, reason):
        self.dropped.append(reason)


@pytest.fixture
def store(tiny, tmp_path):
    anchors = {layer: block.anchors.numpy() for layer, block in tiny.blocks.items()}
    store = KeyStore(
        "tiny",
        anchors,
        GravityConfig(),
        EmbeddedBackend(tmp_path / "keys.sqlite3"),
        num_experts_per_tok=2,
        plastic_layers=[1, 2],
    )
    yield store
    store.close()


def lessons(tiny, chunks):
    """The text read in chunks of the given sizes, each a lesson."""
    segment, reader = tiny.segment(TOKENS), Reader()
    at = 0
    for size in chunks:
        trace = RoutingTrace(frozenset({1, 2}))
        hidden = tiny.model.step([replace(segment, token_ids=TOKENS[at : at + size], start=at, trace=trace)])
        targets = torch.tensor(TOKENS[at + 1 : at + 1 + size])
        yield Lesson(reader, tiny.keys, trace, at, hidden[: len(targets)], targets)
        at += size


def test_lessons_of_a_step_and_an_endpoint_share_one_pass_through_the_head(tiny, monkeypatch):
    alone = [direct_gradient(tiny.model, lesson) for lesson in lessons(tiny, (30, 1, 20))]
    together = tuple(lessons(tiny, (30, 1, 20)))
    for lesson, endpoint in zip(together, ("some", "other", "some"), strict=True):
        lesson.sequence, lesson.beside = SimpleNamespace(endpoint=endpoint), together
    passes = []

    def counted(model, hidden, targets):
        passes.append(len(hidden))
        return loss_gradient(model, hidden, targets)

    monkeypatch.setattr("server.crediting.loss_gradient", counted)
    for lesson, gradient in zip(together, alone, strict=True):
        assert torch.allclose(direct_gradient(tiny.model, lesson), gradient, atol=1e-6)
    assert passes == [50, 1]
    assert all(lesson.beside == () for lesson in together), (
        "they would keep each other, and their keys, in memory"
    )


def windows_of(tiny, store, chunks, **config):
    recorder = Recorder(store)
    teacher = Teacher(
        tiny.model, recorder, GravityConfig(window_tokens=32, **config), tiny.blocks, frozenset({1, 2})
    )
    for lesson in lessons(tiny, chunks):
        teacher.take(TENANT, lesson)
    if teacher.background is not None:
        teacher.background.drain(30)
    return recorder, teacher


@pytest.mark.parametrize("rule", ["direct", "literal"])
def test_windows_do_not_depend_on_how_the_prompt_was_chunked(tiny, store, rule):
    whole, _ = windows_of(tiny, store, [80], rule=rule)
    pieces, _ = windows_of(tiny, store, [3, 29, 1, 40, 7], rule=rule)
    assert [w.tokens for w in whole.windows] == [w.tokens for w in pieces.windows] == [32, 32]
    for one, other in zip(whole.windows, pieces.windows, strict=True):
        for layer in (1, 2):
            assert np.array_equal(one.layers[layer].events, other.layers[layer].events)
            np.testing.assert_allclose(
                one.layers[layer].weighted_queries, other.layers[layer].weighted_queries, atol=1e-3
            )


def test_what_does_not_fill_a_window_waits_for_the_flush(tiny, store):
    recorder, teacher = windows_of(tiny, store, [80])
    assert len(recorder.windows) == 2
    teacher.flush()
    assert [w.tokens for w in recorder.windows] == [32, 32, 16]
    teacher.flush()
    assert len(recorder.windows) == 3


def test_a_discarded_window_never_teaches(tiny, store):
    recorder, teacher = windows_of(tiny, store, [80])
    teacher.discard(TENANT)
    teacher.flush()
    assert [w.tokens for w in recorder.windows] == [32, 32]


@pytest.mark.parametrize(("way", "to"), [("reset", ()), ("rollback", (0,))])
def test_what_was_read_with_replaced_keys_never_teaches(tiny, store, way, to):
    recorder, teacher = windows_of(tiny, store, [80], rule="gradient")
    begun = teacher.lesson_taker(TENANT)
    held = threading.Event()
    teacher.background.put(held.wait, 1)
    queued, late = lessons(tiny, [40, 40])
    begun(queued)
    getattr(store, way)(TENANT, *to)
    begun(late)
    held.set()
    teacher.flush()
    assert [w.tokens for w in recorder.windows] == [32, 32]
    assert recorder.dropped == ["superseded"] * 2
    for lesson in lessons(tiny, [40]):
        teacher.lesson_taker(TENANT)(lesson)
    teacher.close()
    assert [w.tokens for w in recorder.windows] == [32, 32, 32, 8]


def test_a_prompts_own_window_is_dropped_when_its_keys_are_replaced(tiny, store):
    law = GravityConfig(window_tokens=32)
    recorder = Recorder(store)
    teacher = Teacher(tiny.model, recorder, law, tiny.blocks, frozenset({1, 2}))
    through = []
    own = PromptWindows(teacher, TENANT, 32, len(TOKENS), through.append)
    first, rest, following = lessons(tiny, [16, 16, 32])
    own(first)
    teacher.background.drain(30)
    store.reset(TENANT)
    own(rest)
    own(following)
    teacher.background.drain(30)
    assert through == [32], "refused; the recorder tells nobody of what it took"
    assert [w.tokens for w in recorder.windows] == [32]
    assert recorder.dropped == ["superseded"]


def test_lessons_that_the_end_cuts_off_are_counted_and_open_windows_are_submitted(tiny, store, monkeypatch):
    monkeypatch.setattr("server.plasticity.DRAIN_S", 0.01)
    recorder, teacher = windows_of(tiny, store, [40], rule="gradient")
    begun, held = threading.Event(), threading.Event()
    teacher.background.put(lambda: (begun.set(), held.wait()), 1)
    begun.wait()
    for lesson in lessons(tiny, [20, 20]):
        teacher.take(TENANT, lesson)
    # The thread is told to stop while it still holds the work at hand.
    monkeypatch.setattr(teacher.background, "_thread", Released(teacher.background._thread, held))
    teacher.close()
    assert recorder.dropped == ["credit_behind"] * 2
    assert [w.tokens for w in recorder.windows] == [32, 8]


class Released:
    """A thread that can be joined once it is let go."""

    def __init__(self, thread, held):
        self._thread, self._held = thread, held

    def join(self):
        self._held.set()
        self._thread.join()


@pytest.mark.parametrize(("rule", "windows", "dropped"), [("direct", 3, 0), ("gradient", 1, 2)])
def test_lessons_that_come_faster_than_their_credit_wait_or_are_dropped(
    tiny, store, monkeypatch, rule, windows, dropped
):
    monkeypatch.setattr("server.background.MAX_WAITING_TOKENS", 32)
    recorder = Recorder(store)
    law = GravityConfig(window_tokens=32, rule=rule)
    teacher = Teacher(tiny.model, recorder, law, tiny.blocks, frozenset({1, 2}))
    begun, held = threading.Event(), threading.Event()
    teacher.background.put(lambda: (begun.set(), held.wait()), 1)
    begun.wait()

    def teach():
        for _ in range(3):
            for lesson in lessons(tiny, [32]):
                teacher.take(TENANT, lesson)

    engine = threading.Thread(target=teach)
    engine.start()
    if rule == "gradient":
        engine.join(30)
        assert teacher.credit_waiting_tokens == 32
    held.set()
    engine.join(30)
    teacher.close()
    assert len(recorder.windows) == windows
    assert recorder.dropped == ["credit_behind"] * dropped


def test_a_window_that_cannot_be_added_in_the_background_is_counted(tiny, store, monkeypatch):
    recorder = Recorder(store)
    monkeypatch.setattr(recorder, "submit", lambda stats, done: 1 / 0)
    law = GravityConfig(window_tokens=32, rule="gradient")
    teacher = Teacher(tiny.model, recorder, law, tiny.blocks, frozenset({1, 2}))
    for lesson in lessons(tiny, [40]):
        teacher.take(TENANT, lesson)
    assert teacher.background.drain(30)
    assert recorder.dropped == ["credit_failed"]
    monkeypatch.undo()
    teacher.close()


def test_one_tenants_many_scopes_close_no_window_of_another(tiny, store, monkeypatch):
    monkeypatch.setattr("server.plasticity.MAX_OPEN_WINDOWS", 2)
    recorder, teacher = windows_of(tiny, store, [8])
    for name in "abc":
        for lesson in lessons(tiny, [4]):
            teacher.take(ScopeId("session", "other", name), lesson)
    teacher.background.drain(30)
    assert [str(w.scope) for w in recorder.windows] == ["session:other/a", "session:other/b"]
    assert [w.tokens for w in recorder.windows] == [4, 4]


def test_a_tenants_added_experts_scale_nobodys_credit_after_a_restart(tiny, tmp_path, store):
    group = {2: np.full((16, 16), 100.0, np.float32)}
    first, _ = windows_of(tiny, store, [40])
    store.experts.add("loud", ScopeId("tenant", "other"), group, "digest")
    then, _ = windows_of(tiny, store, [40])
    np.testing.assert_array_equal(
        then.windows[0].layers[2].weighted_queries[:8], first.windows[0].layers[2].weighted_queries
    )


def test_submitting_a_window_reads_no_session_from_disk(tiny, store, monkeypatch):
    session = ScopeId("session", "default", "s")
    recorder = Recorder(store)
    asked = []
    monkeypatch.setattr(recorder, "view", lambda scope: asked.append(scope) or store.view(scope))
    teacher = Teacher(tiny.model, recorder, GravityConfig(window_tokens=32), tiny.blocks, frozenset({1, 2}))
    for lesson in lessons(tiny, [40]):
        teacher.take(session, lesson)
    teacher.background.drain(30)
    assert len(recorder.windows) == 1
    assert session not in asked


def test_rows_keep_nothing_of_the_rest_of_the_step(tiny):
    (lesson,) = lessons(tiny, [40])
    trace = lesson.trace.by_layer[2]
    rows = plain_rows(trace, 4)
    assert not np.shares_memory(rows.queries, trace.queries.numpy())
    assert not np.shares_memory(rows.expert_ids, trace.expert_ids.numpy())


def test_the_literal_rule_counts_and_sums_plain_queries(tiny, store):
    recorder, _ = windows_of(tiny, store, [80], rule="literal")
    trace = next(lessons(tiny, [32])).trace.by_layer[1]
    stats = recorder.windows[0].layers[1]
    assert np.array_equal(stats.weights, stats.events)
    expert = int(trace.expert_ids[0, 0])
    selected = (trace.expert_ids == expert).any(1)
    np.testing.assert_allclose(
        stats.weighted_queries[expert], trace.queries[selected].sum(0).numpy(), rtol=1e-4, atol=1e-4
    )


def test_queries_that_are_not_finite_are_dropped_and_counted(tiny, store):
    recorder = Recorder(store)
    teacher = Teacher(tiny.model, recorder, GravityConfig(window_tokens=32), tiny.blocks, frozenset({1, 2}))
    for lesson in lessons(tiny, [40]):
        lesson.trace.by_layer[1].queries = torch.full((40, 16), float("nan"))
        teacher.take(TENANT, lesson)
    teacher.background.drain(30)
    assert (recorder.windows, recorder.dropped) == ([], ["non_finite"])


@pytest.mark.parametrize("rule", ["direct", "gradient"])
def test_moving_along_credit_lowers_the_loss_of_the_text_that_taught(tiny, store, rule):
    """The whole path: credit from the trace, a window, gravity, a new version that predicts the text better."""
    teacher = Teacher(
        tiny.model, store, GravityConfig(window_tokens=80, rule=rule), tiny.blocks, frozenset({2})
    )
    segment = tiny.segment(TOKENS)

    def loss(keys):
        logits = tiny.model.logits(tiny.model.step([replace(segment, token_ids=TOKENS[:80], keys=keys)]))
        return float(torch.nn.functional.cross_entropy(logits, torch.tensor(TOKENS[1:])))

    before = loss(store.view(TENANT))
    for _ in range(10):
        trace = RoutingTrace(frozenset({2}))
        keys = store.view(TENANT)
        hidden = tiny.model.step([replace(segment, token_ids=TOKENS[:80], keys=keys, trace=trace)])
        teacher.take(TENANT, Lesson(Reader(), keys, trace, 0, hidden, torch.tensor(TOKENS[1:])))
        teacher.flush()
        store.consolidate_once()
    assert store.view(TENANT).version > 0
    assert loss(store.view(TENANT)) < before


def test_a_tenants_logits_are_bit_identical_whatever_another_tenant_teaches(tiny, store):
    other = ScopeId("tenant", "other")
    teacher = Teacher(tiny.model, store, GravityConfig(window_tokens=16), tiny.blocks, frozenset({1, 2}))

    def hidden_of(scope, *beside):
        own = replace(tiny.segment(TOKENS[:50]), keys=store.view(scope))
        return tiny.model.step([own, *beside])[:50]

    before = hidden_of(TENANT)
    for lesson in lessons(tiny, [80]):
        for _ in range(50):
            teacher.take(other, lesson)
    teacher.background.drain(30)
    store.consolidate_once()
    assert store.view(other).version > 0
    assert torch.equal(hidden_of(TENANT), before)
    neighbour = replace(tiny.segment(TOKENS[:37]), keys=store.view(other))
    assert torch.equal(hidden_of(TENANT, neighbour), before)
    assert not torch.equal(hidden_of(other), before)


def test_a_deleted_session_takes_its_open_window_along(tiny, store):
    session = ScopeId("session", "default", "s")
    teacher = Teacher(tiny.model, store, GravityConfig(window_tokens=48), tiny.blocks, frozenset({1, 2}))
    for lesson in lessons(tiny, [80]):
        teacher.take(session, lesson)
        teacher.take(TENANT, lesson)
    teacher.background.drain(30)
    store.consolidate_once()
    assert store.view(session).tokens == 48
    assert store.learning.expire_sessions(now=1e18) == [session]
    teacher.flush()
    assert [each.scope for each in store.consolidate_once()] == [TENANT]


def test_experts_that_begin_to_settle_within_a_window_have_no_utility_before(tiny, store):
    def piece(tokens: int, ids: list[int]) -> LayerRows:
        empty = np.empty((tokens, 0))
        utility = np.arange(1, tokens * len(ids) + 1, dtype=np.float32).reshape(tokens, len(ids))
        queries = np.ones((tokens, 4), np.float32)
        selected = np.zeros((tokens, 2), np.int64)
        ones = np.ones(tokens, np.float32)
        return LayerRows(
            selected, queries, empty.astype(np.int64), empty.astype(np.float32), ones, np.array(ids), utility
        )

    joined = LayerRows.joined([piece(2, [8]), piece(1, [8, 9])])
    assert joined.settling_ids.tolist() == [8, 9]
    assert joined.utility.tolist() == [[1, 0], [2, 0], [1, 2]]


@pytest.mark.parametrize("rule", ["direct", "gradient"])
def test_settling_experts_are_told_their_utility_and_nobody_is_pulled(tiny, store, rule):
    recorder = Recorder(store)
    settling = {1: np.array([3, 5]), 2: np.array([0])}
    recorder.experts = SimpleNamespace(settling_ids=lambda scope: settling)
    law = GravityConfig(window_tokens=32, rule=rule)
    teacher = Teacher(tiny.model, recorder, law, tiny.blocks, frozenset({1, 2}))
    for lesson in lessons(tiny, [80]):
        teacher.take(TENANT, lesson)
    teacher.close()
    first = recorder.windows[0]
    assert not first.layers[1].credited.any()
    assert first.layers[1].events.sum() == 32 * 2
    assert first.layers[1].utility.expert_ids.tolist() == [3, 5]
    assert first.layers[2].utility.weighted_queries.shape == (1, 16)
    assert first.layers[1].utility.weighted_queries.any(axis=1).all()
