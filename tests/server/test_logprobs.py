"""Log-probabilities against a full forward pass, in both dialects, whole and streamed."""

import json
import math
from concurrent.futures import ThreadPoolExecutor

import openai
import pytest
import torch

PROMPT = "It was the best of times, it was the worst of times, it was the age of wisdom"  # two chunks
GREEDY = {"model": "dense", "prompt": PROMPT, "temperature": 0, "max_tokens": 8, "ignore_eos": True}
VARIANTS = ("dense", "some", "moe", "mom", "fm-moe")


@pytest.fixture(scope="module")
def reference(make_tiny, tokenizer):
    """reference(model, tokens): log-probabilities (T, V) after each token, from one pass over all of them."""
    made = {}

    def log_probabilities(model, tokens):
        if model not in made:
            kind = "some" if model == "dense" else model
            made[model] = make_tiny(
                torch.float32, kind, vocab_size=tokenizer.vocab_size, max_position_embeddings=4096
            )
        return made[model].logits(list(tokens), plain=model == "dense").log_softmax(-1)

    return log_probabilities


def completion(served, path="/v1/completions", **fields):
    response = served.post(path, GREEDY | {"plasticity": "off"} | fields)
    assert response.status_code == 200, response.text
    return response.json()


def streamed(served, chunks, **fields):
    response = served.post("/v1/completions", GREEDY | {"plasticity": "off", "stream": True} | fields)
    assert response.status_code == 200, response.text
    return chunks(response)


def chat(served, **fields):
    body = {k: v for k, v in GREEDY.items() if k != "prompt"} | {
        "messages": [{"role": "user", "content": "tell me"}],
        "logprobs": True,
    }
    return served.post("/v1/chat/completions", body | fields)


def joined(parts):
    """The arrays of a stream's chunks, one after another."""
    arrays = {"tokens": [], "token_logprobs": [], "top_logprobs": [], "text_offset": []}
    for part in parts:
        for name in arrays:
            arrays[name] += part[name]
    return arrays


def check(arrays, tokens, expected, tokenizer, top, first=0):
    """Each token's entry against log-probabilities (T, V) of a full pass; `first` tokens came before them."""
    assert len({len(values) for values in arrays.values()}) == 1
    for i, (value, likeliest) in enumerate(
        zip(arrays["token_logprobs"], arrays["top_logprobs"], strict=True), first
    ):
        if i == 0:
            assert value is likeliest is None
            continue
        row = expected[i - 1]
        assert value == pytest.approx(float(row[tokens[i]]), abs=1e-4)
        assert top <= len(likeliest) <= top + 1
        assert value in likeliest.values()
        assert list(likeliest.values())[:top] == pytest.approx(row.topk(top).values.tolist(), abs=1e-4)
        spelled = {tokenizer.token_bytes(token).decode(errors="replace"): token for token in range(128)}
        for text, each in likeliest.items():
            if text in spelled:
                assert each == pytest.approx(float(row[spelled[text]]), abs=1e-4)


@pytest.mark.parametrize("model", VARIANTS)
def test_a_scored_prompt_equals_a_full_forward_pass(served, reference, tokenizer, model):
    answer = completion(served, model=model, echo=True, max_tokens=0, logprobs=3)
    choice, tokens = answer["choices"][0], tokenizer.encode(PROMPT)
    assert choice["text"] == PROMPT
    assert choice["finish_reason"] == "length"
    assert answer["usage"] == {
        "prompt_tokens": len(tokens),
        "completion_tokens": 0,
        "total_tokens": len(tokens),
        "prompt_tokens_details": {"cached_tokens": 0},
    }
    assert choice["logprobs"]["tokens"] == list(PROMPT)
    assert choice["logprobs"]["text_offset"] == list(range(len(PROMPT)))
    check(choice["logprobs"], tokens, reference(model, tokens), tokenizer, 3)


@pytest.mark.parametrize("model", VARIANTS)
@pytest.mark.parametrize(
    "sampling",
    [
        {},
        {"temperature": 1.7, "seed": 3, "top_p": 0.9, "frequency_penalty": 1.5, "logit_bias": {"70": 4}},
    ],
    ids=["greedy", "sampled"],
)
def test_generated_tokens_have_the_models_own_probabilities(served, reference, tokenizer, model, sampling):
    fields = {"model": model, "logprobs": 2} | sampling
    alone, echoed = completion(served, **fields), completion(served, echo=True, **fields)
    choice, prompt = echoed["choices"][0], tokenizer.encode(PROMPT)
    assert choice["text"] == PROMPT + alone["choices"][0]["text"]
    assert echoed["usage"]["total_tokens"] == alone["usage"]["total_tokens"]
    table = {text_of(tokenizer, token): token for token in range(tokenizer.vocab_size)}
    tokens = [table[text] for text in choice["logprobs"]["tokens"]]
    assert tokens[: len(prompt)] == prompt
    expected = reference(model, tokens)
    check(choice["logprobs"], tokens, expected, tokenizer, 2)
    check(alone["choices"][0]["logprobs"], tokens, expected, tokenizer, 2, first=len(prompt))
    shifted = [offset + len(PROMPT) for offset in alone["choices"][0]["logprobs"]["text_offset"]]
    assert choice["logprobs"]["text_offset"][len(prompt) :] == shifted


def text_of(tokenizer, token):
    try:
        return tokenizer.token_bytes(token).decode()
    except UnicodeDecodeError:
        return "bytes:" + "".join(f"\\x{byte:02x}" for byte in tokenizer.token_bytes(token))


def loglikelihood(choice, context_tokens):
    """As EleutherAI's lm-evaluation-harness reads it: the sum over the continuation, and whether it is greedy."""
    values = choice["logprobs"]["token_logprobs"][context_tokens:-1]
    tops = choice["logprobs"]["top_logprobs"][context_tokens:-1]
    return sum(values), all(value == max(top.values()) for value, top in zip(values, tops, strict=True))


def test_lm_eval_reads_the_likelihood_of_a_continuation(served, reference, tokenizer):
    context = tokenizer.encode(PROMPT)
    rows = reference("dense", context)
    greedy, other = int(rows[-1].argmax()), int(rows[-1].argmin())
    request = {"max_tokens": 1, "logprobs": 1, "seed": 1234, "echo": True}
    prompts = [[*context, greedy], [*context, other]]
    for choice, token, is_greedy in zip(
        completion(served, prompt=prompts, **request)["choices"], (greedy, other), (True, False), strict=True
    ):
        total, found_greedy = loglikelihood(choice, len(context))
        assert total == pytest.approx(float(rows[-1, token]), abs=1e-4)
        assert found_greedy is is_greedy


def test_the_token_that_ends_an_answer_has_an_entry_though_no_text(served, write):
    write("")
    choice = completion(served, max_tokens=1, logprobs=0, ignore_eos=False)["choices"][0]
    assert (choice["text"], choice["finish_reason"]) == ("", "stop")
    assert choice["logprobs"]["tokens"] == ["<|end|>"]
    assert choice["logprobs"]["token_logprobs"] == pytest.approx([0.0])
    assert choice["logprobs"]["text_offset"] == [0]


@pytest.mark.parametrize("echo", [False, True])
@pytest.mark.parametrize("logprobs", [0, 4])
def test_streamed_arrays_equal_the_whole_ones(served, chunks, echo, logprobs):
    fields = {
        "prompt": [PROMPT, "two"],
        "n": 2,
        "echo": echo,
        "logprobs": logprobs,
        "seed": 5,
        "temperature": 1,
    }
    whole = completion(served, **fields)
    pieces = [piece["choices"][0] for piece in streamed(served, chunks, **fields)]
    for choice in whole["choices"]:
        own = [piece for piece in pieces if piece["index"] == choice["index"]]
        assert "".join(piece["text"] for piece in own) == choice["text"]
        assert joined(p["logprobs"] for p in own if p["logprobs"] is not None) == choice["logprobs"]
    texts = [choice["text"] for choice in whole["choices"]]
    assert len(set(texts)) == 4
    assert [
        text.startswith(prompt) for text, prompt in zip(texts, [PROMPT, PROMPT, "two", "two"], strict=True)
    ] == [echo] * 4


def test_echo_without_logprobs_and_without_tokens_is_the_prompt(served, chunks):
    assert completion(served, echo=True, max_tokens=0)["choices"][0]["text"] == PROMPT
    pieces = streamed(served, chunks, echo=True, max_tokens=0)
    assert "".join(piece["choices"][0]["text"] for piece in pieces) == PROMPT
    assert pieces[-1]["choices"][0]["finish_reason"] == "length"
    answer = completion(served, echo=True, prompt="<|user|>hé", max_tokens=2)["choices"][0]
    assert answer["text"].startswith("<|user|>hé")
    assert answer["logprobs"] is None


def test_a_prompt_of_one_token_has_nothing_to_be_scored_by(served):
    choice = completion(served, prompt="a", echo=True, max_tokens=0, logprobs=2)["choices"][0]
    assert choice["logprobs"] == {
        "tokens": ["a"],
        "token_logprobs": [None],
        "top_logprobs": [None],
        "text_offset": [0],
    }


@pytest.mark.parametrize("stop", ["o w", "ö", "🌍", "never"])
def test_arrays_are_cut_where_the_text_is(served, write, chunks, stop):
    text = "hello wörld 🌍!"
    write(text)
    fields = {"stop": stop, "max_tokens": 100, "logprobs": 1, "ignore_eos": False}
    choice = completion(served, **fields)["choices"][0]
    kept = text.partition(stop)[0]
    assert choice["text"] == kept
    ending = [] if stop in text else ["<|end|>"]
    spelled = ["bytes:\\x" + f"{b:02x}" if b > 127 else chr(b) for b in kept.encode()]
    assert choice["logprobs"]["tokens"] == spelled + ending
    offsets = [i for i, character in enumerate(kept) for _ in character.encode()]
    assert choice["logprobs"]["text_offset"] == offsets + [len(kept)] * len(ending)
    pieces = [piece["choices"][0] for piece in streamed(served, chunks, **fields)]
    assert joined(p["logprobs"] for p in pieces if p["logprobs"] is not None) == choice["logprobs"]


def test_a_stop_string_at_once_leaves_empty_arrays(served, write):
    write("xyz")
    choice = completion(served, stop="x", logprobs=1)["choices"][0]
    assert choice["logprobs"] == {"tokens": [], "token_logprobs": [], "top_logprobs": [], "text_offset": []}


def test_chat_lists_tokens_with_their_bytes_and_alternatives(served, reference, tokenizer, chunks):
    whole = chat(served, top_logprobs=3).json()["choices"][0]
    content = whole["logprobs"]["content"]
    assert whole["logprobs"]["refusal"] is None
    assert len(content) == 8
    prompt = tokenizer.encode_chat([{"role": "user", "content": "tell me"}])
    table = {tokenizer.token_bytes(token): token for token in range(tokenizer.vocab_size)}
    tokens = [table[bytes(each["bytes"])] for each in content]
    rows = reference("dense", prompt + tokens)[len(prompt) - 1 :]
    for each, token, row in zip(content, tokens, rows[:-1], strict=True):
        assert set(each) == {"token", "logprob", "bytes", "top_logprobs"}
        assert each["logprob"] == pytest.approx(float(row[token]), abs=1e-4)
        alternatives = each["top_logprobs"]
        assert [a["logprob"] for a in alternatives] == pytest.approx(row.topk(3).values.tolist(), abs=1e-4)
        assert alternatives[0] == {k: v for k, v in each.items() if k != "top_logprobs"}  # greedy
    written = [bytes(each["bytes"]) for each, t in zip(content, tokens, strict=True) if t < 256]
    assert b"".join(written).decode(errors="replace") == whole["message"]["content"]
    pieces = [piece["choices"][0] for piece in chunks(chat(served, top_logprobs=3, stream=True))]
    assert [t for p in pieces if p["logprobs"] is not None for t in p["logprobs"]["content"]] == content


def test_chat_without_alternatives_has_an_empty_list(served):
    content = chat(served).json()["choices"][0]["logprobs"]["content"]
    assert [each["top_logprobs"] for each in content] == [[]] * 8
    assert chat(served, logprobs=False, top_logprobs=0).json()["choices"][0]["logprobs"] is None


def test_asking_for_logprobs_changes_nothing_else(served):
    for fields in ({}, {"temperature": 1.0, "seed": 8}):
        plain, scored = completion(served, **fields), completion(served, logprobs=20, **fields)
        assert plain["choices"][0]["text"] == scored["choices"][0]["text"]
        assert plain["choices"][0]["logprobs"] is None


def test_scoring_in_a_batch_equals_scoring_alone(served):
    work = [
        {"model": model, "prompt": f"{n} {PROMPT}", "echo": n % 2 == 0, "logprobs": n, "max_tokens": 3}
        for n in range(3)
        for model in VARIANTS
    ]
    alone = [completion(served, **fields)["choices"] for fields in work]
    with ThreadPoolExecutor(len(work)) as pool:
        assert list(pool.map(lambda fields: completion(served, **fields)["choices"], work)) == alone


def test_streams_get_their_tokens_before_a_prompt_is_scored(served, monkeypatch, wait_until):
    order = []
    engine = served.engine
    deliver, score = engine._deliver, engine._score_prompt

    def delivering(sequence, *rest):
        order.append(("token", sequence.report.scores_prompt))
        deliver(sequence, *rest)

    def scoring(*arguments):
        order.append(("score", True))
        score(*arguments)

    monkeypatch.setattr(engine, "_deliver", delivering)
    monkeypatch.setattr(engine, "_score_prompt", scoring)
    with ThreadPoolExecutor(2) as pool:
        writing = pool.submit(completion, served, max_tokens=400)
        wait_until(lambda: len(order) > 3)
        completion(served, echo=True, logprobs=1, max_tokens=1)
        writing.result()
    scored = order.index(("score", True))
    assert order[scored - 1] == ("token", False)
    assert ("token", True) in order[scored:]


@pytest.mark.parametrize("fields", [{"echo": True, "max_tokens": 0}, {"echo": True}, {}])
def test_a_broken_model_is_an_error_and_never_nan(served, monkeypatch, wait_until, fields):
    model = served.engine.model
    monkeypatch.setattr(model, "logits", lambda hidden, wanted=None: torch.full((len(hidden), 259), math.nan))
    response = served.post("/v1/completions", GREEDY | {"logprobs": 2} | fields)
    assert response.status_code == 500
    assert response.json()["error"]["code"] == "internal_error"
    wait_until(lambda: served.idle)


def test_every_number_of_a_body_is_finite(served):
    def constant(name):
        raise AssertionError(name)

    response = served.post("/v1/completions", GREEDY | {"logprobs": 20, "echo": True})
    json.loads(response.text, parse_constant=constant)


def test_an_answer_of_too_many_log_probabilities_is_refused(served):
    response = served.post(
        "/v1/completions", GREEDY | {"prompt": ["a"] * 8, "n": 8, "max_tokens": 900, "logprobs": 20}
    )
    assert response.status_code == 400
    assert response.json()["error"]["param"] == "logprobs"
    assert "500000" in response.json()["error"]["message"]


def test_openais_client_reads_logprobs(url):
    with openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0) as client:
        extra = {"ignore_eos": True, "plasticity": "off"}
        whole = client.completions.create(
            model="some", prompt="abc", echo=True, logprobs=2, max_tokens=2, temperature=0, extra_body=extra
        ).choices[0]
        assert len(whole.logprobs.tokens) == 5
        assert whole.logprobs.token_logprobs[0] is None
        assert max(whole.logprobs.top_logprobs[4].values()) == whole.logprobs.token_logprobs[4]
        messages = [{"role": "user", "content": "hi"}]
        asked = {"model": "some", "messages": messages, "logprobs": True, "top_logprobs": 2}
        told = client.chat.completions.create(**asked, max_tokens=3, temperature=0, extra_body=extra)
        content = told.choices[0].logprobs.content
        assert [len(each.top_logprobs) for each in content] == [2, 2, 2]
        stream = client.chat.completions.create(
            **asked, max_tokens=3, temperature=0, stream=True, extra_body=extra
        )
        pieces = [c.choices[0].logprobs for c in stream]
        assert [token for piece in pieces if piece for token in piece.content] == content


def test_nothing_is_left_running(served, wait_until):
    wait_until(lambda: served.idle)


def test_a_prompt_that_is_only_scored_teaches_when_asked_to_and_not_otherwise(served):
    def told(**fields):
        return completion(served, model="some", echo=True, **({"plasticity": None} | fields))["libration"]

    scored = told(max_tokens=0, logprobs=1)
    assert (scored["plasticity"], scored["learned_tokens"]) == ("read", 0)
    assert told(max_tokens=0, plasticity="learn")["learned_tokens"] > 0
    assert told(max_tokens=1)["plasticity"] == "learn"
    assert told(max_tokens=1, logprobs=1)["plasticity"] == "read", "as lm-eval scores prompts"
