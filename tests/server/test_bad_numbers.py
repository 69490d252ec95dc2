"""Numbers that are none, or out of all bounds, in every number of every body and query: refused by name, never a 500."""

import json

import pytest

COMPLETION = {"model": "some", "prompt": "x", "max_tokens": 1}
CHAT = {"model": "some", "messages": [{"role": "user", "content": "x"}], "max_tokens": 1}
BODIES = {  # route and body -> numbers that may be in it, with a value that is allowed
    ("/v1/completions", "completion"): (COMPLETION, {"flow_steps": 1, "logprobs": 1, "min_tokens": 1}),
    ("/v1/chat/completions", "chat"): (
        CHAT,
        {
            "max_completion_tokens": 1,
            "top_logprobs": 1,
            "temperature": 1,
            "seed": 1,
            "n": 1,
            "min_p": 0,
            "presence_penalty": 0,
            "frequency_penalty": 0,
            "repetition_penalty": 1,
            "top_p": 1,
            "key_version": 0,
            "min_tokens": 1,
            "flow_steps": 1,
        },
    ),
    ("/v1/feedback", "feedback"): ({"id": "cmpl-0", "reward": 0.5}, {"reward": 0.5}),
    ("/v1/keys/some/layers/2/search", "search"): ({"text": "x"}, {"k": 1}),
    ("/admin/keys/some/rollback", "rollback"): ({"to_version": 0}, {"to_version": 0, "if_version": 0}),
    ("/admin/keys/some/reset", "reset"): ({}, {"if_version": 0}),
    ("/admin/keys/some/snapshot", "snapshot"): ({"name": "a"}, {"version": 0}),
    ("/admin/keys/some/restore", "restore"): ({"name": "a"}, {"if_version": 0}),
    ("/admin/experts/some", "experts"): ({"file": "a.safetensors", "name": "a"}, {"seed": 0}),
}
CASES = [
    pytest.param(path, body, field, id=f"{name}-{field}")
    for (path, name), (body, fields) in BODIES.items()
    for field in fields
]
LISTS = {
    "stop_token_ids": ("/v1/completions", COMPLETION),
    "prompt": ("/v1/completions", {"model": "some", "max_tokens": 1}),
    "tokens": ("/detokenize", {}),
    "vector": ("/v1/keys/some/layers/2/search", {}),
}
QUERIES = {
    "version": "/v1/keys/some",
    "offset": "/v1/keys/some/versions",
    "limit": "/v1/keys/some/versions",
}
CODES = {"invalid_value", "invalid_type", "key_version_unavailable", "conflict", "not_found"}
# Numbers that are in order as such, and what is found wrong then.
TOLD_OF = {"to_version": "key_version", "version": "key_version", "seed": "file", "if_version": "name"}
NOT_FINITE = ("NaN", "Infinity", "-Infinity", "1e999", "-1e999")
HUGE = (10**12, -(10**12), 10**30, -(10**30), 1e300, -1e300)


def refused(response, codes):
    assert response.status_code in (400, 404, 409), response.text
    error = response.json()["error"]
    assert error["code"] in codes, error
    return error


def raw(served, path, body, field, literal):
    text = json.dumps(body | {field: "HERE"}).replace('"HERE"', literal)
    return served.request("POST", path, content=text, headers={"Content-Type": "application/json"})


@pytest.mark.parametrize(("path", "body", "field"), CASES)
def test_numbers_that_are_not_finite_are_no_json(served, path, body, field):
    for literal in NOT_FINITE:
        refused(raw(served, path, body, field, literal), {"invalid_json"})


@pytest.mark.parametrize(("path", "body", "field"), CASES)
def test_huge_numbers_and_other_types_name_the_field(served, path, body, field):
    for value in HUGE:
        response = served.post(path, body | {field: value})
        if response.status_code != 200:  # a seed may be almost anything
            assert refused(response, CODES)["param"] in (field, TOLD_OF.get(field))
    for value in ("5", True, [1], {"a": 1}):
        error = refused(served.post(path, body | {field: value}), {"invalid_type"})
        assert error["param"] == field


@pytest.mark.parametrize("field", LISTS)
@pytest.mark.parametrize("literal", [*NOT_FINITE, "-1.5", "1e30", "-1e38", "null", "true", '"1"', "[1]"])
def test_a_list_of_numbers_refuses_what_is_none(served, field, literal):
    path, body = LISTS[field]
    response = raw(served, path, body, field, f"[1, {literal}]")
    error = refused(response, {"invalid_json", "invalid_value", "invalid_type"})
    if error["code"] != "invalid_json":
        assert error["param"].startswith(field)


@pytest.mark.parametrize("field", QUERIES)
@pytest.mark.parametrize("value", ["NaN", "1e5", "-1", "1e999", "9" * 40, "", "0x10", "1.5", "one"])
def test_numbers_of_a_query_are_checked_too(served, field, value):
    error = refused(served.get(QUERIES[field], params={field: value}), {"invalid_value", "invalid_type"})
    assert error["param"] == field


@pytest.mark.parametrize("part", ["NaN", "1.5", "9" * 40, "-1", "x", "%00", "1e3"])
def test_numbers_of_a_path_are_checked_too(served, part):
    for path in (f"/v1/keys/some/layers/{part}", f"/v1/keys/some/layers/2/experts/{part}"):
        response = served.get(path)
        assert response.status_code in (400, 404), response.text
