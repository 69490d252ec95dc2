"""Routes that an answer told, sent back and followed."""

import base64
import io

import numpy as np
import pytest

ROUTED = ("some", "moe", "fm-moe")
PROMPT = "How many roads must a man walk down, before you call him a man? The answer is blowing in the wind."
SCORED = {"echo": True, "max_tokens": 0, "logprobs": 0, "return_routed_experts": True}


def encoded(array):
    file = io.BytesIO()
    np.save(file, array, allow_pickle=array.dtype == object)
    return base64.b64encode(file.getvalue()).decode()


def decoded(text):
    return np.load(io.BytesIO(base64.b64decode(text)), allow_pickle=False)


def post(served, model, **fields):
    body = {"model": model, "prompt": PROMPT, "temperature": 0, "plasticity": "off", "ignore_eos": True}
    return served.post("/v1/completions", body | SCORED | fields)


def score(served, model, **fields):
    """Log-probabilities of the prompt's tokens and the experts that worked on them."""
    response = post(served, model, **fields)
    assert response.status_code == 200, response.text
    (choice,) = response.json()["choices"]
    return choice["logprobs"]["token_logprobs"], decoded(choice["routed_experts"])


@pytest.mark.parametrize("model", ROUTED)
def test_following_the_routers_own_routes_changes_not_one_bit(served, model):
    plain, routes = score(served, model)
    assert len(routes) > 64  # more than one chunk of the prompt
    replayed, followed = score(served, model, routed_experts=encoded(routes))
    assert replayed == plain
    assert np.array_equal(followed, routes)


@pytest.mark.parametrize("model", ROUTED)
def test_other_routes_are_followed_where_they_are_given_and_only_there(served, model):
    plain, routes = score(served, model)
    experts = served.engine.variants[model].usage.counts.shape[2]
    other = ((routes.astype(int) + 1) % experts).astype(np.uint8)
    changed, followed = score(served, model, routed_experts=encoded(other[:70]))
    assert np.array_equal(followed[:70], other[:70])
    assert changed[1:60] != plain[1:60]
    early, _ = score(served, model, routed_experts=encoded(np.concatenate([routes[:40], other[40:70]])))
    assert early[:41] == plain[:41]
    assert early[41:71] != plain[41:71]


def test_routes_outlive_the_keys_that_chose_them(served):
    _, routes = score(served, "some", plasticity="read")
    for _ in range(4):
        served.post("/v1/completions", {"model": "some", "prompt": PROMPT * 3, "max_tokens": 1})
    assert served.post("/admin/keys/some/consolidate").json()["published"]
    followed = score(served, "some", plasticity="read", routed_experts=encoded(routes))[1]
    assert np.array_equal(followed, routes)


def test_a_replay_teaches_only_when_asked_to(served):
    routes = encoded(score(served, "some")[1])
    told = post(served, "some", plasticity=None, max_tokens=1, routed_experts=routes).json()["libration"]
    assert (told["plasticity"], told["learned_tokens"]) == ("read", 0)
    asked = post(served, "some", plasticity="learn", max_tokens=1, routed_experts=routes).json()["libration"]
    assert asked["learned_tokens"] > 0


def head(shape):
    """A .npy header that promises uint8 of a shape, with nothing behind it."""
    file = io.BytesIO()
    np.lib.format.write_array_header_1_0(file, {"descr": "|u1", "fortran_order": False, "shape": shape})
    return base64.b64encode(file.getvalue()).decode()


@pytest.mark.parametrize(
    "value",
    [
        "not base64!",
        "",
        base64.b64encode(b"PK\x03\x04").decode(),
        head((10**12, 2, 2)),
        head((3, 2, 2)),
        encoded(np.array([{"a": 1}], dtype=object)),
        encoded(np.zeros((3, 2, 2), np.float32)),
        encoded(np.zeros((3, 2), np.uint8)),
        encoded(np.asfortranarray(np.zeros((3, 2, 2), np.uint8))),
        encoded(np.zeros((3, 3, 2), np.uint8)),
        encoded(np.zeros((3, 2, 2), np.uint8)),  # one expert twice
        encoded(np.full((3, 2, 2), [7, 8], np.uint8)),  # there are eight
        encoded(np.tile(np.array([0, 1], np.uint8), (500, 2, 1))),  # more tokens than the prompt has
    ],
)
def test_routes_that_do_not_fit_are_refused_by_name(served, value):
    response = post(served, "some", routed_experts=value)
    assert response.status_code == 400, response.text
    error = response.json()["error"]
    assert (error["param"], error["code"]) == ("routed_experts", "invalid_value")


@pytest.mark.parametrize("value", [5, ["AAAA"], {"a": 1}, True])
def test_routes_of_another_type_are_refused(served, value):
    error = post(served, "some", routed_experts=value).json()["error"]
    assert (error["param"], error["code"]) == ("routed_experts", "invalid_type")


@pytest.mark.parametrize("model", ["dense", "mom"])
def test_what_does_not_choose_experts_cannot_be_told_which(served, model):
    fields = {"routed_experts": encoded(np.tile(np.array([0, 1], np.uint8), (3, 2, 1)))}
    response = post(served, model, return_routed_experts=False, **fields)
    assert response.status_code == 400
    assert response.json()["error"]["param"] == "routed_experts"
