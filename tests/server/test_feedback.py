"""A reward scales what an answer's tokens teach, in the scope that wrote it and nowhere else."""

import asyncio
import itertools
import math

import numpy as np
import pytest

from keystore.records import GravityConfig, ScopeId
from server.auth import ApiKey, ApiKeys
from server.feedback import AnswerMemory, PastAnswer, UnknownAnswer, WrittenText

TENANT = ScopeId("tenant", "default")
PROMPT = "say something about the sea: "
TEXT = "the sea is grey and the sea is wide and nobody has counted its waves, all of them, so far"
LEARN = {"model": "some", "prompt": PROMPT, "max_tokens": 200, "temperature": 0}


@pytest.fixture
def learning(serve, tmp_path):
    """learning(rule): a fresh server whose dark energy sleeps."""
    opened = []

    def start(rule="direct", **state):
        gravity = GravityConfig(rule=rule, window_tokens=64, warmup_tokens=10**9)
        path = tmp_path / str(len(opened))
        path.mkdir()
        context = serve(path, gravity=gravity, **state)
        opened.append(context)
        return context.__enter__()

    yield start
    for context in opened:
        context.__exit__(None, None, None)


def answered(served, **fields):
    response = served.post("/v1/completions", LEARN | fields)
    assert response.status_code == 200, response.text
    return response.json()


def judged(served, answer_id, reward, **options):
    return served.post("/v1/feedback", {"id": answer_id, "reward": reward}, **options)


def answer_logprob(served):
    body = {"model": "some", "prompt": PROMPT + TEXT, "max_tokens": 0, "echo": True, "logprobs": 0}
    scored = served.post("/v1/completions", body).json()["choices"][0]["logprobs"]["token_logprobs"]
    return math.fsum(scored[len(PROMPT) :])


@pytest.mark.parametrize("rule", ["direct", "gradient"])
@pytest.mark.parametrize("reward", [1, 0.5, -0.5, -1])
def test_praise_makes_an_answer_likelier_and_blame_unlikelier(learning, write, rule, reward):
    write(TEXT)
    served = learning(rule)
    answer = answered(served)
    served.post("/admin/keys/some/consolidate")
    version, before = served.store.view(TENANT).version, answer_logprob(served)
    response = judged(served, answer["id"], reward)
    assert response.json() == {
        "id": answer["id"],
        "reward": reward,
        "scope": "tenant:default",
        "learned_tokens": len(TEXT) + 1,
    }
    served.post("/admin/keys/some/consolidate")
    assert served.store.view(TENANT).version > version
    assert (answer_logprob(served) - before) * reward > 0


def test_exactly_the_answers_tokens_teach(learning, write):
    write(TEXT)
    served = learning()
    answer = answered(served, prompt=PROMPT * 3)  # the answer begins in the middle of a chunk
    served.post("/admin/keys/some/consolidate")
    before = served.store.view(TENANT).tokens
    assert before == len(PROMPT) * 3 - 1
    assert judged(served, answer["id"], 1).status_code == 200
    served.post("/admin/keys/some/consolidate")
    assert served.store.view(TENANT).tokens - before == len(TEXT) + 1


def test_only_the_scope_that_wrote_it_learns(learning, write):
    write(TEXT)
    served = learning()
    answer = answered(served, session_id="s")
    served.post("/admin/keys/some/consolidate")
    response = judged(served, answer["id"], 1)
    assert response.json()["scope"] == "session:default/s"
    published = served.post("/admin/keys/some/consolidate").json()["published"]
    assert {each["scope"] for each in published} == {"session:default/s"}


def test_an_answer_is_judged_once(learning, write):
    write(TEXT)
    served = learning()
    answer = answered(served)
    assert judged(served, answer["id"], 0.5).status_code == 200
    again = judged(served, answer["id"], 1)
    assert again.status_code == 409
    assert again.json()["error"]["code"] == "conflict"
    assert again.json()["error"]["param"] == "id"
    assert again.headers["x-should-retry"] == "false"


def test_every_choice_is_judged(learning, write):
    write(TEXT)
    served = learning()
    answer = answered(served, n=2)
    assert judged(served, answer["id"], 1).json()["learned_tokens"] == 2 * (len(TEXT) + 1)


def test_a_streamed_answer_can_be_judged_when_its_last_piece_is_there(learning, write, chunks):
    write(TEXT)
    served = learning()
    pieces = chunks(served.post("/v1/completions", LEARN | {"stream": True}))
    assert judged(served, pieces[0]["id"], 1).json()["learned_tokens"] == len(TEXT) + 1


def test_what_stands_behind_a_stop_string_does_not_teach(learning, write):
    write(TEXT)
    served = learning()
    answer = answered(served, stop="grey")
    assert answer["choices"][0]["text"] == "the sea is "
    assert judged(served, answer["id"], 1).json()["learned_tokens"] == len("the sea is grey")


@pytest.mark.parametrize(
    "fields", [{"plasticity": "read"}, {"plasticity": "off"}, {"model": "dense"}, {"model": "moe"}]
)
def test_answers_that_might_not_teach_are_unknown(learning, fields):
    served = learning()
    answer = answered(served, **fields)
    for answer_id in (answer["id"], "cmpl-never"):
        response = judged(served, answer_id, 1)
        assert response.status_code == 404
        assert response.json()["error"]["code"] == "not_found"
        assert response.json()["error"]["param"] == "id"
    assert served.state.answers.texts == 0


def test_another_tenants_answer_is_as_unknown_as_one_that_never_was(learning, write):
    write(TEXT)
    api_keys = ApiKeys(
        [
            ApiKey.of("alice-key", "alice", "user"),
            ApiKey.of("bob-key", "bob", "user"),
            ApiKey.of("root-key", "ops", "admin"),
        ]
    )
    served = learning(api_keys=api_keys)

    def as_(name):
        return {"headers": {"Authorization": f"Bearer {name}-key"}}

    answer_id = served.post("/v1/completions", LEARN, **as_("alice")).json()["id"]
    for name in ("bob", "root"):
        refused, unknown = judged(served, answer_id, 1, **as_(name)), judged(served, "cmpl-x", 1, **as_(name))
        assert refused.status_code == unknown.status_code == 404
        assert refused.text.replace(answer_id, "cmpl-x") == unknown.text
    assert judged(served, answer_id, 1, **as_("alice")).json()["scope"] == "tenant:alice"


def test_an_endpoints_own_path_knows_its_own_answers_only(learning, write):
    write(TEXT)
    served = learning()
    body = {"id": answered(served)["id"], "reward": 1}
    assert served.post("/dense/v1/feedback", body).status_code == 404
    nobody = served.post("/nobody/v1/feedback", body)
    assert (nobody.status_code, nobody.json()["error"]["code"]) == (404, "model_not_found")
    assert served.post("/some/v1/feedback", body).status_code == 200


def test_the_literal_rule_has_no_credit_to_scale(learning, write):
    write(TEXT)
    served = learning("literal")
    response = judged(served, answered(served)["id"], 1)
    assert response.status_code == 400
    assert "literal" in response.json()["error"]["message"]


def test_a_frozen_scope_refuses_and_can_be_taught_later(learning, write):
    write(TEXT)
    served = learning()
    answer = answered(served)
    served.post("/admin/keys/some/freeze", {"scope": "tenant:default"})
    assert judged(served, answer["id"], 1).status_code == 409
    served.post("/admin/keys/some/unfreeze", {"scope": "tenant:default"})
    assert judged(served, answer["id"], 1).status_code == 200


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({"id": "x", "reward": 1.01}, "reward"),
        ({"id": "x", "reward": -2}, "reward"),
        ({"id": "x", "reward": "1"}, "reward"),
        ({"id": "x", "reward": True}, "reward"),
        ({"id": "x"}, "reward"),
        ({"reward": 1}, "id"),
        ({"id": "", "reward": 1}, "id"),
        ({"id": "x" * 129, "reward": 1}, "id"),
        ({"id": 7, "reward": 1}, "id"),
        ({"id": "x", "reward": 1, "index": 0}, "index"),
    ],
)
def test_what_is_no_judgement_is_refused(served, body, param):
    response = served.post("/v1/feedback", body)
    assert response.status_code == 400, response.text
    assert response.json()["error"]["param"] == param


def test_the_description_says_what_a_judgement_is(served):
    description = served.get("/openapi.json").json()
    schema = description["components"]["schemas"]["FeedbackBody"]
    assert set(schema["required"]) == set(schema["properties"]) == {"id", "reward"}
    assert (schema["properties"]["reward"]["minimum"], schema["properties"]["reward"]["maximum"]) == (-1, 1)


def test_no_text_reaches_the_log(learning, write, log_lines):
    write("canary-answer-77")
    served = learning()
    answer = answered(served, prompt="canary-prompt-77")
    assert judged(served, answer["id"], 1).status_code == 200
    assert any("feedback" in line for line in log_lines)
    assert not any("canary" in line for line in log_lines)


def failing_take(monkeypatch, teacher, fails):
    """`teacher` raises on these of its lessons, counted from 0."""
    take, number = teacher.take, itertools.count()

    def sometimes(*arguments, **options):
        if next(number) in fails:
            raise RuntimeError("no lesson")
        take(*arguments, **options)

    monkeypatch.setattr(teacher, "take", sometimes)


def test_a_lesson_that_raises_takes_no_other_of_its_step_along(learning, monkeypatch):
    served = learning()
    failing_take(monkeypatch, served.state.registry.get("some").plasticity.teacher, {0})
    answered(served, prompt=["the first prompt", "second"], max_tokens=2, ignore_eos=True)
    assert served.engine.counters.lessons_failed == 1
    served.post("/admin/keys/some/consolidate")
    assert served.store.view(TENANT).tokens == len("second") - 1


def judged_in_time(served, answer_id):
    async def judge():
        async with served.client() as client:
            body = {"id": answer_id, "reward": 1}
            return await asyncio.wait_for(client.post("/v1/feedback", json=body), 30)

    return asyncio.run(judge())


def test_a_judgement_that_cannot_teach_says_so(learning, write, monkeypatch):
    write("calm")
    served = learning()
    answer = answered(served, prompt="sea: ")
    failing_take(monkeypatch, served.state.registry.get("some").plasticity.teacher, {0})
    assert judged_in_time(served, answer["id"]).status_code == 500
    assert served.engine.counters.lessons_failed == 1


def test_a_judgement_ends_when_its_step_fails_behind_its_last_token(learning, write, monkeypatch):
    write("calm")
    served = learning()
    answer = answered(served, prompt="sea: ")
    step = served.engine.step

    def failing():
        step()
        raise RuntimeError("somebody else's")

    monkeypatch.setattr(served.engine, "step", failing)
    assert judged_in_time(served, answer["id"]).json()["learned_tokens"] == len("calm") + 1
    assert served.engine.counters.failed_steps > 0


def past(tenant="t", texts=1):
    text = WrittenText(np.arange(5, dtype=np.int32), 3, None)
    return PastAnswer("some", tenant, ScopeId("tenant", tenant), (text,) * texts)


def test_memory_is_bounded_in_number_and_time():
    now = [0.0]
    memory = AnswerMemory(keep_s=10, keep_answers=4, clock=lambda: now[0])
    for i in range(100):
        memory.remember(f"a{i}", past())
        assert memory.texts <= 4
    assert memory.find("a96", "t").answer_tokens == 2
    with pytest.raises(UnknownAnswer):
        memory.find("a95", "t")
    memory.remember("many", past(texts=3))
    assert memory.texts == 4
    assert memory.find("a99", "t")
    memory.remember("too many", past(texts=5))
    assert memory.texts == 0
    memory.remember("late", past())
    now[0] = 10.0
    assert memory.find("late", "t")
    now[0] = 10.1
    with pytest.raises(UnknownAnswer):
        memory.find("late", "t")
    assert memory.texts == 0
