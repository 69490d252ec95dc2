"""Prompts that begin as an earlier one did, through the whole server: the same answers, and the truth about them."""

import asyncio

import pytest
from prometheus_client.parser import text_string_to_metric_families

from keystore.records import GravityConfig, ScopeId
from server.auth import ApiKey, ApiKeys
from server.engine.scheduler import SchedulerConfig
from server.value_offsets import OffsetLimits

ENDPOINTS = ("some", "moe", "mom", "fm-moe", "dense")
TEXT = "the tide came in over the flats and the boats swung round to meet it. " * 6
CUT = SchedulerConfig(prefill_chunk=128, step_tokens=256)


@pytest.fixture(params=ENDPOINTS)
def endpoint(request):
    return request.param


@pytest.fixture
def served(serve, tmp_path):
    with serve(tmp_path, CUT) as running:
        yield running


def ask(served, prompt, headers=None, **fields):
    body = {"model": "some", "max_tokens": 6, "temperature": 0, "ignore_eos": True, "prompt": prompt} | fields
    response = served.post("/v1/completions", body, headers=headers)
    assert response.status_code == 200, response.text
    return response.json()


def cached(served, prompt, headers=None, **fields):
    answer = ask(served, prompt, headers, **fields)
    return answer["usage"]["prompt_tokens_details"]["cached_tokens"]


def learned(served, prompt, **fields):
    return ask(served, prompt, **fields)["libration"]["learned_tokens"]


def sampled(served, name):
    return {
        sample.labels.get("model"): sample.value
        for family in text_string_to_metric_families(served.get("/metrics").text)
        for sample in family.samples
        if sample.name == f"libration_{name}"
    }


def test_an_answer_with_reuse_is_the_one_without_bit_for_bit(served, serve, tmp_path, endpoint):
    mode = {"plasticity": "off"} if endpoint == "some" else {}
    fields = {"model": endpoint, "logprobs": 5, "max_tokens": 20} | mode
    beginnings = [TEXT[:n] for n in (130, 200, 330, 420)]
    first = [ask(served, prompt, **fields) for prompt in beginnings]
    again = [ask(served, prompt, **fields) for prompt in reversed(beginnings)][::-1]
    counts = [answer["usage"]["prompt_tokens_details"]["cached_tokens"] for answer in (*first, *again)]
    at_cuts = [0, 128, 128, 256, 128, 128, 256, 384]  # what Masters remember is kept where prompts are cut
    assert counts == (at_cuts if endpoint == "mom" else [0, 128, 192, 320, 128, 192, 320, 384])
    (tmp_path / "without").mkdir()
    with serve(tmp_path / "without", CUT, prefix_cache_tokens=0) as without:
        for prompt, *answers in zip(beginnings, first, again, strict=True):
            expected = ask(without, prompt, **fields)
            assert expected["usage"]["prompt_tokens_details"] == {"cached_tokens": 0}
            for answer in answers:
                assert answer["choices"] == expected["choices"]


def test_tenants_never_share_not_even_the_anchors(serve, tmp_path):
    api_keys = ApiKeys([ApiKey.of(f"{name}-key", name, "user") for name in ("anna", "boris")])

    def by(name):
        return {"Authorization": f"Bearer {name}-key"}

    with serve(tmp_path, api_keys=api_keys) as served:
        for fields in ({"model": "dense"}, {"plasticity": "off"}, {"plasticity": "read"}):
            assert cached(served, TEXT[:200], by("anna"), **fields) == 0
            assert cached(served, TEXT[:200], by("boris"), **fields) == 0
            assert cached(served, TEXT[:200], by("anna"), **fields) == 192


def test_everybodys_keys_are_shared_but_no_prompts(serve, tmp_path):
    api_keys = ApiKeys([ApiKey.of(f"{name}-key", name, "user") for name in ("anna", "boris")])
    with serve(tmp_path, api_keys=api_keys, learn_scope="global") as served:
        for name in ("anna", "boris"):
            by = {"Authorization": f"Bearer {name}-key"}
            assert cached(served, TEXT[:200], by, plasticity="read") == 0


def test_rows_that_hang_on_something_else_are_not_taken(serve, tmp_path):
    limits = OffsetLimits(0.05, 0.2, 32, 4, 1e3)
    with serve(tmp_path, value_offsets=limits) as served:
        for name in ("some", "fm-moe", "dense"):
            ask(served, TEXT[:200], model=name)
        assert cached(served, TEXT[:200], model="moe") == 0
        assert cached(served, TEXT[:200], model="fm-moe", flow_steps=3) == 0
        assert cached(served, TEXT[:200], model="fm-moe") == 192
        assert cached(served, TEXT[:200], plasticity="read", session_id="s") == 0
        assert cached(served, TEXT[:200], plasticity="read", session_id="s", value_offsets=True) == 0
        learning = {"plasticity": "learn", "session_id": "s"}
        assert [cached(served, TEXT[:200], **learning) for _ in range(2)] == [0, 192]
        assert cached(served, TEXT[:200], **learning, within_request=True) == 0
        told = ask(served, TEXT[:200], plasticity="read", return_routed_experts=True)["choices"][0]
        prescribed = {"routed_experts": told["routed_experts"], "max_tokens": 1}
        routed = ask(served, TEXT[:205], plasticity="read", **prescribed)
        assert routed["usage"]["prompt_tokens_details"]["cached_tokens"] == 0


def test_an_answer_that_tells_of_every_row_reads_every_row(served):
    ask(served, TEXT[:200], plasticity="read")
    for report in ({"echo": True, "logprobs": 1}, {"return_routed_experts": True}):
        assert cached(served, TEXT[:200], plasticity="read", **report) == 0
    assert cached(served, TEXT[:200], plasticity="read", echo=True) == 192


def test_a_chat_that_resends_its_history_teaches_each_token_once(serve, tmp_path):
    with serve(tmp_path, CUT, gravity=GravityConfig(window_tokens=100_000)) as served:
        turns = [TEXT[:100], TEXT[:250], TEXT[:400]]
        assert [learned(served, turn) for turn in turns] == [99, 249 - 64, 399 - 192]
        assert [learned(served, turn, plasticity="read") for turn in turns] == [0, 0, 0]
        assert sampled(served, "learned_tokens_total") == {"some": 99 + 185 + 207}
        assert sampled(served, "prompt_tokens_total")["some"] == 100 + 186 + 208 + (36 + 58 + 16)


def test_what_was_only_read_teaches_when_somebody_learns(serve, tmp_path):
    with serve(tmp_path, gravity=GravityConfig(window_tokens=100_000)) as served:
        ask(served, TEXT[:200], plasticity="read")
        assert learned(served, TEXT[:200]) == 199
        assert learned(served, TEXT[:200]) == 199 - 192


def test_newer_keys_know_nothing_of_what_older_ones_read_nor_does_a_scope_that_was_reset(serve, tmp_path):
    with serve(tmp_path) as served:
        assert learned(served, TEXT[:200]) == 199
        served.store.consolidate_once()
        assert learned(served, TEXT[:200]) == 199
        served.store.reset(ScopeId("tenant", "default"))
        assert learned(served, TEXT[:200]) == 199
        assert cached(served, TEXT[:200], key_version=0, plasticity="read") == 192


def test_credit_that_goes_through_whole_prompts_takes_nothing(serve, tmp_path):
    with serve(tmp_path, gravity=GravityConfig(window_tokens=100_000, rule="gradient")) as served:
        assert [learned(served, TEXT[:200]) for _ in range(2)] == [199, 199]
        assert cached(served, TEXT[:200], plasticity="read") == 192


def test_a_budget_is_charged_for_what_was_read_to_learn(serve, tmp_path):
    api_keys = ApiKeys([ApiKey.of("small-key", "alice", "user", 300)])
    headers = {"Authorization": "Bearer small-key"}
    with serve(tmp_path, gravity=GravityConfig(window_tokens=100_000), api_keys=api_keys) as served:
        told = [ask(served, TEXT[:200], headers)["libration"]["learned_tokens"] for _ in range(3)]
        assert told == [199, 0, 0], "199 more were not left, and what is kept does not lower the price asked"
        spent = ask(served, TEXT[:90], headers, plasticity="learn")["libration"]
        assert (spent["plasticity"], spent["learned_tokens"]) == ("learn", 89 - 64)
        spent = ask(served, TEXT[100:170], headers)["libration"]
        assert (spent["plasticity"], spent["learned_tokens"]) == ("learn", 69), "64 were given back"


def test_choices_of_one_prompt_count_what_none_of_them_has_read(served):
    answer = ask(served, TEXT[:200], model="dense", n=4, seed=1, temperature=1)
    assert answer["usage"]["prompt_tokens_details"] == {"cached_tokens": 0}
    assert sampled(served, "prefix_cache_hit_tokens_total")["dense"] > 0
    assert cached(served, [TEXT[:200], TEXT[200:400]], model="dense", n=2) == 192


def test_a_stream_tells_it_in_its_usage(served, chunks):
    body = {"model": "dense", "prompt": TEXT[:200], "stream": True, "max_tokens": 3}
    body["stream_options"] = {"include_usage": True}
    for tokens in (0, 192):
        last = chunks(served.post("/v1/completions", body))[-1]
        assert last["usage"]["prompt_tokens_details"] == {"cached_tokens": tokens}


def test_metrics_tell_what_was_looked_up_found_kept_and_given_up(serve, tmp_path):
    with serve(tmp_path, CUT, prefix_cache_tokens=256) as served:
        for start in (0, 0, 100):
            ask(served, TEXT[start : start + 200], model="dense")
        assert sampled(served, "prefix_cache_query_tokens_total")["dense"] == 600
        assert sampled(served, "prefix_cache_hit_tokens_total")["dense"] == 192
        assert sampled(served, "prompt_tokens_total")["dense"] == 600 - 192
        assert sampled(served, "prefix_cache_tokens") == {None: 256}
        assert sampled(served, "prefix_cache_evicted_tokens_total") == {None: 128}


def test_nobody_waits_for_memory_that_is_only_kept(serve, tmp_path):
    with serve(tmp_path, kv_cache_tokens=768) as served:
        ask(served, TEXT[:320], model="dense")
        assert served.engine.prefixes.tokens == 320
        ask(served, TEXT[100:300], model="dense", max_tokens=250)
        assert served.engine.prefixes.tokens <= 768 - 512
        assert served.idle


def test_what_a_reader_who_left_had_read_is_kept_and_right(served, wait_until):
    prompt = TEXT * 4
    expected = ask(served, prompt, model="moe", logprobs=3, session_id="x")["choices"]
    other = prompt.upper()

    async def leave_early():
        async with served.client() as client:
            request = asyncio.ensure_future(
                client.post("/v1/completions", json={"model": "moe", "prompt": other, "max_tokens": 1})
            )
            before = served.engine.prefixes.tokens
            while served.engine.prefixes.tokens == before:
                await asyncio.sleep(0.001)
            request.cancel()
            await asyncio.gather(request, return_exceptions=True)

    asyncio.run(leave_early())
    wait_until(lambda: served.idle)
    again = ask(served, prompt, model="moe", logprobs=3)
    assert again["choices"] == expected
    assert cached(served, other, model="moe") > 0


def test_a_step_that_fails_leaves_nothing_behind(served, monkeypatch):
    step = served.engine.model.step

    def broken(segments):
        step(segments)
        raise RuntimeError("out of memory")

    monkeypatch.setattr(served.engine.model, "step", broken)
    body = {"model": "dense", "prompt": TEXT[:200]}
    assert served.post("/v1/completions", body).status_code == 500
    monkeypatch.undo()
    assert served.engine.prefixes.tokens == 0
    assert cached(served, TEXT[:200], model="dense") == 0


def test_a_judgement_reads_every_row_again(serve, tmp_path, write):
    write("y" * 20)
    with serve(tmp_path, gravity=GravityConfig(window_tokens=100_000)) as served:
        ask(served, TEXT[:200], plasticity="off")
        answer = ask(served, TEXT[:200], max_tokens=100, ignore_eos=False)
        before = sampled(served, "prompt_tokens_total")["some"]
        judged = served.post("/v1/feedback", {"id": answer["id"], "reward": 1}).json()
        assert judged["learned_tokens"] == answer["usage"]["completion_tokens"]
        assert sampled(served, "prompt_tokens_total")["some"] - before == answer["usage"]["total_tokens"]
