"""Completions and chat completions, whole and streamed."""

import pytest

from server.schemas.chat import ChatBody, Message, as_template_input
from server.schemas.completions import CompletionBody

PROMPT = "The quick brown fox"
GREEDY = {"model": "some", "temperature": 0, "max_tokens": 12, "ignore_eos": True}


def completion(served, prompt=PROMPT, path="/v1/completions", **fields):
    response = served.post(path, GREEDY | {"prompt": prompt} | fields)
    assert response.status_code == 200, response.text
    return response


def chat(served, text=PROMPT, **fields):
    body = GREEDY | {"messages": [{"role": "user", "content": text}]} | fields
    response = served.post("/v1/chat/completions", body)
    assert response.status_code == 200, response.text
    return response


def test_a_completion_has_openais_fields_and_ours(served):
    response = completion(served)
    answer = response.json()
    assert answer["object"] == "text_completion"
    assert answer["id"].startswith("cmpl-")
    assert answer["model"] == "some"
    assert answer["system_fingerprint"] == "fp-test"
    assert answer["choices"][0]["finish_reason"] == "length"
    assert answer["usage"] == {
        "prompt_tokens": 19,
        "completion_tokens": 12,
        "total_tokens": 31,
        "prompt_tokens_details": {"cached_tokens": 0},
    }
    assert answer["libration"] == {
        "key_version": 0,
        "scope": "tenant:default",
        "plasticity": "learn",
        "learned_tokens": 18,
    }
    assert response.headers["X-Key-Version"] == "0"


def test_the_base_model_has_no_key_version(served):
    response = completion(served, model="dense")
    assert "X-Key-Version" not in response.headers
    assert response.json()["libration"] == {
        "key_version": None,
        "scope": None,
        "plasticity": "off",
        "learned_tokens": 0,
    }


def test_streamed_completion_equals_the_whole_one(served, chunks):
    whole = completion(served).json()
    pieces = chunks(completion(served, stream=True))
    assert "".join(p["choices"][0]["text"] for p in pieces) == whole["choices"][0]["text"]
    assert [p["choices"][0]["finish_reason"] for p in pieces if p["choices"][0]["finish_reason"]] == [
        "length"
    ]
    assert all(p["system_fingerprint"] == "fp-test" for p in pieces)
    assert pieces[-1]["libration"] == whole["libration"]
    assert all("libration" not in p and "usage" not in p for p in pieces[:-1])


def test_streamed_chat_equals_the_whole_one_and_begins_with_the_role(served, chunks):
    whole = chat(served).json()
    assert whole["choices"][0]["message"]["role"] == "assistant"
    pieces = chunks(chat(served, stream=True))
    assert pieces[0]["choices"][0]["delta"] == {"role": "assistant", "content": ""}
    text = "".join(p["choices"][0]["delta"].get("content", "") for p in pieces)
    assert text == whole["choices"][0]["message"]["content"]
    assert {p["object"] for p in pieces} == {"chat.completion.chunk"}


def test_usage_comes_in_a_chunk_of_its_own_when_asked_for(served, chunks):
    whole = chat(served).json()
    pieces = chunks(chat(served, stream=True, stream_options={"include_usage": True}))
    assert all(p["usage"] is None for p in pieces[:-1])
    assert pieces[-1]["choices"] == []
    assert pieces[-1]["usage"] == whole["usage"]
    assert pieces[-1]["libration"] == whole["libration"]


def test_usage_comes_in_every_chunk_when_asked_for(served, chunks):
    options = {"include_usage": True, "continuous_usage_stats": True}
    for ask in (completion, chat):
        pieces = chunks(ask(served, stream=True, stream_options=options))
        counts = [piece["usage"]["completion_tokens"] for piece in pieces]
        assert counts == sorted(counts)
        assert counts[-1] == 12
        assert pieces[-1]["choices"] == []
        assert all(p["usage"]["prompt_tokens"] == pieces[-1]["usage"]["prompt_tokens"] for p in pieces)
    pieces = chunks(completion(served, stream=True, stream_options={"continuous_usage_stats": True}))
    assert all("usage" not in piece for piece in pieces)


def test_several_prompts_and_choices_are_indexed_in_order(served, chunks):
    alone = [completion(served, prompt).json()["choices"][0]["text"] for prompt in ("one", "two")]
    together = completion(served, ["one", "two"], n=2).json()
    assert [c["index"] for c in together["choices"]] == [0, 1, 2, 3]
    assert [c["text"] for c in together["choices"]] == [alone[0], alone[0], alone[1], alone[1]]
    assert together["usage"]["completion_tokens"] == 48
    assert together["usage"]["prompt_tokens"] == 6
    texts = [""] * 4
    pieces = chunks(completion(served, ["one", "two"], n=2, stream=True))
    for piece in pieces:
        texts[piece["choices"][0]["index"]] += piece["choices"][0]["text"]
    assert texts == [c["text"] for c in together["choices"]]
    assert [p for p in pieces if "libration" in p] == pieces[-1:]


def test_a_prompt_with_several_choices_teaches_once(served):
    assert completion(served, n=3).json()["libration"]["learned_tokens"] == 18


def test_choices_of_one_seed_differ_and_repeat(served):
    fields = {"temperature": 1.5, "seed": 11, "n": 3}
    first, second = (completion(served, **fields).json() for _ in range(2))
    texts = [c["text"] for c in first["choices"]]
    assert texts == [c["text"] for c in second["choices"]]
    assert len(set(texts)) == 3


def test_token_ids_mean_the_same_as_their_text(served, tokenizer):
    ids = tokenizer.encode(PROMPT)
    by_text = completion(served).json()["choices"][0]["text"]
    assert completion(served, ids).json()["choices"][0]["text"] == by_text
    assert completion(served, [ids]).json()["choices"][0]["text"] == by_text


def test_explicit_nulls_mean_the_default(served):
    own = {"model", "prompt", "messages", "temperature", "max_tokens", "ignore_eos"}
    for schema, ask in ((CompletionBody, completion), (ChatBody, chat)):
        nulls = dict.fromkeys((schema.model_fields.keys() | schema.neutral.keys()) - own)
        assert len(nulls) > 30
        assert ask(served, **nulls).json()["choices"] == ask(served).json()["choices"]
        ask(served, stream=True, stream_options={"include_usage": None, "continuous_usage_stats": None})


def test_neutral_values_of_fields_not_offered_are_accepted(served):
    completion(served, presence_penalty=0, frequency_penalty=0.0, logit_bias={}, best_of=1, echo=False)
    chat(served, tools=[], tool_choice="none", response_format={"type": "text"}, logprobs=False, store=False)


def test_content_parts_are_joined(served):
    parts = [{"type": "text", "text": PROMPT[:7]}, {"type": "text", "text": PROMPT[7:]}]
    assert chat(served, parts).json()["choices"] == chat(served).json()["choices"]


@pytest.mark.parametrize("field", ["max_tokens", "max_completion_tokens"])
def test_chat_takes_both_names_of_the_limit(served, field):
    body = {"model": "some", "messages": [{"role": "user", "content": "x"}], "ignore_eos": True, field: 3}
    assert served.post("/v1/chat/completions", body).json()["usage"]["completion_tokens"] == 3


def test_completions_default_to_sixteen_tokens(served):
    body = {"model": "some", "prompt": "x", "ignore_eos": True}
    assert served.post("/v1/completions", body).json()["usage"]["completion_tokens"] == 16


def test_a_path_pins_the_endpoint(served):
    pinned = served.post("/dense/v1/completions", {"prompt": PROMPT, "max_tokens": 2})
    assert pinned.json()["model"] == "dense"
    same = served.post("/dense/v1/completions", {"prompt": PROMPT, "max_tokens": 2, "model": "dense"})
    assert same.status_code == 200
    other = served.post("/dense/v1/completions", {"prompt": PROMPT, "max_tokens": 2, "model": "some"})
    assert other.status_code == 404
    assert other.json()["error"]["code"] == "model_not_found"
    assert served.get("/dense/v1/models").json()["data"][0]["id"] == "dense"
    assert served.get("/some/v1/models/some").json()["id"] == "some"
    assert served.get("/some/v1/models/dense").status_code == 404


def test_models_are_listed_and_found(served):
    listed = served.get("/v1/models").json()
    assert [m["id"] for m in listed["data"]] == ["some", "moe", "mom", "fm-moe", "dense"]
    assert served.get("/v1/models/some").json() == listed["data"][0]


@pytest.mark.parametrize("stop", ["o wö", ["never", "o wö"], "hello w", "h", "ö"])
def test_a_stop_string_across_tokens_ends_the_text_before_it(served, write, chunks, stop):
    text = "hello wörld and more"
    write(text)
    first = stop if isinstance(stop, str) else stop[-1]
    expected = text[: text.index(first)]
    whole = completion(served, stop=stop, max_tokens=100).json()
    assert whole["choices"][0]["text"] == expected
    assert whole["choices"][0]["finish_reason"] == "stop"
    assert whole["usage"]["completion_tokens"] == len(text[: text.index(first) + len(first)].encode())
    pieces = chunks(completion(served, stop=stop, max_tokens=100, stream=True))
    assert "".join(p["choices"][0]["text"] for p in pieces) == expected


def test_what_only_looked_like_a_stop_string_is_written_after_all(served, write):
    write("abcabd")
    assert completion(served, stop="abcabx").json()["choices"][0]["text"] == "abcabd"


def test_characters_split_over_tokens_are_never_broken(served, write, chunks):
    text = "naïve 🌍 日本語 ✓"
    write(text)
    pieces = chunks(completion(served, max_tokens=100, stream=True, ignore_eos=False))
    assert "".join(p["choices"][0]["text"] for p in pieces) == text
    assert not any("\ufffd" in p["choices"][0]["text"] for p in pieces)
    assert pieces[-1]["choices"][0]["finish_reason"] == "stop"


def test_a_character_cut_off_by_the_limit_is_replaced(served, write):
    write("a🌍")
    assert completion(served, max_tokens=3).json()["choices"][0]["text"] == "a\ufffd"


def test_stop_token_ids_end_the_text_without_themselves(served, write, tokenizer):
    write("one.two")
    stop = tokenizer.encode(".")
    answer = completion(served, stop_token_ids=stop).json()
    assert answer["choices"][0] == {"index": 0, "text": "one", "logprobs": None, "finish_reason": "stop"}


def test_tokenize_and_detokenize_are_inverse(served):
    made = served.post("/tokenize", {"model": "some", "prompt": "héllo", "return_token_strs": True}).json()
    assert made["count"] == 6
    assert made["max_model_len"] == 4096
    assert made["token_strs"][0] == "h"
    assert served.post("/detokenize", {"tokens": made["tokens"]}).json() == {"prompt": "héllo"}
    messages = [{"role": "user", "content": "hi"}]
    assert served.post("/tokenize", {"messages": messages}).json()["count"] == 5


def test_a_request_id_is_echoed_when_sane_and_made_up_otherwise(served):
    assert served.get("/v1/models", headers={"X-Request-Id": "a.B_c-1"}).headers["X-Request-Id"] == "a.B_c-1"
    for odd in ("with space", "x" * 129, "semi;colon", ""):
        made = served.get("/v1/models", headers={"X-Request-Id": odd}).headers["X-Request-Id"]
        assert made.startswith("req-")


@pytest.mark.parametrize("path", ["", "/dense"])
def test_a_client_that_renders_conversations_itself_finds_the_template(served, tokenizer, path):
    told = served.get(f"{path}/tokenizer_info").json()
    assert told["eos_token"] == "<|end|>"
    assert told["bos_token"] == "<|user|>"
    assert "raise_exception" in told["chat_template"]
    assert (told["vocab_size"], told["model_max_length"]) == (259, 4096)
    (end,) = served.post(f"{path}/tokenize", {"prompt": told["eos_token"]}).json()["tokens"]
    assert end == 256
    assert served.post(f"{path}/detokenize", {"tokens": tokenizer.encode("hi")}).json() == {"prompt": "hi"}
    assert served.get("/nobody/tokenizer_info").status_code == 404
    assert served.get("/tokenizer_info", params={"model": "nobody"}).status_code == 404


def test_what_the_tokenizer_puts_around_a_text_can_be_left_out(served, monkeypatch):
    tokenizer = type(served.state.registry.get("some").tokenizer)
    plain = tokenizer.encode

    def with_beginning(self, text, *, add_special_tokens=False):
        return [257, *plain(self, text)] if add_special_tokens else plain(self, text)

    monkeypatch.setattr(tokenizer, "encode", with_beginning)
    for fields, tokens in (({}, 3), ({"add_special_tokens": True}, 3), ({"add_special_tokens": False}, 2)):
        assert served.post("/tokenize", {"prompt": "ab"} | fields).json()["count"] == tokens
        body = {"model": "some", "prompt": "ab", "max_tokens": 1} | fields
        assert served.post("/v1/completions", body).json()["usage"]["prompt_tokens"] == tokens


def test_developers_speak_as_the_system(served):
    said = [Message(role=role, content="Be brief.") for role in ("developer", "system", "user")]
    assert [each["role"] for each in as_template_input(said)] == ["system", "system", "user"]
    developer = {"role": "developer", "content": "Be brief."}
    assert served.post("/tokenize", {"messages": [developer]}).status_code == 200
