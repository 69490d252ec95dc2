"""Every variant from one process: same routes, same counts, same batch."""

from concurrent.futures import ThreadPoolExecutor

import pytest
from prometheus_client.parser import text_string_to_metric_families

from model.blocks.mom import MomBlock

VARIANTS = ("some", "moe", "mom", "fm-moe")
PROMPT = "How many roads must a man walk down?"
GREEDY = {"prompt": PROMPT, "temperature": 0, "max_tokens": 10, "ignore_eos": True}


def completion(served, model, **fields):
    response = served.post("/v1/completions", GREEDY | {"model": model} | fields)
    assert response.status_code == 200, response.text
    return response.json()


@pytest.mark.parametrize("model", VARIANTS)
def test_a_variant_answers_by_name_and_by_base_url(served, model):
    by_name = completion(served, model, plasticity="off")
    by_path = served.post(f"/{model}/v1/completions", GREEDY | {"plasticity": "off"}).json()
    assert by_name["model"] == by_path["model"] == model
    assert by_name["choices"] == by_path["choices"]
    assert by_name["usage"]["completion_tokens"] == 10


@pytest.mark.parametrize("model", VARIANTS)
def test_usage_counts_each_token_for_as_many_experts_as_it_takes(served, model):
    def counts():
        usage = served.get(f"/v1/keys/{model}/usage").json()
        assert usage["phases"] == ["prefill", "decode"]
        assert len(usage["counts"][0][0]) == usage["num_experts"]
        return [[sum(layer) for layer in phase] for phase in usage["counts"]], usage["num_experts_per_tok"]

    before, per_token = counts()
    answer = completion(served, model, plasticity="off")
    after, _ = counts()
    prompt_tokens = answer["usage"]["prompt_tokens"]
    passed_by = []
    for layer in range(2):
        read, written = (after[phase][layer] - before[phase][layer] for phase in (0, 1))
        assert read % per_token == written % per_token == 0
        # The last token is never fed back.
        passed_by += [prompt_tokens - read // per_token, 9 - written // per_token]
    if model == "mom":  # tokens may pass by every Master
        assert min(passed_by) >= 0
    else:
        assert passed_by == [0, 0, 0, 0]


def test_every_variant_has_the_same_metrics(served):
    names = {
        (family.name, sample.labels["model"])
        for family in text_string_to_metric_families(served.get("/metrics").text)
        for sample in family.samples
        if "layer" in sample.labels
    }
    for model in VARIANTS:
        for name in ("expert_tokens", "layer_routed_tokens", "routing_entropy_ratio", "experts_idle"):
            assert (f"libration_{name}", model) in names


def test_the_base_has_no_usage(served):
    response = served.get("/v1/keys/dense/usage")
    assert (response.status_code, response.json()["error"]["code"]) == (404, "not_found")


def test_variants_in_one_batch_answer_as_they_do_alone(served):
    work = [(model, f"{n}: {PROMPT}") for n in range(3) for model in (*VARIANTS, "dense")]

    def answer(item):
        model, prompt = item
        return completion(served, model, prompt=prompt, plasticity="off")["choices"][0]["text"]

    alone = [answer(item) for item in work]
    with ThreadPoolExecutor(len(work)) as pool:
        together = list(pool.map(answer, work))
    assert together == alone


@pytest.mark.parametrize(("model", "longest"), [("moe", 512), ("mom", 128), ("fm-moe", 128)])
def test_blocks_that_take_long_get_shorter_chunks_of_a_prompt(serve, tmp_path, model, longest):
    with serve(tmp_path, scheduler=None) as other:
        other.engine.scheduler.config = type(other.engine.scheduler.config)(
            prefill_chunk=512, step_tokens=512
        )
        before = other.engine.counters.steps
        tokens = completion(other, model, prompt=PROMPT * 8, max_tokens=1)["usage"]["prompt_tokens"]
        assert 256 < tokens <= 512
        assert other.engine.counters.steps - before == -(-tokens // longest)


def test_a_long_prompt_in_many_chunks_is_one_prompt_for_blocks_with_memory(
    served, serve, tmp_path, monkeypatch
):
    monkeypatch.setattr(MomBlock, "rows_at_once", None)
    prompt = PROMPT * 8  # more than four chunks of 64
    with serve(tmp_path, scheduler=None) as other:
        other.engine.scheduler.config = type(other.engine.scheduler.config)(
            prefill_chunk=512, step_tokens=512
        )
        whole = completion(other, "mom", prompt=prompt)["choices"][0]["text"]
    assert completion(served, "mom", prompt=prompt)["choices"][0]["text"] == whole


def test_flow_steps_reach_the_integration(served, monkeypatch):
    asked = []
    experts = served.engine.variants["fm-moe"].blocks[1].experts
    original = type(experts).forward

    def spying(self, rows, expert_ids, steps):
        asked.append(steps)
        return original(self, rows, expert_ids, steps)

    monkeypatch.setattr(type(experts), "forward", spying)
    for steps in (1, 5, 32):
        completion(served, "fm-moe", flow_steps=steps)
    assert set(asked) == {1, 5, 32}
    asked.clear()
    assert completion(served, "fm-moe")["choices"] == completion(served, "fm-moe", flow_steps=4)["choices"]
    assert set(asked) == {4}


@pytest.mark.parametrize("steps", [0, 65, -1, 1.5, "4"])
def test_flow_steps_out_of_range_are_refused(served, steps):
    response = served.post("/v1/completions", GREEDY | {"model": "fm-moe", "flow_steps": steps})
    assert response.status_code == 400
    assert response.json()["error"]["param"] == "flow_steps"


@pytest.mark.parametrize("model", ["some", "moe", "mom", "dense"])
def test_flow_steps_of_other_variants_are_refused(served, model):
    response = served.post("/v1/completions", GREEDY | {"model": model, "flow_steps": 2})
    assert response.status_code == 400
    assert response.json()["error"] == {
        "message": f"endpoint {model!r} has no flow-matching experts: 'flow_steps' does not apply",
        "type": "invalid_request_error",
        "param": "flow_steps",
        "code": "unsupported_parameter",
    }


@pytest.mark.parametrize("fields", [{"plasticity": "learn"}, {"plasticity": "read"}, {"key_version": 1}])
def test_a_variant_without_routing_keys_refuses_to_learn(served, fields):
    response = served.post("/v1/completions", GREEDY | {"model": "moe"} | fields)
    assert response.status_code == 400
    assert response.json()["error"]["param"] == "plasticity"
