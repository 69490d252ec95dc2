"""docs/api.md leaves nothing out: every field, every field that is not offered, every route, every error code."""

import re
from pathlib import Path

import pytest

from server import errors, http_protocol
from server.schemas.chat import ChatBody
from server.schemas.completions import CompletionBody
from server.schemas.tokens import DetokenizeBody, TokenizeBody

DOCS = (Path(__file__).parents[2] / "docs" / "api.md").read_text()
SPANS = " ".join(re.findall(r"`([^`\n]+)`", DOCS))
CODES = {problem.code for _, problem in errors.TABLE} | {
    errors.INTERNAL.code,
    http_protocol.NOT_HTTP.code,
    http_protocol.TOO_LARGE.code,
    http_protocol.TOO_SLOW.code,
    "draining",
    "method_not_allowed",
}


def names(body):
    return {field.alias or name for name, field in body.model_fields.items()} | set(body.neutral)


@pytest.mark.parametrize("name", sorted(names(ChatBody) | names(CompletionBody)))
def test_every_field_is_in_the_documentation(name):
    assert re.search(rf"\b{name}\b", SPANS)


@pytest.mark.parametrize("name", sorted({*TokenizeBody.model_fields, *DetokenizeBody.model_fields}))
def test_every_field_of_the_tokenizers_routes_is_in_the_documentation(name):
    assert re.search(rf"\b{name}\b", DOCS)


def test_every_route_is_in_the_documentation(served):
    for path in served.app.openapi()["paths"]:
        written = path.removeprefix("/{endpoint}") if path.startswith("/{endpoint}") else path
        known = written.replace("/{model}", "/some")
        if written.startswith("/admin/keys/"):
            known = written.rpartition("/")[2]
        elif written.startswith("/admin/experts/"):
            known = "/admin/experts/{endpoint}"
        assert known in DOCS, path


@pytest.mark.parametrize("code", sorted(CODES))
def test_every_error_code_is_in_the_documentation(code):
    assert f"`{code}`" in DOCS


def test_every_status_is_in_the_documentation(served):
    for operations in served.app.openapi()["paths"].values():
        for operation in operations.values():
            for status in operation["responses"].keys() - {"200"}:
                assert f"| {status} |" in DOCS
