"""Answers that must be JSON, or fit a schema: what is written, how it ends, what is refused, what others notice."""

import asyncio
import json
import threading

import pytest

from model import grammar
from model.grammar import GrammarCompiler
from server.grammars import Grammars

CHAT, COMPLETION = "/v1/chat/completions", "/v1/completions"
POINT = {
    "type": "object",
    "properties": {"on": {"type": "boolean"}, "level": {"enum": [1, 2, 3]}, "word": {"enum": ["a", "bc"]}},
    "required": ["on", "level", "word"],
    "additionalProperties": False,
}
WILD = {"type": "string", "pattern": "^.*[a-z ].{300}$"}  # each character may be the one: too many states
PARAM = "response_format.json_schema.schema"


def formatted(schema, **more):
    return {"type": "json_schema", "json_schema": {"name": "answer", "schema": schema} | more}


def chat(served, schema=POINT, **fields):
    return served.post(CHAT, chat_body(schema) | fields)


def chat_body(schema):
    return {
        "model": "some",
        "messages": [{"role": "user", "content": "x"}],
        "max_tokens": 300,
        "response_format": formatted(schema),
    }


def completion_body(schema, **fields):
    return {"model": "some", "prompt": "x", "max_tokens": 300, "response_format": formatted(schema)} | fields


def fits_point(text):
    value = json.loads(text)
    assert list(value) == ["on", "level", "word"]
    assert isinstance(value["on"], bool)
    assert value["level"] in (1, 2, 3)
    assert value["word"] in ("a", "bc")


def choices_of(response):
    assert response.status_code == 200, response.text
    return response.json()["choices"]


def refusal(response, param=PARAM, status=400):
    assert response.status_code == status, response.text
    error = response.json()["error"]
    assert error["param"] == param, error
    return error


@pytest.mark.parametrize(
    ("model", "fields"),
    [
        ("some", {"temperature": 0}),
        ("moe", {"temperature": 1.5, "seed": 3}),
        ("mom", {"temperature": 1, "top_k": 2}),
        ("fm-moe", {"temperature": 1, "top_p": 0.1, "min_p": 0.05}),
        ("dense", {"repetition_penalty": 10, "presence_penalty": 2, "logit_bias": {"34": -100}}),
    ],
)
def test_an_answer_fits_its_schema_however_it_is_sampled(served, model, fields):
    (choice,) = choices_of(chat(served, model=model, **fields))
    fits_point(choice["message"]["content"])
    assert choice["finish_reason"] == "stop"


def test_completions_take_the_field_too(served):
    (choice,) = choices_of(served.post(COMPLETION, completion_body(POINT, echo=True)))
    assert choice["text"].startswith("x{")
    fits_point(choice["text"][1:])


def test_a_json_object_may_hold_anything_but_must_be_one(served, write):
    body = chat_body(POINT) | {"response_format": {"type": "json_object"}}
    write('{"a": [1, {"b": null}], "c": "d"}')
    (choice,) = choices_of(served.post(CHAT, body))
    assert choice["message"]["content"] == '{"a": [1, {"b": null}], "c": "d"}'
    assert choice["finish_reason"] == "stop"
    write("[1]")
    (choice,) = choices_of(served.post(CHAT, body | {"max_tokens": 1}))
    assert choice["message"]["content"] == "{"


def test_each_choice_follows_the_schema_by_itself(served):
    choices = choices_of(chat(served, n=4, seed=11, temperature=1.5))
    texts = [choice["message"]["content"] for choice in choices]
    assert len(set(texts)) > 1
    for text in texts:
        fits_point(text)


def test_each_prompt_of_a_list_follows_the_schema(served):
    for choice in choices_of(served.post(COMPLETION, completion_body(POINT, prompt=["x", "yy"], n=2))):
        fits_point(choice["text"])


def test_a_stream_says_what_the_whole_answer_says(served, chunks):
    whole = choices_of(chat(served, seed=5))[0]
    pieces = chunks(chat(served, seed=5, stream=True))
    text = "".join(piece["choices"][0]["delta"].get("content", "") for piece in pieces)
    assert text == whole["message"]["content"]
    assert pieces[-1]["choices"][0]["finish_reason"] == "stop"


def test_log_probabilities_are_the_models_own(served):
    """Those of the same text as a prompt, where nothing constrained it."""
    fields = {"temperature": 0, "logprobs": 3, "plasticity": "off"}
    answer = choices_of(served.post(COMPLETION, completion_body(POINT, **fields)))[0]
    free = {"model": "some", "prompt": "x" + answer["text"], "max_tokens": 0, "echo": True} | fields
    scored = choices_of(served.post(COMPLETION, free))[0]["logprobs"]
    written = len(answer["text"])
    assert answer["logprobs"]["tokens"][:written] == scored["tokens"][1:]
    ours, theirs = answer["logprobs"]["token_logprobs"][:written], scored["token_logprobs"][1:]
    assert ours == pytest.approx(theirs, abs=1e-4)
    assert min(ours) < -1  # the model would have written something else


def test_the_end_is_a_token_and_counts(served):
    answer = chat(served, {"const": True}).json()
    assert answer["choices"][0]["message"]["content"] == "true"
    assert answer["usage"]["completion_tokens"] == 5


def test_an_answer_cut_by_max_tokens_says_so(served):
    (choice,) = choices_of(chat(served, {"const": "0123456789"}, max_tokens=4))
    assert (choice["message"]["content"], choice["finish_reason"]) == ('"012', "length")


def test_a_stop_string_still_stops(served):
    (choice,) = choices_of(chat(served, {"const": "0123456789"}, stop="56"))
    assert (choice["message"]["content"], choice["finish_reason"]) == ('"01234', "stop")


def test_a_stop_token_still_stops_where_the_schema_allows_it(served):
    (choice,) = choices_of(chat(served, {"const": "0123456789"}, stop_token_ids=[ord("7")]))
    assert choice["finish_reason"] == "stop"
    free = choices_of(chat(served, {"const": "0123456789"}, stop_token_ids=[200]))[0]
    assert free["message"]["content"] == '"0123456789"'


def test_the_default_type_changes_nothing(served):
    body = chat_body(POINT) | {"temperature": 0, "max_tokens": 12, "plasticity": "off"}
    plain = {name: value for name, value in body.items() if name != "response_format"}
    text = choices_of(served.post(CHAT, body | {"response_format": {"type": "text"}}))
    assert text == choices_of(served.post(CHAT, plain))


def test_strict_and_description_are_taken(served):
    more = {"strict": True, "description": "a point"}
    (choice,) = choices_of(chat(served, response_format=formatted(POINT, **more)))
    fits_point(choice["message"]["content"])


def test_an_answer_beside_constrained_ones_keeps_its_bits(served):
    free = {
        "model": "some",
        "prompt": "say anything",
        "max_tokens": 24,
        "ignore_eos": True,
        "logprobs": 5,
        "seed": 9,
        "plasticity": "off",
    }

    async def together():
        async with served.client() as client:
            bodies = [completion_body(POINT, seed=i, plasticity="off") for i in range(4)]
            sent = [client.post(COMPLETION, json=body) for body in (*bodies, free, *bodies)]
            return await asyncio.gather(*sent)

    alone, constrained = (
        served.post(COMPLETION, free),
        served.post(COMPLETION, completion_body(POINT, seed=2)),
    )
    answers = asyncio.run(together())
    assert choices_of(answers[4]) == choices_of(alone)
    assert choices_of(answers[2]) == choices_of(constrained)


@pytest.mark.parametrize(
    ("response_format", "param", "code"),
    [
        ({}, "response_format.type", "invalid_value"),
        ("json_object", "response_format", "invalid_type"),
        ({"type": "xml"}, "response_format.type", "invalid_value"),
        ({"type": "structural_tag"}, "response_format.type", "invalid_value"),
        ({"type": "json_schema"}, "response_format.json_schema", "invalid_value"),
        ({"type": "json_object", "json_schema": {"name": "a", "schema": {}}}, "response_format.json_schema", None),
        ({"type": "json_schema", "json_schema": {"schema": {}}}, "response_format.json_schema.name", None),
        ({"type": "json_schema", "json_schema": {"name": "a"}}, PARAM, None),
        ({"type": "json_schema", "json_schema": {"name": "a b", "schema": {}}}, None, None),
        ({"type": "json_object", "odd": 1}, "response_format.odd", "unsupported_parameter"),
        (formatted(5), PARAM, "invalid_type"),
        (formatted(False), PARAM, "invalid_type"),
        (formatted([]), PARAM, "invalid_type"),
        (formatted({}, strict="yes"), "response_format.json_schema.strict", "invalid_type"),
        (formatted({}, odd=1), "response_format.json_schema.odd", "unsupported_parameter"),
        (formatted({"uniqueItems": True}), PARAM, "invalid_value"),
        (formatted({"$ref": "http://127.0.0.1:1/x"}), PARAM, "invalid_value"),
        (formatted({"enum": list(range(1001))}), PARAM, "invalid_value"),
        (formatted({"type": "integer", "multipleOf": 99991}), PARAM, "invalid_value"),
        (formatted({"anyOf": [{"const": i} for i in range(1000)]}), PARAM, "invalid_value"),
        (formatted({"description": "x" * 70_000}), PARAM, "invalid_value"),
    ],
)  # fmt: skip
def test_a_format_that_cannot_be_is_refused_by_name(served, response_format, param, code):
    for path, body in ((CHAT, chat_body(POINT)), (COMPLETION, completion_body(POINT))):
        response = served.post(path, body | {"response_format": response_format})
        error = refusal(response, param or "response_format.json_schema.name")
        assert error["code"] == (code or "invalid_value")


def test_the_offending_keyword_is_in_the_message(served):
    schema = {"type": "object", "properties": {"list": {"type": "array", "uniqueItems": True}}}
    assert "uniqueItems" in refusal(chat(served, schema))["message"]


def test_a_schema_nested_too_deeply_is_refused(served):
    schema = {"type": "string"}
    for _ in range(32):
        schema = {"items": schema}
    assert "nested too deeply" in refusal(chat(served, schema))["message"]


@pytest.mark.parametrize("fields", [{"ignore_eos": True}, {"min_tokens": 2}])
def test_what_would_go_on_after_the_end_is_refused(served, fields):
    refusal(chat(served, **fields), next(iter(fields)))
    free = {"response_format": {"type": "text"}, "max_tokens": 3}
    assert chat(served, **free, **fields).status_code == 200


@pytest.mark.parametrize("keyword", ["allOf", "anyOf", "properties", "items"])
def test_the_deepest_chain_of_references_is_compiled_or_refused(served, keyword):
    """It must not take the process with it, which recursion on a thread of the usual size does."""
    wrapped = {
        "allOf": lambda inner: {"allOf": [inner, {"minLength": 1}]},
        "anyOf": lambda inner: {"anyOf": [inner, {"type": "null"}]},
        "properties": lambda inner: {"type": "object", "properties": {"x": inner}},
        "items": lambda inner: {"type": "array", "items": inner},
    }[keyword]
    links = {f"l{i}": wrapped({"$ref": f"#/$defs/l{i + 1}"}) for i in range(300)}
    schema = {"$defs": links | {"l300": {"type": "string"}}, "$ref": "#/$defs/l0"}
    assert chat(served, schema, max_tokens=3).status_code in (200, 400)
    assert served.get("/health/live").status_code == 200


@pytest.mark.parametrize("stream", [False, True])
def test_an_answer_that_outgrows_the_limits_ends_with_an_error_that_names_the_field(
    served, stream, wait_until, monkeypatch
):
    monkeypatch.setitem(grammar.LIMITS, "max_lexer_states", 200)
    body = completion_body(WILD | {"title": str(stream)}, max_tokens=3000, stream=stream)
    response = served.post(COMPLETION, body | {"logit_bias": {str(ord('"')): -100}})
    if stream:
        assert response.status_code == 200
        *_, told, done = [line for line in response.text.split("\n\n") if line]
        assert done == "data: [DONE]"
        error = json.loads(told.removeprefix("data: "))["error"]
        assert error["param"] == "response_format"
    else:
        error = refusal(response, "response_format")
    assert error["code"] == "invalid_value"
    assert served.engine.counters.finished["some", "too_complex"] > 0
    wait_until(lambda: served.idle)


def compiled_schemas(monkeypatch):
    """The schemas that are compiled from now on."""
    seen, compile_schema = [], GrammarCompiler.compile
    monkeypatch.setattr(
        GrammarCompiler, "compile", lambda self, schema: seen.append(schema) or compile_schema(self, schema)
    )
    return seen


def test_a_schema_is_compiled_once(served, monkeypatch):
    seen, schema = compiled_schemas(monkeypatch), {"enum": ["compiled", "once"]}
    for _ in range(3):
        choices_of(chat(served, schema, n=2))
    assert seen == [schema]


def test_tenants_share_no_grammar_and_a_worn_one_is_made_anew(tokenizer, monkeypatch):
    seen, schema = compiled_schemas(monkeypatch), {"type": "null"}

    async def ask():
        grammars = Grammars()
        first = await grammars.get(tokenizer, 256, "a", schema)
        assert await grammars.get(tokenizer, 256, "a", schema) is first
        assert await grammars.get(tokenizer, 256, "b", schema) is not first
        first.exhausted = True
        assert await grammars.get(tokenizer, 256, "a", schema) is not first

    asyncio.run(ask())
    assert len(seen) == 3


def test_the_schema_used_longest_ago_is_given_up(tokenizer, monkeypatch):
    seen = compiled_schemas(monkeypatch)

    async def ask():
        grammars = Grammars()
        for i in range(33):
            await grammars.get(tokenizer, 256, "a", {"const": i})
            await grammars.get(tokenizer, 256, "a", {"const": 0})
        await grammars.get(tokenizer, 256, "a", {"const": 1})

    asyncio.run(ask())
    assert [schema["const"] for schema in seen] == [*range(33), 1]


def test_compiling_holds_nobody_else_up_and_is_given_up_in_time(serve, tmp_path, monkeypatch):
    release = threading.Event()

    def never(self, schema):
        release.wait(60)
        raise AssertionError("nobody waits for this any more")

    async def ask(served):
        async with served.client() as client:
            slow = asyncio.ensure_future(client.post(CHAT, json=chat_body(POINT)))
            await asyncio.sleep(0.1)
            queued = asyncio.ensure_future(client.post(CHAT, json=chat_body({"const": 1})))
            free = {"model": "some", "prompt": "x", "max_tokens": 4}
            assert (await client.post(COMPLETION, json=free)).status_code == 200
            assert not slow.done()
            return await slow, await queued

    with serve(tmp_path, grammars=Grammars(timeout_s=2)) as served:
        choices_of(chat(served, {"const": 0}))  # the vocabulary's part is done
        monkeypatch.setattr(GrammarCompiler, "compile", never)
        slow, queued = asyncio.run(ask(served))
        release.set()
    assert "takes too long to compile; allowed: 2 s" in refusal(slow)["message"]
    assert refusal(queued, None, 503)["code"] == "server_overloaded"
    assert queued.headers["Retry-After"] == "5"


def test_the_thread_that_compiles_has_a_stack_of_its_own_and_leaves_the_others_theirs(tokenizer):
    before = threading.stack_size()
    asyncio.run(Grammars().get(tokenizer, 256, "a", {"type": "null"}))
    assert threading.stack_size() == before


def test_nothing_of_all_this_is_left_running(served, wait_until):
    wait_until(lambda: served.idle)
