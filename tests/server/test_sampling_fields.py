"""Penalties, biases and least lengths, from the request's body to the text."""

import pytest
import torch

from server.engine import choosing
from server.routes.logprobs import token_text

PROMPT = "say it again, say it again"
GREEDY = {"model": "dense", "prompt": PROMPT, "temperature": 0, "max_tokens": 16, "ignore_eos": True}


def completion(served, **fields):
    response = served.post("/v1/completions", GREEDY | fields)
    assert response.status_code == 200, response.text
    return response.json()


def tokens_of(served, **fields):
    """The generated tokens as the log-probabilities spell them."""
    return completion(served, logprobs=0, **fields)["choices"][0]["logprobs"]["tokens"]


def naive(tiny, prompt, count, presence=0.0, frequency=0.0, repetition=1.0, bias=()):
    """Greedy writing with each rule spelled out, one token after another."""
    written = []
    for _ in range(count):
        logits = tiny.logits([*prompt, *written], plain=True)[-1].tolist()
        for token, added in dict(bias).items():
            logits[token] += added
        for token in {*prompt, *written}:
            logits[token] = logits[token] / repetition if logits[token] > 0 else logits[token] * repetition
        for token in set(written):
            logits[token] -= presence + frequency * written.count(token)
        written.append(max(range(len(logits)), key=logits.__getitem__))
    return written


@pytest.mark.parametrize(
    "fields",
    [
        {"presence_penalty": 1.5},
        {"frequency_penalty": 0.7},
        {"frequency_penalty": -2, "repetition_penalty": 6},
        {"repetition_penalty": 1.8},
        {"repetition_penalty": 0.3},
        {"logit_bias": {"10": 9.5, "200": -30}},
        {
            "presence_penalty": -0.5,
            "frequency_penalty": 1,
            "repetition_penalty": 1.2,
            "logit_bias": {"40": 5},
        },
    ],
)
def test_greedy_text_follows_the_rules_spelled_out(served, make_tiny, tokenizer, fields):
    tiny = make_tiny(torch.float32, vocab_size=tokenizer.vocab_size, max_position_embeddings=4096)
    expected = naive(
        tiny,
        tokenizer.encode(PROMPT),
        16,
        fields.get("presence_penalty", 0.0),
        fields.get("frequency_penalty", 0.0),
        fields.get("repetition_penalty", 1.0),
        {int(token): bias for token, bias in fields.get("logit_bias", {}).items()},
    )
    written = tokens_of(served, **fields)
    assert written == [token_text(tokenizer, token) for token in expected]
    assert written != tokens_of(served)


def test_a_strong_bias_decides_in_greedy_and_in_sampled_text(served, tokenizer):
    (token,) = tokenizer.encode("Q")
    for sampling in ({}, {"temperature": 1.5, "seed": 1}):
        answer = completion(served, logit_bias={str(token): 100}, max_tokens=5, **sampling)
        assert answer["choices"][0]["text"] == "QQQQQ"
    banned = completion(served, logit_bias={str(t): -100 for t in range(256) if t != token}, max_tokens=5)
    assert set(banned["choices"][0]["text"]) <= {"Q"}


def test_chat_takes_the_same_fields(served, tokenizer):
    (token,) = tokenizer.encode("Q")
    body = {k: v for k, v in GREEDY.items() if k != "prompt"} | {
        "messages": [{"role": "user", "content": "x"}]
    }
    answer = served.post("/v1/chat/completions", body | {"logit_bias": {str(token): 100}}).json()
    assert answer["choices"][0]["message"]["content"] == "Q" * 16


def test_min_tokens_puts_the_end_off(served, tokenizer):
    (stop,) = tokenizer.encode("Q")
    eager = {"logit_bias": {"256": 100}, "ignore_eos": False}
    assert completion(served, **eager)["usage"]["completion_tokens"] == 1
    answer = completion(served, min_tokens=6, **eager)
    assert answer["usage"]["completion_tokens"] == 7
    assert answer["choices"][0]["finish_reason"] == "stop"
    assert completion(served, min_tokens=16, **eager)["choices"][0]["finish_reason"] == "length"
    by_id = {"logit_bias": {str(stop): 100}, "stop_token_ids": [stop]}
    assert completion(served, min_tokens=3, **by_id)["usage"]["completion_tokens"] == 4
    assert completion(served, min_tokens=3, temperature=1, **by_id)["usage"]["completion_tokens"] == 4


def test_ignored_ends_may_be_written_before_min_tokens(served):
    tokens = tokens_of(served, min_tokens=4, max_tokens=4, logit_bias={"256": 100})
    assert tokens == ["<|end|>"] * 4


def test_each_choice_counts_its_own_tokens(served):
    fields = {"temperature": 1.0, "seed": 4, "frequency_penalty": 2.0}
    alone = completion(served, n=3, **fields)["choices"]
    together = completion(served, n=3, prompt=[PROMPT, "another"], **fields)["choices"][:3]
    assert [c["text"] for c in alone] == [c["text"] for c in together]


@pytest.mark.parametrize("sampling", [{}, {"temperature": 1.0, "seed": 2}])
def test_neutral_values_take_the_plain_path(served, monkeypatch, sampling):
    def never(*arguments):
        raise AssertionError(arguments)

    plain = completion(served, **sampling)["choices"]
    monkeypatch.setattr(choosing, "adjust", never)
    monkeypatch.setattr(choosing, "score_tokens", never)
    neutral = {
        "presence_penalty": 0,
        "frequency_penalty": 0.0,
        "repetition_penalty": 1,
        "logit_bias": {},
        "min_tokens": 0,
    }
    assert completion(served, **sampling, **neutral)["choices"] == plain
