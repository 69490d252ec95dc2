"""Which experts worked on which token, as told to the client."""

import base64
import io
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import numpy as np
import pytest
import torch

from model.transformer import Segment
from server.engine.segments import routed_rows

VARIANTS = ("some", "moe", "mom", "fm-moe")
PROMPT = "How many roads must a man walk down, before you call him a man? The answer is"
ASKED = {
    "prompt": PROMPT,
    "temperature": 0,
    "max_tokens": 6,
    "ignore_eos": True,
    "plasticity": "off",
    "return_routed_experts": True,
}


def read(text):
    return np.load(io.BytesIO(base64.b64decode(text, validate=True)), allow_pickle=False)


def completion(served, model, **fields):
    response = served.post("/v1/completions", ASKED | {"model": model} | fields)
    assert response.status_code == 200, response.text
    return response.json()


def routed(served, model, **fields):
    return read(completion(served, model, **fields)["choices"][0]["routed_experts"])


@pytest.mark.parametrize("model", VARIANTS)
def test_every_token_but_the_last_has_its_experts_in_order(served, make_tiny, tokenizer, model):
    answer = completion(served, model, logprobs=0, echo=True)
    ids = read(answer["choices"][0]["routed_experts"])
    tokens = tokenizer.encode(PROMPT)
    assert ids.dtype == np.uint8
    assert ids.shape == (len(tokens) + 6 - 1, 2, 2)
    spelled = {
        text: token
        for token in range(tokenizer.vocab_size)
        for text in (
            tokenizer.token_bytes(token).decode(errors="replace"),
            "bytes:" + "".join(f"\\x{byte:02x}" for byte in tokenizer.token_bytes(token)),
        )
    }
    written = [spelled[text] for text in answer["choices"][0]["logprobs"]["tokens"]]
    tiny = make_tiny(torch.float32, model, vocab_size=tokenizer.vocab_size, max_position_embeddings=4096)
    # One pass over the whole text, expert by expert as the block's own records have it.
    segment = replace(tiny.segment(written[:-1]), routed=[])
    tiny.model.step([segment])
    np.testing.assert_array_equal(ids, np.stack(segment.routed, axis=1))


@pytest.mark.parametrize("model", ["some", "moe", "fm-moe"])
def test_routed_experts_add_up_to_the_usage(served, model):
    def counts():
        return np.array(served.get(f"/v1/keys/{model}/usage").json()["counts"]).sum(0)

    before = counts()
    ids = routed(served, model)
    added = counts() - before
    for layer in range(2):
        np.testing.assert_array_equal(
            added[layer], np.bincount(ids[:, layer].ravel(), minlength=added.shape[1])
        )


@pytest.mark.parametrize("model", VARIANTS)
def test_streamed_and_chosen_among_others_it_is_the_same(served, chunks, model):
    alone = completion(served, model, prompt=[PROMPT, "b"], n=2)["choices"]
    response = served.post(
        "/v1/completions", ASKED | {"model": model, "prompt": [PROMPT, "b"], "n": 2, "stream": True}
    )
    last = [p["choices"][0] for p in chunks(response) if p["choices"][0]["finish_reason"] is not None]
    told = {choice["index"]: choice["routed_experts"] for choice in last}
    assert told == {choice["index"]: choice["routed_experts"] for choice in alone}
    pieces = [p["choices"][0] for p in chunks(response)]
    assert sum("routed_experts" in piece for piece in pieces) == 4
    assert read(told[2]).shape == (6, 2, 2)


def test_in_one_batch_each_request_gets_its_own(served):
    work = [(model, f"{n} {PROMPT}") for n in range(3) for model in VARIANTS]

    def ask(item):
        return completion(served, item[0], prompt=item[1])["choices"]

    alone = [ask(item) for item in work]
    with ThreadPoolExecutor(len(work)) as pool:
        assert list(pool.map(ask, work)) == alone


def test_a_stop_string_cuts_the_experts_too(served, write):
    write("one.two.three")
    answer = completion(served, "moe", stop=".", max_tokens=50)
    tokens = answer["usage"]["total_tokens"]
    assert tokens == len(PROMPT) + 4
    assert read(answer["choices"][0]["routed_experts"]).shape == (tokens - 1, 2, 2)


def test_a_prompt_that_is_only_scored_has_experts(served):
    ids = routed(served, "some", echo=True, max_tokens=0)
    np.testing.assert_array_equal(ids, routed(served, "some")[: len(PROMPT) - 1])
    assert routed(served, "some", prompt="a", echo=True, max_tokens=0).shape == (0, 2, 2)


def test_chat_tells_it_as_well(served):
    body = {k: v for k, v in ASKED.items() if k != "prompt"} | {
        "messages": [{"role": "user", "content": "x"}]
    }
    answer = served.post("/v1/chat/completions", body | {"model": "some"}).json()
    assert read(answer["choices"][0]["routed_experts"]).shape == (answer["usage"]["total_tokens"] - 1, 2, 2)


def test_it_is_told_only_when_asked_for_and_changes_nothing(served):
    plain = completion(served, "some", return_routed_experts=False)["choices"][0]
    asked = completion(served, "some")["choices"][0]
    assert "routed_experts" not in plain
    assert plain == {name: value for name, value in asked.items() if name != "routed_experts"}


def test_the_base_has_none(served):
    response = served.post("/v1/completions", ASKED | {"model": "dense"})
    assert response.status_code == 400
    assert response.json()["error"] == {
        "message": "endpoint 'dense' has no experts: 'return_routed_experts' does not apply",
        "type": "invalid_request_error",
        "param": "return_routed_experts",
        "code": "unsupported_parameter",
    }


def test_more_than_256_experts_take_two_bytes(served):
    variant = served.engine.variants["moe"]
    many = replace(variant, usage=type(variant.usage)([1, 2], 300, 2))
    ids = [np.array([[299, 3]]), np.array([[0, 256]])]
    rows = routed_rows(Segment([5], 0, served.engine.cache.reserve(0), many, routed=ids))
    assert rows.dtype == np.uint16
    assert rows.tolist() == [[[299, 3], [0, 256]]]


def test_nothing_is_left_running(served, wait_until):
    wait_until(lambda: served.idle)
