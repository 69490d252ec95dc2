"""A long prompt that learns from its own windows: what it waits for, what it reports, and that it is reproducible."""

import asyncio
import base64
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from types import SimpleNamespace

import pytest
from prometheus_client.parser import text_string_to_metric_families

from keystore.records import GravityConfig, ScopeId
from keystore.worker import ConsolidationWorker
from server.engine import renewal
from server.engine.renewal import KeyRenewal, KeySpan
from server.engine.scheduler import Scheduler, SchedulerConfig

SESSION = ScopeId("session", "default", "s")
PROMPT = "for i in range(10): print(i, i * i)\n" * 6  # 216 tokens: three windows of 64 and a rest
WITHIN = {
    "model": "some",
    "prompt": PROMPT,
    "max_tokens": 8,
    "temperature": 0,
    "ignore_eos": True,
    "session_id": "s",
    "within_request": True,
}
ROUTES = base64.b64encode(
    b"\x93NUMPY\x01\x00"
    + (118).to_bytes(2, "little")
    + b"{'descr': '|u1', 'fortran_order': False, 'shape': (1, 2, 2), }".ljust(117)
    + b"\n\x00\x01\x00\x01"
)
SPANS = [{"from_token": 64 * i, "key_version": i} for i in range(4)]
PATIENT_S = 60.0  # longer than any test waits


@contextmanager
def consolidating(served):
    worker = ConsolidationWorker(served.store, lambda: 0.0)
    worker.start()
    try:
        yield
    finally:
        worker.stop()


@pytest.fixture
def patient(monkeypatch):
    monkeypatch.setattr(renewal, "PATIENCE_S", PATIENT_S)


def sent(served, **fields):
    response = served.post("/v1/completions", WITHIN | fields)
    assert response.status_code == 200, response.text
    return response.json()


def waits(served):
    return {
        sample.labels["outcome"]: sample.value
        for family in text_string_to_metric_families(served.get("/metrics").text)
        for sample in family.samples
        if sample.name == "libration_within_request_waits_total"
    }


@pytest.mark.parametrize("rule", ["direct", "gradient", "literal"])
@pytest.mark.parametrize("prefill_chunk", [64, 256, 48])
def test_each_window_is_read_with_what_the_ones_before_it_taught(
    serve, tmp_path, patient, rule, prefill_chunk
):
    gravity = GravityConfig(rule=rule, window_tokens=64)
    scheduler = SchedulerConfig(prefill_chunk=prefill_chunk, step_tokens=256)
    with serve(tmp_path, scheduler, gravity=gravity) as served, consolidating(served):
        answer = sent(served)
        assert answer["libration"]["key_versions"] == SPANS
        assert answer["libration"]["key_version"] == 0
        assert answer["libration"]["learned_tokens"] == len(PROMPT) - 1
        assert [row.tokens for row in served.store.versions(SESSION)] == [192, 128, 64]
        assert waits(served) == {"renewed": 3}
        served.post("/admin/keys/some/consolidate")
        assert served.store.view(SESSION).tokens == len(PROMPT) - 1


def test_the_keys_that_are_told_are_the_keys_that_were_read(serve, tmp_path, patient):
    """Behind the plastic layer no token sees another, so each window scores as under its version alone."""
    scoring = {"max_tokens": 0, "echo": True, "logprobs": 0}

    def scores(served, **fields):
        return sent(served, **scoring | fields)["choices"][0]["logprobs"]["token_logprobs"]

    with serve(tmp_path) as served, consolidating(served):
        within = scores(served, plasticity="learn")
        for span in SPANS:
            rows = slice(span["from_token"] + 1, span["from_token"] + 65)
            version = span["key_version"]
            pinned = scores(served, within_request=False, key_version=version)
            assert within[rows] == pinned[rows]
            assert version == 0 or within[rows] != scores(served, within_request=False, key_version=0)[rows]


@pytest.mark.parametrize("beside", [False, True])
def test_traffic_beside_it_leaves_no_mark(serve, tmp_path, patient, beside):
    outcomes = []
    for run in (0, 1):
        path = tmp_path / str(run)
        path.mkdir()
        with serve(path) as served, consolidating(served), ThreadPoolExecutor(4) as pool:
            others = []
            if beside and run:
                body = {"max_tokens": 40, "within_request": False, "prompt": PROMPT * 2}
                others = [
                    pool.submit(sent, served, **body, model=model, session_id=f"other-{i}")
                    for i, model in enumerate(["some", "some", "moe", "some"])
                ]
            answer = sent(served, logprobs=3, echo=True)
            for other in others:
                other.result()
            checksums = [row.checksum for row in served.store.versions(SESSION)]
            outcomes.append((answer["choices"], answer["libration"], checksums))
    assert outcomes[0] == outcomes[1]


def test_windows_begin_with_the_prompt_whatever_waits_in_the_scopes_window(serve, tmp_path, patient):
    with serve(tmp_path) as served, consolidating(served):
        sent(served, prompt="left over from before", within_request=False)
        assert sent(served)["libration"]["key_versions"] == SPANS
        served.post("/admin/keys/some/consolidate")
        assert served.store.view(SESSION).tokens == len("left over from before") + len(PROMPT) - 2


def test_while_it_rests_the_engine_goes_on_with_others_and_then_with_it(serve, tmp_path, patient, wait_until):
    with serve(tmp_path) as served, ThreadPoolExecutor(1) as pool:
        resting = pool.submit(sent, served)
        for border in (64, 128, 192):
            wait_until(lambda border=border: [s.prefilled for s in served.runner.running()] == [border])
            assert sent(served, prompt="others go on", within_request=False, session_id="t")
            wait_until(lambda: served.engine.resting)
            assert not resting.done()
            assert [each.scope for each in served.store.consolidate_once()] == [SESSION]
        assert resting.result()["libration"]["key_versions"] == SPANS


def test_its_patience_ends_and_it_goes_on_with_the_keys_it_has(serve, tmp_path, monkeypatch):
    monkeypatch.setattr(renewal, "PATIENCE_S", 0.0)
    with serve(tmp_path) as served:  # nobody consolidates
        answer = sent(served)
        assert answer["libration"]["key_versions"] == SPANS[:1]
        assert waits(served) == {"timed_out": 3}
        served.store.consolidate_once()
        assert served.store.view(SESSION).version == 3, "what it taught is not lost"


def test_a_reader_who_leaves_a_resting_prompt_frees_its_memory(serve, tmp_path, patient, wait_until):
    async def leave(served):
        async with served.client() as client:
            request = asyncio.ensure_future(client.post("/v1/completions", json=WITHIN))
            while not served.engine.resting:
                await asyncio.sleep(0.01)
            request.cancel()
            await asyncio.gather(request, return_exceptions=True)

    with serve(tmp_path) as served:
        asyncio.run(leave(served))
        wait_until(lambda: served.idle)


@pytest.mark.parametrize("stop_learning", ["rollback", "freeze"])
def test_it_never_waits_for_a_window_that_nobody_will_learn(
    serve, tmp_path, patient, wait_until, stop_learning
):
    with serve(tmp_path) as served, ThreadPoolExecutor(1) as pool:
        resting = pool.submit(sent, served)
        wait_until(lambda: served.engine.resting)
        if stop_learning == "rollback":
            served.store.rollback(SESSION, 0)
            served.store.freeze(SESSION)
        else:
            served.store.freeze(SESSION)
            assert served.store.consolidate_once() == []
        spans = resting.result()["libration"]["key_versions"]
        assert [span["from_token"] for span in spans] == ([0, 64] if stop_learning == "rollback" else [0])


def test_a_frozen_scope_is_read_without_waiting(serve, tmp_path, patient):
    with serve(tmp_path) as served:
        served.store.freeze(SESSION)
        report = sent(served)["libration"]
        assert report["learned_tokens"] == 0
        assert report["key_versions"] == SPANS[:1]


def test_a_short_prompt_and_one_of_exactly_a_window_wait_for_nothing(serve, tmp_path, patient):
    with serve(tmp_path) as served:
        for tokens in (1, 63, 64):
            assert sent(served, prompt="x" * tokens)["libration"]["key_versions"] == SPANS[:1]


def test_a_tenants_scope_may_learn_within_and_a_stream_tells_its_spans(serve, tmp_path, patient, chunks):
    with serve(tmp_path) as served, consolidating(served):
        body = {key: value for key, value in WITHIN.items() if key != "session_id"}
        pieces = chunks(served.post("/v1/completions", body | {"stream": True}))
        assert pieces[-1]["libration"]["scope"] == "tenant:default"
        assert pieces[-1]["libration"]["key_versions"] == SPANS


def test_answers_that_did_not_ask_report_no_spans(served):
    assert "key_versions" not in sent(served, within_request=False)["libration"]


@pytest.mark.parametrize(
    "fields",
    [
        {"n": 2},
        {"prompt": ["a", "b"]},
        {"plasticity": "read"},
        {"plasticity": "off"},
        {"key_version": 0},
        {"max_tokens": 0, "echo": True},
        {"plasticity": "learn", "routed_experts": ROUTES.decode()},
        {"model": "dense", "session_id": None},
        {"model": "moe"},
    ],
)
def test_where_nothing_can_be_learned_on_the_way_it_is_refused(served, fields):
    response = served.post("/v1/completions", WITHIN | fields)
    assert response.status_code == 400, response.text
    assert response.json()["error"]["param"] == "within_request"


def test_an_offer_for_an_earlier_border_comes_too_late():
    first, second, third = (SimpleNamespace(version=i) for i in range(3))
    made = KeyRenewal(64, first, lambda: None)
    made.arrive(64, now=0.0)
    assert not made.may_go_on(1.9)
    assert made.may_go_on(2.0)
    assert made.go_on() is None
    made.arrive(128, now=3.0)
    made.offer(64, second)
    assert not made.may_go_on(4.0)
    made.offer(128, third)
    assert made.may_go_on(4.0)
    assert made.go_on() is third
    assert made.spans == [KeySpan(0, 0), KeySpan(128, 2)]


def test_chunks_end_at_borders_and_a_resting_prompt_has_none():
    def sequence(prefilled, renewed):
        return SimpleNamespace(
            decoding=False,
            variant="some",
            prompt_token_ids=range(200),
            prefilled=prefilled,
            renewal=renewed,
            resting=renewed is not None and renewed.resting,
            rows_at_once=None,
        )

    made = KeyRenewal(64, SimpleNamespace(version=0), lambda: None)
    scheduler = Scheduler(SchedulerConfig(prefill_chunk=48, step_tokens=1000), lambda tokens: True)
    scheduler.running = [sequence(at, made) for at in (0, 48, 64, 112, 192)] + [sequence(48, None)]
    assert [count for _, count in scheduler.plan()] == [48, 16, 48, 16, 8, 48]
    made.arrive(64, now=0.0)
    scheduler.running = [sequence(64, made)]
    assert scheduler.plan() == []
