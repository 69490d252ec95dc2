"""The API's description is honest: every status, every field, every method. Each request of these tests is held against it."""

import json
import re

import pytest

from server import errors
from server.auth import PUBLIC_PATHS
from server.schemas.chat import ChatBody
from server.schemas.completions import CompletionBody

ENGINE_ROUTES = ("/v1/completions", "/v1/chat/completions", "/v1/feedback")


@pytest.fixture(scope="module")
def operations(served):
    return {
        (method.upper(), path): operation
        for path, operations in served.app.openapi()["paths"].items()
        for method, operation in operations.items()
    }


def statuses(operation):
    return {int(status) for status in operation["responses"]}


def test_every_status_of_the_error_table_is_described_somewhere(operations):
    described = set().union(*(statuses(each) for each in operations.values()))
    told = {problem.status for _, problem in errors.TABLE} | {errors.INTERNAL.status}
    assert told <= described
    assert 422 not in described


def test_every_route_describes_what_can_be_refused_around_it(operations):
    for (_, path), operation in operations.items():
        expected = {200, 413, 500}
        if path not in PUBLIC_PATHS:
            expected |= {401, 429}
        if "requestBody" in operation:
            expected |= {400, 408, 415}
        if "{" in path:
            expected |= {400, 404}
        if path.startswith("/admin/"):
            expected |= {403, 409}
        if path.endswith(ENGINE_ROUTES) or path.startswith("/health"):
            expected |= {503}
        if path.endswith("completions"):
            expected |= {404, 409}
        assert expected <= statuses(operation), path


def test_every_error_has_the_one_shape_and_a_request_id(served, operations):
    for operation in operations.values():
        for status, response in operation["responses"].items():
            assert "X-Request-Id" in response["headers"]
            if status != "200":
                schema = response["content"]["application/json"]["schema"]
                assert schema == {"$ref": "#/components/schemas/Error"}
    error = served.app.openapi()["components"]["schemas"]["Error"]["properties"]["error"]
    assert set(error["required"]) == {"message", "type", "param", "code"}


def test_every_good_answer_has_a_schema(operations):
    for (_, path), operation in operations.items():
        for media_type, content in operation["responses"]["200"]["content"].items():
            assert content["schema"], (path, media_type)


def test_retry_after_is_described_with_429_and_503(operations):
    for operation in operations.values():
        for status in {"429", "503"} & operation["responses"].keys():
            assert "Retry-After" in operation["responses"][status]["headers"]


def test_every_name_in_a_path_is_a_parameter_and_no_other_route_takes_it(served, operations):
    for (_, path), operation in operations.items():
        in_path = {each["name"] for each in operation["parameters"] if each["in"] == "path"}
        assert in_path == set(re.findall(r"{(\w+)}", path))
        queries = {each["name"] for each in operation["parameters"] if each["in"] == "query"}
        assert "endpoint" not in queries
    pinned = served.post("/v1/completions?endpoint=dense", {"model": "some", "prompt": "x", "max_tokens": 1})
    assert pinned.json()["model"] == "some"


@pytest.mark.parametrize("body", [ChatBody, CompletionBody])
def test_every_field_is_described_with_what_it_accepts(body):
    properties = body.model_json_schema()["properties"]
    names = {field.alias or name for name, field in body.model_fields.items()}
    assert set(properties) == names | set(body.neutral)
    for name, allowed in body.neutral.items():
        assert properties[name]["enum"] == [*allowed, None]
    optional = set(properties) - set(body.model_json_schema()["required"]) - set(body.neutral)
    for name in optional:
        assert {"type": "null"} in properties[name]["anyOf"], name


def test_a_wrong_method_is_told_all_the_right_ones(served):
    assert served.request("PUT", "/admin/experts/some").headers["Allow"] == "GET, POST"
    assert served.get("/dense/v1/completions").headers["Allow"] == "POST"
    assert served.request("DELETE", "/v1/keys").headers["Allow"] == "GET"


def test_the_description_is_served_as_json(served):
    response = served.get("/openapi.json")
    assert response.json() == json.loads(json.dumps(served.app.openapi()))
    assert "HTTPValidationError" not in response.text
