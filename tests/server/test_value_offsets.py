"""Value offsets: each session's own, learned from its prompts, gone with it."""

import threading

import numpy as np
import pytest
import torch

from keystore.records import GravityConfig, ScopeId
from model.blocks.base import RoutingTrace
from model.value_offsets import directions, head_metric, updated
from server.crediting import Crediting
from server.engine.sequence import Lesson
from server.value_offsets import OffsetLimits, ValueOffsets

TEXT = "the tide came in over the flats and the boats swung round to meet it. " * 8
OTHER = "SELECT name, sum(amount) FROM ledger GROUP BY name ORDER BY 2 DESC; " * 8
TOKENS = [(7 * i * i + 3 * i) % 97 for i in range(81)]
ANNA, BORIS = ScopeId("session", "default", "anna"), ScopeId("session", "default", "boris")
LIMITS = OffsetLimits(rate=0.05, bound=0.2, window_tokens=32, max_sessions=2, session_ttl_s=100.0)


class Clock:
    now = 0.0

    def __call__(self):
        return self.now


@pytest.fixture
def clock():
    return Clock()


@pytest.fixture
def held(tiny, clock):
    return ValueOffsets(tiny.model, LIMITS, clock)


class Reader:
    """Stands where a sequence does: whose chunks belong together."""


def lessons(tiny, chunks, offsets=None):
    segment, at = tiny.segment(TOKENS), 0
    segment.offsets = offsets
    for size in chunks:
        trace = RoutingTrace(frozenset({1, 2}))
        segment.token_ids, segment.start, segment.trace = TOKENS[at : at + size], at, trace
        hidden = tiny.model.step([segment])
        targets = torch.tensor(TOKENS[at + 1 : at + 1 + size])
        yield Lesson(Reader(), tiny.keys, trace, at, hidden[: len(targets)], targets, offsets)
        at += size


def taught(tiny, held, scope, chunks):
    session = held.open(scope)
    for lesson in lessons(tiny, chunks):
        held.take(session, lesson)
    return session


def test_every_full_window_moves_the_offsets_by_the_formula(tiny, held):
    session = taught(tiny, held, ANNA, [80])
    (lesson,) = lessons(tiny, [80])
    assert session.offsets.windows == 2
    for layer, trace in lesson.trace.by_layer.items():
        expected = torch.zeros(8, 32)
        for rows in (slice(0, 32), slice(32, 64)):
            norms = trace.output_norms[rows]
            arguments = (trace.expert_ids[rows], trace.gates[rows], session_directions(tiny, lesson)[rows])
            expected = updated(expected, *arguments, norms, LIMITS.rate, LIMITS.bound)
        torch.testing.assert_close(session.offsets.by_layer[layer], expected)


def session_directions(tiny, lesson):
    final = lesson.hidden.clone().requires_grad_()
    rows = torch.nn.functional.rms_norm(final, (32,), tiny.model.final_norm, 1e-5)
    torch.nn.functional.cross_entropy(
        rows @ tiny.model.embedding.T, lesson.targets, reduction="sum"
    ).backward()
    metric = head_metric(tiny.model.final_norm, tiny.model.head)
    return directions(final.grad, final.detach(), metric)


def test_windows_do_not_depend_on_how_the_prompt_was_chunked(tiny, held):
    whole = taught(tiny, held, ANNA, [80])
    pieces = taught(tiny, held, BORIS, [3, 29, 1, 40, 7])
    assert whole.offsets.windows == pieces.offsets.windows == 2
    for layer in (1, 2):
        torch.testing.assert_close(whole.offsets.by_layer[layer], pieces.offsets.by_layer[layer])


def test_a_window_makes_new_tensors_and_leaves_those_that_are_being_read(tiny, held):
    session = taught(tiny, held, ANNA, [80])
    reading = session.newest(tiny.keys)
    before = {layer: offsets.clone() for layer, offsets in reading.items()}
    taught(tiny, held, ANNA, [80])
    assert session.offsets.windows == 5
    for layer in (1, 2):
        assert torch.equal(reading[layer], before[layer])
        assert not torch.equal(session.newest(tiny.keys)[layer], before[layer])


def test_a_window_that_is_not_finite_moves_nothing_and_is_counted(tiny, held):
    session = held.open(ANNA)
    for lesson in lessons(tiny, [32]):
        lesson.hidden = torch.full((32, 32), float("nan"))
        held.take(session, lesson)
    assert session.offsets.windows == 0
    assert held.windows == {"non_finite": 1}
    taught(tiny, held, ANNA, [32])
    assert held.windows == {"non_finite": 1, "moved": 1}


def test_the_longest_unused_session_makes_room_and_unused_ones_expire(tiny, held, clock):
    for scope in (ANNA, BORIS):
        taught(tiny, held, scope, [32])
    size_bytes = 2 * 2 * 8 * 32 * 4  # sessions, layers, experts, hidden, float32
    assert held.held() == (2, size_bytes)
    held.open(ANNA)
    taught(tiny, held, ScopeId("session", "default", "clara"), [8])
    assert held.open(ANNA).offsets.windows == 1
    assert held.open(BORIS).offsets.windows == 0
    clock.now = 99.0
    held.open(ANNA)
    clock.now = 101.0
    assert held.held() == (1, size_bytes // 2)
    clock.now = 200.0
    assert held.held() == (0, 0)


def test_another_tenants_readers_and_many_sessions_push_nobody_out(tiny, held):
    taught(tiny, held, ANNA, [32])
    theirs = [ScopeId("session", "other", str(i)) for i in range(3)]
    reading = [held.open(scope) for scope in theirs]
    assert held.held()[0] == 1
    assert [session.offsets.windows for session in reading] == [0, 0, 0]
    for scope in theirs:
        taught(tiny, held, scope, [32])
    assert held.open(ANNA).offsets.windows == 1
    assert [held.open(scope).offsets.windows for scope in theirs] == [0, 0, 1]


def test_requests_that_open_a_session_together_teach_the_same_one(tiny, held):
    one, other = held.open(ANNA), held.open(ANNA)
    for session in (one, other):
        for lesson in lessons(tiny, [32]):
            held.take(session, lesson)
    assert held.open(ANNA).offsets.windows == 2


def test_a_dropped_session_is_taught_nothing_by_requests_that_still_run(tiny, held):
    session = taught(tiny, held, ANNA, [32])
    held.drop(ANNA)
    for lesson in lessons(tiny, [32]):
        held.take(session, lesson)
    assert held.open(ANNA).offsets.windows == 0
    assert held.windows == {"moved": 1}


def test_experts_that_come_later_start_without_an_offset(tiny, held):
    class MoreKeys:
        def keys_of(self, layer):
            return torch.zeros(11, 16).numpy()

    session = taught(tiny, held, ANNA, [32])
    grown = session.newest(MoreKeys())[2]
    assert torch.equal(grown[:8], session.offsets.by_layer[2])
    assert torch.equal(grown[8:], torch.zeros(3, 32))
    for lesson in lessons(tiny, [32]):
        lesson.keys = MoreKeys()
        held.take(session, lesson)
    assert session.offsets.windows == 2
    assert session.offsets.by_layer[2].shape == (11, 32)
    taught(tiny, held, ANNA, [32])  # a request that still holds the older keys
    assert session.offsets.by_layer[2].shape == (11, 32)


def test_gradient_credit_sees_what_the_session_adds(tiny, held):
    """Behind the last block nothing stands between its output and the head: there both kinds of credit are one."""
    session = taught(tiny, held, ANNA, [80])
    (lesson,) = lessons(tiny, [80], session.newest(tiny.keys))
    direct, gradient = (
        Crediting(tiny.model, tiny.blocks, frozenset({1, 2}), GravityConfig(rule=rule)).rows(lesson, 1.0, {})
        for rule in ("direct", "gradient")
    )
    np.testing.assert_array_equal(gradient[2].candidate_ids, direct[2].candidate_ids)
    np.testing.assert_allclose(gradient[2].credit, direct[2].credit, atol=1e-5, rtol=1e-3)
    lesson.offsets = None
    plain = Crediting(tiny.model, tiny.blocks, frozenset({1, 2}), GravityConfig()).rows(lesson, 1.0, {})
    assert not np.allclose(plain[2].credit, direct[2].credit, atol=1e-5, rtol=1e-3)


@pytest.fixture(scope="module")
def offering(serve, tmp_path_factory):
    """Keys that stand still, so that what changes is the offsets'; windows of 64 tokens."""
    limits = OffsetLimits(rate=0.1, bound=0.5, window_tokens=64, max_sessions=8, session_ttl_s=600.0)
    gravity = GravityConfig(window_tokens=64, trust_radius=0.0)
    with serve(tmp_path_factory.mktemp("offering"), gravity=gravity, value_offsets=limits) as made:
        yield made


def ask(served, text, **fields):
    body = {"model": "some", "prompt": text, "max_tokens": 1, "temperature": 0, "value_offsets": True}
    response = served.post("/v1/completions", body | fields)
    assert response.status_code == 200, response.text
    assert served.runner.finish_step(30)  # an answer goes out before its lesson is taught
    return response.json()


def loss(served, text, **fields):
    """Mean loss of the text's tokens, and what the answer says of the offsets it was computed with."""
    answer = ask(served, text, echo=True, logprobs=0, max_tokens=0, **fields)
    scores = answer["choices"][0]["logprobs"]["token_logprobs"][1:]
    return -sum(scores) / len(scores), scores, answer["libration"].get("value_offsets")


def windows_of(served, session_id):
    return ask(served, "x", session_id=session_id)["libration"]["value_offsets"]["windows"]


def test_a_session_with_offsets_predicts_its_text_better_and_no_other_session_changes(offering):
    fresh, scores, told = loss(offering, TEXT, session_id="reader")
    assert told == {"windows": 0}
    _, plain_scores, untold = loss(offering, TEXT, session_id="reader", value_offsets=False)
    assert (plain_scores, untold) == (scores, None)
    for _ in range(3):
        answer = ask(offering, TEXT, session_id="reader")
        assert answer["libration"]["learned_tokens"] == len(TEXT) - 1
    learned, _, told = loss(offering, TEXT, session_id="reader")
    assert told["windows"] == 3 * (len(TEXT) - 1) // 64
    assert learned < fresh - 0.02
    for fields in ({"session_id": "somebody"}, {"session_id": "reader", "value_offsets": False}):
        assert loss(offering, TEXT, **fields)[1] == scores


def test_sessions_in_one_batch_keep_their_bits(offering):
    ask(offering, TEXT, session_id="one")
    ask(offering, OTHER, session_id="two")
    asked = [
        {"session_id": "one"},
        {"session_id": "two"},
        {"session_id": "three"},
        {"value_offsets": False},
    ]
    alone = [loss(offering, TEXT, **fields)[1] for fields in asked]
    assert alone[0] != alone[2] != alone[1] != alone[0]
    assert alone[2] == alone[3]
    together = [None] * len(asked)

    def score(i):
        together[i] = loss(offering, TEXT, **asked[i])[1]

    threads = [threading.Thread(target=score, args=(i,)) for i in range(len(asked))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert together == alone


def test_a_request_that_reads_moves_nothing(offering):
    ask(offering, TEXT, session_id="reading", plasticity="read")
    assert windows_of(offering, "reading") == 0


@pytest.mark.parametrize(
    ("action", "more"), [("reset", {}), ("rollback", {"to_version": 0})], ids=["reset", "rollback"]
)
def test_offsets_are_gone_when_the_session_goes_back(offering, action, more):
    _, scores, _ = loss(offering, TEXT, session_id="nobody")
    ask(offering, TEXT, session_id=action)
    assert windows_of(offering, action) > 0
    scope = {"scope": f"session:default/{action}"}
    response = offering.post(f"/admin/keys/some/{action}", scope | more)
    assert response.status_code == 200, response.text
    assert windows_of(offering, action) == 0
    assert loss(offering, TEXT, session_id=action)[1] == scores


def test_a_frozen_session_reads_its_offsets_and_moves_none(offering):
    ask(offering, TEXT, session_id="cold")
    before = windows_of(offering, "cold")
    scope = {"scope": "session:default/cold"}
    offering.post("/admin/keys/some/freeze", scope)
    ask(offering, TEXT, session_id="cold")
    assert windows_of(offering, "cold") == before > 0
    offering.post("/admin/keys/some/unfreeze", scope)


def test_a_prompt_that_learns_within_itself_goes_on_with_newer_offsets(offering):
    usual, within = (
        ask(offering, TEXT[:128], session_id=f"within-{flag}", within_request=flag, echo=True, logprobs=0)
        for flag in (False, True)
    )
    scores = [a["choices"][0]["logprobs"]["token_logprobs"][1:-1] for a in (usual, within)]
    assert scores[0][:63] == scores[1][:63]
    assert sum(scores[1]) > sum(scores[0])


def test_metrics_tell_how_many_sessions_hold_how_much(offering):
    ask(offering, TEXT, session_id="counted")
    lines = dict(line.rsplit(" ", 1) for line in offering.get("/metrics").text.splitlines() if line[0] != "#")
    sessions = float(lines['libration_value_offsets_sessions{model="some"}'])
    assert sessions >= 1
    assert float(lines['libration_value_offsets_bytes{model="some"}']) >= sessions * 8 * 32 * 4
    assert float(lines['libration_value_offsets_windows_total{model="some",outcome="moved"}']) >= 1


@pytest.mark.parametrize(
    ("fields", "says"),
    [
        ({}, "'session_id'"),
        ({"session_id": "s", "plasticity": "off"}, "'read' or 'learn'"),
        ({"session_id": "s", "model": "moe"}, "'moe' has no value offsets"),
        ({"session_id": "s", "model": "dense"}, "'dense' has no value offsets"),
    ],
)
def test_a_request_that_cannot_have_offsets_is_refused(offering, fields, says):
    body = {"model": "some", "prompt": "x", "max_tokens": 1, "value_offsets": True} | fields
    response = offering.post("/v1/completions", body)
    error = response.json()["error"]
    assert (response.status_code, error["param"], error["code"]) == (
        400,
        "value_offsets",
        "unsupported_parameter",
    )
    assert says in error["message"]


def test_an_endpoint_that_does_not_offer_them_refuses(served):
    body = {"model": "some", "prompt": "x", "max_tokens": 1, "value_offsets": True, "session_id": "s"}
    response = served.post("/v1/completions", body)
    assert (response.status_code, response.json()["error"]["param"]) == (400, "value_offsets")
    assert "libration_value_offsets_sessions{" not in served.get("/metrics").text
