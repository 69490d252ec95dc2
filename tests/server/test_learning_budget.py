"""An API key teaches so many tokens an hour, and reads beyond that."""

import pytest
from prometheus_client.parser import text_string_to_metric_families

from server.auth import ApiKey, ApiKeys
from server.budgets import Budget

LEARN = {"model": "some", "prompt": "x" * 61, "max_tokens": 8, "ignore_eos": True}


class Clock:
    def __init__(self):
        self.now_s = 0.0

    def __call__(self):
        return self.now_s


def test_a_bucket_is_full_at_first_and_fills_evenly_over_the_hour():
    clock = Clock()
    budget = Budget(3600, 3600, clock)
    assert budget.allows(3600)
    budget.spend(3600)
    assert not budget.allows(1)
    assert budget.wait_s(10) == 10
    clock.now_s = 10
    assert budget.allows(10)
    assert not budget.allows(11)
    clock.now_s = 1e9
    budget.spend(3600)
    assert not budget.allows(1), "what was not used does not add up"


def test_what_is_larger_than_the_bucket_waits_for_a_full_one_and_leaves_a_debt():
    clock = Clock()
    budget = Budget(100, 3600, clock)
    budget.spend(1)
    assert not budget.allows(250)
    clock.now_s = budget.wait_s(250)
    assert budget.allows(250)
    budget.spend(250)
    assert budget.wait_s(1) > 3600


@pytest.fixture
def limited(serve, tmp_path):
    api_keys = ApiKeys(
        [
            ApiKey.of("small-key", "alice", "user", 100),
            ApiKey.of("large-key", "alice", "user"),
            ApiKey.of("root-key", "ops", "admin"),
        ]
    )
    with serve(tmp_path, api_keys=api_keys) as running:
        yield running


def as_(name):
    return {"headers": {"Authorization": f"Bearer {name}-key"}}


def learned(served, name, **fields):
    report = served.post("/v1/completions", LEARN | fields, **as_(name)).json()["libration"]
    return report["plasticity"], report["learned_tokens"]


def counted(served):
    page = served.get("/metrics", **as_("root"))
    return {
        (sample.name, sample.labels.get("reason")): sample.value
        for family in text_string_to_metric_families(page.text)
        for sample in family.samples
        if sample.name.startswith("libration_learned_tokens") and sample.name.endswith("_total")
    }


def test_over_its_budget_a_key_reads_and_the_answer_says_so(limited):
    assert learned(limited, "small") == ("learn", 60)
    assert learned(limited, "small") == ("read", 0)
    assert learned(limited, "small", plasticity="learn", within_request=True) == ("read", 0)
    assert learned(limited, "small", prompt="x" * 41) == ("learn", 40)
    assert learned(limited, "large") == ("learn", 60)
    assert counted(limited) == {
        ("libration_learned_tokens_total", None): 160,
        ("libration_learned_tokens_refused_total", "budget"): 120,
    }


def test_several_prompts_count_together_and_what_does_not_learn_is_free(limited):
    assert learned(limited, "small", prompt="x" * 41) == ("learn", 40)
    assert learned(limited, "small", prompt=["x" * 32] * 2) == ("read", 0)
    assert learned(limited, "small", plasticity="read") == ("read", 0)
    assert learned(limited, "small", model="dense") == ("off", 0)
    assert learned(limited, "small", n=3) == ("learn", 60)


def test_a_refused_request_costs_nothing(limited):
    refused = limited.post("/v1/completions", LEARN | {"max_tokens": 10_000}, **as_("small"))
    assert refused.status_code == 400
    assert learned(limited, "small") == ("learn", 60)


def test_a_judgement_over_the_budget_is_told_when_to_come_back(limited, write):
    write("y" * 70)
    body = LEARN | {"max_tokens": 100, "ignore_eos": False}
    answer = limited.post("/v1/completions", body, **as_("small")).json()
    judgement = {"id": answer["id"], "reward": 1}
    refused = limited.post("/v1/feedback", judgement, **as_("small"))
    assert refused.status_code == 429
    assert refused.json()["error"]["code"] == "rate_limit_exceeded"
    assert 1000 < int(refused.headers["Retry-After"]) < 2000  # 31 of 100 tokens an hour are missing
    assert limited.post("/v1/feedback", judgement, **as_("large")).status_code == 200
    assert counted(limited)["libration_learned_tokens_refused_total", "budget"] == 71
