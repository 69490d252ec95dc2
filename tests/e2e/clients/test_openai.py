"""OpenAI's own client: answers, streams, and every refusal as the exception it is meant to be."""

import asyncio

import httpx
import openai
import pytest
from openai import AsyncOpenAI

pytestmark = pytest.mark.slow

PARIS = [{"role": "user", "content": "What is the capital of France?"}]
ANSWER = "The capital of France is Paris."
GREEDY = {"messages": PARIS, "temperature": 0}


def test_models_are_listed_and_looked_up(connect):
    client = connect()
    names = [model.id for model in client.models.list()]
    assert names == ["some", "moe", "mom", "fm-moe", "dense"]
    assert client.models.retrieve("some").owned_by == "libration"
    assert [model.id for model in connect("/dense/v1").models.list()] == ["dense"]


def test_a_chat_is_answered_and_tells_which_keys_it_came_from(connect):
    raw = connect().chat.completions.with_raw_response.create(model="some", **GREEDY)
    answer = raw.parse()
    assert answer.choices[0].message.content == ANSWER
    assert answer.choices[0].finish_reason == "stop"
    assert answer.usage.total_tokens == answer.usage.prompt_tokens + answer.usage.completion_tokens
    assert answer.model_extra["libration"]["scope"] == "tenant:acme"
    assert raw.headers["x-key-version"] == str(answer.model_extra["libration"]["key_version"])
    assert answer._request_id == raw.headers["x-request-id"]


@pytest.mark.parametrize("model", ["some", "moe", "mom", "fm-moe", "dense"])
def test_a_stream_adds_up_to_the_whole_answer(connect, model):
    client, asked = connect(), GREEDY | {"model": model, "max_tokens": 16, "extra_body": {"seed": 1}}
    if model == "some":
        asked["extra_body"] |= {"key_version": 0}
    whole = client.chat.completions.create(**asked)
    chunks = list(
        client.chat.completions.create(**asked, stream=True, stream_options={"include_usage": True})
    )
    text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)
    assert text == whole.choices[0].message.content
    assert chunks[-1].usage == whole.usage
    assert {chunk.id for chunk in chunks} == {chunks[0].id}


def test_the_clients_own_stream_helper_follows(connect):
    with connect().chat.completions.stream(model="dense", max_tokens=12, **GREEDY) as stream:
        deltas = [event.delta for event in stream if event.type == "content.delta"]
        final = stream.get_final_completion()
    assert "".join(deltas) == final.choices[0].message.content == ANSWER


def test_a_stream_may_be_left(connect):
    client = connect()
    with client.chat.completions.create(model="dense", stream=True, max_tokens=500, **GREEDY) as stream:
        next(iter(stream))
    assert client.chat.completions.create(model="dense", **GREEDY).choices[0].message.content == ANSWER


def test_completions_with_choices_logprobs_and_a_seed(connect):
    client = connect("/dense/v1")
    asked = {"model": "dense", "prompt": ["One, two,", "Red, green,"], "n": 2, "max_tokens": 4, "seed": 7}
    first, again = client.completions.create(**asked), client.completions.create(**asked)
    assert [choice.text for choice in first.choices] == [choice.text for choice in again.choices]
    assert [choice.index for choice in first.choices] == [0, 1, 2, 3]
    scored = client.completions.create(
        model="dense", prompt="One, two, three", echo=True, max_tokens=0, logprobs=2
    ).choices[0]
    assert scored.text == "One, two, three"
    assert scored.logprobs.token_logprobs[0] is None
    assert all(value < 0 for value in scored.logprobs.token_logprobs[1:])
    told = client.chat.completions.create(model="dense", logprobs=True, top_logprobs=2, **GREEDY)
    assert "".join(each.token for each in told.choices[0].logprobs.content).startswith(ANSWER)


def test_many_conversations_at_once(server):
    async def ask() -> list[str]:
        async with AsyncOpenAI(base_url=f"{server.url}/v1", api_key="user-key", timeout=300) as client:
            answers = await asyncio.gather(
                *(client.chat.completions.create(model="dense", **GREEDY) for _ in range(6))
            )
        return [answer.choices[0].message.content for answer in answers]

    assert asyncio.run(ask()) == [ANSWER] * 6


def test_an_answer_can_be_judged_once(connect):
    client = connect()
    answer = client.chat.completions.create(model="some", max_tokens=8, **GREEDY)
    judgement = {"id": answer.id, "reward": 0.5}
    assert client.post("/feedback", body=judgement, cast_to=httpx.Response).status_code == 200
    with pytest.raises(openai.ConflictError):
        client.post("/feedback", body=judgement, cast_to=httpx.Response)


@pytest.mark.parametrize(
    ("fields", "kind", "code", "param"),
    [
        ({"model": "gpt-5"}, openai.NotFoundError, "model_not_found", "model"),
        ({"temperature": 9}, openai.BadRequestError, "invalid_value", "temperature"),
        ({"messages": []}, openai.BadRequestError, "invalid_value", "messages"),
        ({"n": "two"}, openai.BadRequestError, "invalid_type", "n"),
        ({"max_tokens": 1_000_000}, openai.BadRequestError, "context_length_exceeded", None),
        ({"extra_body": {"colour": "red"}}, openai.BadRequestError, "unsupported_parameter", "colour"),
        (
            {"extra_body": {"key_version": 9999}},
            openai.ConflictError,
            "key_version_unavailable",
            "key_version",
        ),
    ],
)
@pytest.mark.parametrize("stream", [False, True])
def test_a_refused_request_is_a_typed_exception(connect, stream, fields, kind, code, param):
    with pytest.raises(kind) as raised:
        connect().chat.completions.create(**({"model": "some", "stream": stream, **GREEDY} | fields))
    assert raised.value.code == code
    assert param in (None, raised.value.param)
    assert raised.value.request_id


def test_who_may_not_is_told_so(connect):
    with pytest.raises(openai.AuthenticationError) as raised:
        connect(api_key="wrong").models.list()
    assert raised.value.code == "invalid_api_key"
    with pytest.raises(openai.PermissionDeniedError):
        connect("/admin").get("/keys/some/audit", cast_to=httpx.Response)
    assert connect("/admin", "admin-key").get("/keys/some/audit", cast_to=httpx.Response).status_code == 200


def test_who_asks_too_often_is_told_when_to_come_back(connect):
    client = connect(api_key="once-a-minute")
    client.models.list()
    with pytest.raises(openai.RateLimitError) as raised:
        client.models.list()
    assert raised.value.code == "rate_limit_exceeded"
    assert 1 <= int(raised.value.response.headers["retry-after"]) <= 60
