"""Whatever a client sends, it gets an error object that says what is wrong, and the server goes on."""

import json

import pytest

NUMBERS = {
    "temperature": "invalid_value",
    "top_p": "invalid_value",
    "top_k": None,  # -1 means all tokens, as in vLLM
    "min_p": "invalid_value",
    "seed": None,
    "max_tokens": "invalid_value",
    "n": "invalid_value",
    "key_version": "invalid_value",
    "presence_penalty": None,
    "frequency_penalty": None,
    "repetition_penalty": "invalid_value",
    "min_tokens": "invalid_value",
    "logprobs": "invalid_value",
}
COMPLETION = {"model": "some", "prompt": "x", "max_tokens": 1}
CHAT = {"model": "some", "messages": [{"role": "user", "content": "x"}], "max_tokens": 1}
MESSAGE = {"role": "user", "content": "x"}


def refused(response, status=400):
    """The error of a refusal, which must have the one shape that clients know."""
    assert response.status_code == status, response.text
    body = response.json()
    assert set(body) == {"error"}
    assert set(body["error"]) == {"message", "type", "param", "code"}
    assert "X-Request-Id" in response.headers
    assert "NaN" not in response.text
    assert "detail" not in body
    return body["error"]


def send_raw(served, text, path="/v1/completions"):
    content = text if isinstance(text, bytes) else text.encode()
    return served.request("POST", path, content=content, headers={"Content-Type": "application/json"})


@pytest.mark.parametrize("field", NUMBERS)
@pytest.mark.parametrize("literal", ["NaN", "Infinity", "-Infinity", "1e999", "-1e999"])
def test_numbers_that_are_not_finite_are_invalid_json(served, field, literal):
    text = json.dumps(COMPLETION | {field: 0}).replace(f'"{field}": 0', f'"{field}": {literal}')
    assert refused(send_raw(served, text))["code"] == "invalid_json"


@pytest.mark.parametrize(("field", "code"), NUMBERS.items())
def test_minus_one_is_refused_where_it_means_nothing(served, field, code):
    response = served.post("/v1/completions", COMPLETION | {field: -1})
    if code is None:
        assert response.status_code == 200
    else:
        error = refused(response)
        assert (error["code"], error["param"]) == (code, field)


@pytest.mark.parametrize("field", sorted(NUMBERS.keys() - {"top_k", "seed", "max_tokens", "key_version"}))
@pytest.mark.parametrize("value", [999999, 10**12, 2**64, 10**30, 1e300])
def test_huge_numbers_are_refused(served, field, value):
    error = refused(served.post("/v1/completions", COMPLETION | {field: value}))
    assert error["code"] in ("invalid_value", "invalid_type")
    assert error["param"] == field


@pytest.mark.parametrize("field", NUMBERS)
@pytest.mark.parametrize("value", ["5", True, [1], {"a": 1}])
def test_numbers_of_another_type_are_refused(served, field, value):
    error = refused(served.post("/v1/completions", COMPLETION | {field: value}))
    assert (error["code"], error["param"]) == ("invalid_type", field)


@pytest.mark.parametrize(
    ("fields", "param", "code"),
    [
        ({"model": None}, "model", "invalid_value"),
        ({"model": 5}, "model", "invalid_type"),
        ({"model": ""}, "model", "invalid_value"),
        ({"model": "m" * 10_000}, "model", "invalid_value"),
        ({"prompt": ""}, "prompt", "invalid_value"),
        ({"prompt": None}, "prompt", "invalid_value"),
        ({"prompt": []}, "prompt", "invalid_value"),
        ({"prompt": [[]]}, "prompt.0", "invalid_value"),
        ({"prompt": ["a", ""]}, "prompt.1", "invalid_value"),
        ({"prompt": ["a", 5]}, "prompt.1", "invalid_type"),
        ({"prompt": [1, "a"]}, "prompt.1", "invalid_type"),
        ({"prompt": [1, 2.5]}, "prompt.1", "invalid_type"),
        ({"prompt": [True]}, "prompt.0", "invalid_type"),
        ({"prompt": 5}, "prompt", "invalid_type"),
        ({"prompt": {"a": 1}}, "prompt", "invalid_type"),
        ({"prompt": [10**9]}, "prompt.0", "invalid_value"),
        ({"prompt": [-1]}, "prompt.0", "invalid_value"),
        ({"prompt": [[1, 259]]}, "prompt.1", "invalid_value"),
        ({"prompt": ["a"] * 65}, "prompt", "invalid_value"),
        ({"stop": ""}, "stop.0", "invalid_value"),
        ({"stop": ["a", ""]}, "stop.1", "invalid_value"),
        ({"stop": ["a"] * 5}, "stop", "invalid_value"),
        ({"stop": 5}, "stop", "invalid_type"),
        ({"stop": [5]}, "stop.0", "invalid_type"),
        ({"stop_token_ids": [-1]}, "stop_token_ids.0", "invalid_value"),
        ({"stop_token_ids": [259]}, "stop_token_ids.0", "invalid_value"),
        ({"stop_token_ids": ["1"]}, "stop_token_ids.0", "invalid_type"),
        ({"stop_token_ids": list(range(129))}, "stop_token_ids", "invalid_value"),
        ({"max_tokens": 0}, "max_tokens", "invalid_value"),
        ({"max_tokens": 1.5}, "max_tokens", "invalid_type"),
        ({"max_tokens": 10**12}, "max_tokens", "invalid_value"),
        ({"max_tokens": 100_000}, "max_tokens", "context_length_exceeded"),
        ({"n": 0}, "n", "invalid_value"),
        ({"n": 9}, "n", "invalid_value"),
        ({"n": 8, "prompt": ["a"] * 9}, "n", "invalid_value"),
        ({"temperature": 2.1}, "temperature", "invalid_value"),
        ({"top_p": 1.1}, "top_p", "invalid_value"),
        ({"stream": "true"}, "stream", "invalid_type"),
        ({"stream": 1}, "stream", "invalid_type"),
        ({"stream_options": {"include_usage": True}}, "stream_options", "invalid_value"),
        ({"stream": True, "stream_options": {"odd": 1}}, "stream_options.odd", "unsupported_parameter"),
        ({"ignore_eos": "no"}, "ignore_eos", "invalid_type"),
        ({"user": 5}, "user", "invalid_type"),
        ({"session_id": ""}, "session_id", "invalid_value"),
        ({"session_id": "a\nb"}, "session_id", "invalid_value"),
        ({"session_id": "s" * 129}, "session_id", "invalid_value"),
        ({"plasticity": "yes"}, "plasticity", "invalid_value"),
        ({"plasticity": 1}, "plasticity", "invalid_value"),
        ({"plasticity": "learn", "key_version": 0}, "plasticity", "invalid_value"),
        ({"model": "dense", "plasticity": "read"}, "plasticity", "invalid_value"),
        ({"typo": 1}, "typo", "unsupported_parameter"),
        ({"typo": None}, "typo", "unsupported_parameter"),
        ({"logprobs": -1}, "logprobs", "invalid_value"),
        ({"logprobs": 21}, "logprobs", "invalid_value"),
        ({"logprobs": 259}, "logprobs", "invalid_value"),
        ({"logprobs": True}, "logprobs", "invalid_type"),
        ({"logprobs": 1.5}, "logprobs", "invalid_type"),
        ({"top_logprobs": 2}, "top_logprobs", "unsupported_parameter"),
        ({"echo": 0}, "echo", "invalid_type"),
        ({"echo": "yes"}, "echo", "invalid_type"),
        ({"max_tokens": 0, "echo": False}, "max_tokens", "invalid_value"),
        ({"max_tokens": -1, "echo": True}, "max_tokens", "invalid_value"),
        ({"best_of": 2}, "best_of", "unsupported_parameter"),
        ({"suffix": "x"}, "suffix", "unsupported_parameter"),
        ({"logit_bias": {"999999": 5}}, "logit_bias", "invalid_value"),
        ({"logit_bias": {"259": 5}}, "logit_bias", "invalid_value"),
        ({"logit_bias": {"9" * 400: 5}}, "logit_bias", "invalid_value"),
        ({"logit_bias": {"-1": 5}}, "logit_bias", "invalid_value"),
        ({"logit_bias": {"01": 5}}, "logit_bias", "invalid_value"),
        ({"logit_bias": {"٣": 5}}, "logit_bias", "invalid_value"),
        ({"logit_bias": {"a": 5}}, "logit_bias", "invalid_value"),
        ({"logit_bias": {"": 5}}, "logit_bias", "invalid_value"),
        ({"logit_bias": {"5": 100.5}}, "logit_bias", "invalid_value"),
        ({"logit_bias": {"5": -101}}, "logit_bias", "invalid_value"),
        ({"logit_bias": {"5": 10**30}}, "logit_bias", "invalid_value"),
        ({"logit_bias": {"5": "1"}}, "logit_bias", "invalid_type"),
        ({"logit_bias": {"5": True}}, "logit_bias", "invalid_type"),
        ({"logit_bias": {"5": None}}, "logit_bias", "invalid_type"),
        ({"logit_bias": {"5": [1]}}, "logit_bias", "invalid_type"),
        ({"logit_bias": [[5, 1]]}, "logit_bias", "invalid_type"),
        ({"logit_bias": "5"}, "logit_bias", "invalid_type"),
        ({"logit_bias": {str(i): 1 for i in range(1025)}}, "logit_bias", "invalid_value"),
        ({"presence_penalty": 2.5}, "presence_penalty", "invalid_value"),
        ({"frequency_penalty": -2.5}, "frequency_penalty", "invalid_value"),
        ({"repetition_penalty": 0}, "repetition_penalty", "invalid_value"),
        ({"repetition_penalty": 10.5}, "repetition_penalty", "invalid_value"),
        ({"min_tokens": 2}, "min_tokens", "invalid_value"),
        ({"min_tokens": 0.5}, "min_tokens", "invalid_type"),
        ({"model": "dense", "return_routed_experts": True}, "return_routed_experts", "unsupported_parameter"),
        ({"return_routed_experts": 1}, "return_routed_experts", "invalid_type"),
        (
            {"stream": True, "stream_options": {"continuous_usage_stats": 1}},
            "stream_options.continuous_usage_stats",
            "invalid_type",
        ),
        ({"prompt_logprobs": 1}, "prompt_logprobs", "unsupported_parameter"),
        ({"length_penalty": 1.2}, "length_penalty", "unsupported_parameter"),
        ({"bad_words": ["a"]}, "bad_words", "unsupported_parameter"),
        ({"return_token_ids": True}, "return_token_ids", "unsupported_parameter"),
        ({"flow_steps": 4}, "flow_steps", "unsupported_parameter"),
    ],
)
def test_a_completion_field_out_of_range_is_named(served, fields, param, code):
    error = refused(served.post("/v1/completions", COMPLETION | fields))
    if code != "context_length_exceeded":
        assert error["param"] == param, error
    assert error["code"] == code, error
    assert error["type"] == "invalid_request_error"


@pytest.mark.parametrize(
    ("fields", "param", "code"),
    [
        ({"messages": []}, "messages", "invalid_value"),
        ({"messages": None}, "messages", "invalid_value"),
        ({"messages": "hi"}, "messages", "invalid_type"),
        ({"messages": [5]}, "messages.0", "invalid_type"),
        ({"messages": [MESSAGE | {"role": "owner"}]}, "messages.0.role", "invalid_value"),
        ({"messages": [{"content": "x"}]}, "messages.0.role", "invalid_value"),
        ({"messages": [{"role": "user"}]}, "messages.0.content", "invalid_value"),
        ({"messages": [MESSAGE | {"content": 5}]}, "messages.0.content", "invalid_type"),
        ({"messages": [MESSAGE | {"odd": 5}]}, "messages.0.odd", "unsupported_parameter"),
        (
            {"messages": [MESSAGE | {"content": [{"type": "image_url"}]}]},
            "messages.0.content.0.type",
            "invalid_value",
        ),
        (
            {"messages": [{"role": "assistant", "content": "x"}]},
            "messages",
            "invalid_value",
        ),  # the template's
        ({"max_completion_tokens": 2}, "max_completion_tokens", "invalid_value"),
        ({"prompt": "x"}, "prompt", "unsupported_parameter"),
        ({"tools": [{"type": "function"}]}, "tools", "unsupported_parameter"),
        ({"tool_choice": "required"}, "tool_choice", "unsupported_parameter"),
        ({"response_format": {"type": "xml"}}, "response_format.type", "invalid_value"),
        ({"functions": [{}]}, "functions", "unsupported_parameter"),
        ({"logprobs": 1}, "logprobs", "invalid_type"),
        ({"top_logprobs": 3}, "top_logprobs", "invalid_value"),
        ({"logprobs": False, "top_logprobs": 3}, "top_logprobs", "invalid_value"),
        ({"logprobs": True, "top_logprobs": 21}, "top_logprobs", "invalid_value"),
        ({"logprobs": True, "top_logprobs": -1}, "top_logprobs", "invalid_value"),
        ({"logprobs": True, "top_logprobs": True}, "top_logprobs", "invalid_type"),
        ({"max_tokens": 0}, "max_tokens", "invalid_value"),
        ({"echo": True}, "echo", "unsupported_parameter"),
        ({"min_tokens": 5}, "min_tokens", "invalid_value"),
        ({"logit_bias": {"259": 1}}, "logit_bias", "invalid_value"),
        ({"modalities": ["audio"]}, "modalities", "unsupported_parameter"),
        ({"audio": {}}, "audio", "unsupported_parameter"),
        ({"prediction": {}}, "prediction", "unsupported_parameter"),
        ({"store": True}, "store", "unsupported_parameter"),
        ({"metadata": {"a": "b"}}, "metadata", "unsupported_parameter"),
    ],
)
def test_a_chat_field_out_of_range_is_named(served, fields, param, code):
    error = refused(served.post("/v1/chat/completions", CHAT | fields))
    assert (error["param"], error["code"]) == (param, code), error


@pytest.mark.parametrize("literal", ["NaN", "Infinity", "1e999", "-1e999"])
def test_a_bias_that_is_not_finite_is_invalid_json(served, literal):
    text = json.dumps(COMPLETION | {"logit_bias": {"5": 0}}).replace('"5": 0', f'"5": {literal}')
    assert refused(send_raw(served, text))["code"] == "invalid_json"


@pytest.mark.parametrize(
    "fields",
    [
        {"repetition_penalty": 1e-300},
        {"repetition_penalty": 10, "temperature": 0.001},
        {"repetition_penalty": 1e-300, "temperature": 0.001, "frequency_penalty": -2},
        {"logit_bias": {str(token): -100 for token in range(259)}},
        {"logit_bias": {"5": 100}, "temperature": 0.001, "top_p": 0.0},
        {"min_tokens": 4, "stop_token_ids": list(range(128)), "top_k": 1},
    ],
)
def test_extremes_that_are_allowed_are_answered(served, fields):
    answer = served.post("/v1/completions", COMPLETION | {"max_tokens": 4, "logprobs": 20} | fields)
    assert answer.status_code == 200, answer.text


@pytest.mark.parametrize(
    "text",
    [
        b"{",
        b'{"model": "some", "prompt": "\\ud800"}',
        b'{"model": "some", "prompt": "\xff"}',
        b"[" * 100 + b"]" * 100,
        b'{"model": "some", "prompt": ' + b"[" * 65 + b"]" * 65 + b"}",
        b'{"a":' * 65 + b"1" + b"}" * 65,
        b"[" + b"{}," * 30_000 + b"{}]",
        b"{" + b",".join(b'"k%d":1' % i for i in range(60_000)) + b"}",
        b"nonsense",
        b'{"model": "some" "prompt": "x"}',
    ],
    ids=[
        "cut",
        "surrogate",
        "utf8",
        "brackets",
        "nested",
        "objects",
        "containers",
        "members",
        "word",
        "comma",
    ],
)
def test_malformed_json_is_refused(served, text):
    assert refused(send_raw(served, text))["code"] == "invalid_json"


@pytest.mark.parametrize("text", [b"[]", b'"text"', b"5", b"null", b"true"])
def test_a_body_that_is_no_object_is_refused(served, text):
    assert refused(send_raw(served, text))["code"] in ("invalid_type", "invalid_value")


def test_thousands_of_unknown_fields_are_refused_at_once(served):
    error = refused(served.post("/v1/completions", {f"field{i}": i for i in range(40_000)}))
    assert error["code"] == "unsupported_parameter"
    assert "40000" in error["message"]


def test_an_empty_body_is_refused(served):
    assert refused(send_raw(served, b""))["message"] == "a JSON body is required"


def test_brackets_inside_strings_are_only_text(served):
    prompt = "[" * 200 + '\\"{'
    assert served.post("/v1/completions", COMPLETION | {"prompt": prompt}).status_code == 200


@pytest.mark.parametrize(
    "media_type", ["text/plain", "application/x-www-form-urlencoded", "", "application/jsonx"]
)
def test_another_media_type_is_415(served, media_type):
    content = json.dumps(COMPLETION).encode()
    response = served.request(
        "POST", "/v1/completions", content=content, headers={"Content-Type": media_type}
    )
    assert refused(response, 415)["code"] == "unsupported_media_type"


def test_an_unknown_model_is_404(served):
    error = refused(served.post("/v1/completions", COMPLETION | {"model": "gpt"}), 404)
    assert (error["code"], error["param"]) == ("model_not_found", "model")
    assert refused(served.post("/gpt/v1/completions", COMPLETION), 404)["code"] == "model_not_found"


def test_an_unknown_route_is_404_and_a_wrong_method_405(served):
    assert refused(served.get("/v1/nothing"), 404)["code"] == "not_found"
    response = served.get("/v1/completions")
    assert refused(response, 405)["code"] == "method_not_allowed"
    assert response.headers["Allow"] == "POST"
    assert refused(served.get("/v1/models/"), 404)["code"] == "not_found"


def test_a_prompt_longer_than_the_context_is_refused(served):
    error = refused(served.post("/v1/completions", COMPLETION | {"prompt": "x" * 4096}))
    assert error["code"] == "context_length_exceeded"
    assert "4096" in error["message"]
    long_chat = CHAT | {"messages": [{"role": "user", "content": "x" * 5000}]}
    assert refused(served.post("/v1/chat/completions", long_chat))["code"] == "context_length_exceeded"


def test_a_hopelessly_long_prompt_is_refused_without_encoding_all_of_it(served, tokenizer, monkeypatch):
    encoded = []
    backend = type(tokenizer).encode
    monkeypatch.setattr(
        type(tokenizer),
        "encode",
        lambda self, text, **options: encoded.append(len(text)) or backend(self, text),
    )
    error = refused(served.post("/v1/completions", COMPLETION | {"prompt": "x" * 1_500_000}))
    assert error["code"] == "context_length_exceeded"
    assert sum(encoded) < 50_000


@pytest.mark.parametrize("stream", [False, True])
def test_an_unknown_key_version_is_409_and_not_to_be_retried(served, stream):
    response = served.post("/v1/completions", COMPLETION | {"key_version": 12345, "stream": stream})
    assert refused(response, 409)["code"] == "key_version_unavailable"
    assert response.headers["x-should-retry"] == "false"


def test_a_body_over_the_limit_is_413(served):
    assert refused(send_raw(served, b" " * (2 * 1024 * 1024 + 1)), 413)["code"] == "request_too_large"


def test_an_unexpected_failure_is_a_constant_text_with_the_request_id(served, monkeypatch, log_lines):
    def explode(self, text, **options):
        raise RuntimeError("canary secret")

    monkeypatch.setattr(type(served.state.registry.get("some").tokenizer), "encode", explode)
    response = served.post("/v1/completions", COMPLETION, headers={"X-Request-Id": "abc"})
    error = refused(response, 500)
    assert error["message"].endswith("abc")
    assert "canary" not in response.text
    logged = "\n".join(log_lines)
    assert "RuntimeError" in logged
    assert "canary" not in logged


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({"prompt": "a", "messages": [MESSAGE]}, "prompt"),
        ({}, "prompt"),
        ({"prompt": 5}, "prompt"),
        ({"odd": 1}, "odd"),
    ],
)
def test_bad_tokenize_bodies_are_named(served, body, param):
    assert refused(served.post("/tokenize", body))["param"] == param


@pytest.mark.parametrize("tokens", [[-1], [259], ["a"], "abc", None, [1.5]])
def test_bad_tokens_are_refused(served, tokens):
    assert refused(served.post("/detokenize", {"tokens": tokens}))["param"].startswith("tokens")


def test_nothing_of_all_this_is_left_running(served, wait_until):
    wait_until(lambda: served.idle)
