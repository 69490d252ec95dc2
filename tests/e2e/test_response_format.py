"""A model of 135 million parameters answers in the JSON that OpenAI's own client asked it for."""

import json
from typing import Literal

import pytest
from openai import BadRequestError, OpenAI
from pydantic import BaseModel, ConfigDict, Field

ENDPOINTS = ("some", "moe", "mom", "fm-moe", "dense")


class Address(BaseModel):
    model_config = ConfigDict(extra="forbid")
    city: str = Field(max_length=20)
    country: Literal["France", "Germany", "Spain"]


class Person(BaseModel):
    model_config = ConfigDict(extra="forbid")
    name: str = Field(max_length=30)
    age: int = Field(ge=0, le=130)
    married: bool
    address: Address | None


ASKED = [
    {
        "role": "user",
        "content": "Anna Schmidt is 31 years old, married and lives in Berlin, Germany. Extract this as JSON.",
    }
]


@pytest.mark.slow
def test_openais_client_parses_what_a_small_model_writes(start):
    server = start()
    client = OpenAI(base_url=server.url + "/v1", api_key="none")
    greedy, sampled = {"temperature": 0}, {"temperature": 1, "seed": 7}
    for model, sampling in [*((model, greedy) for model in ENDPOINTS), ("some", sampled)]:
        answer = client.chat.completions.parse(
            model=model, messages=ASKED, response_format=Person, max_tokens=256, **sampling
        )
        (choice,) = answer.choices
        assert choice.finish_reason == "stop"
        assert isinstance(choice.message.parsed, Person), choice.message.content
    with client.chat.completions.stream(
        model="some", messages=ASKED, response_format=Person, max_tokens=256, temperature=0
    ) as stream:
        assert isinstance(stream.get_final_completion().choices[0].message.parsed, Person)
    loose = client.chat.completions.create(
        model="some", messages=ASKED, response_format={"type": "json_object"}, max_tokens=512, temperature=0
    )
    if loose.choices[0].finish_reason == "stop":
        assert isinstance(json.loads(loose.choices[0].message.content), dict)
    with pytest.raises(BadRequestError, match="uniqueItems"):
        client.chat.completions.create(
            model="some",
            messages=ASKED,
            response_format={
                "type": "json_schema",
                "json_schema": {"name": "set", "schema": {"type": "array", "uniqueItems": True}},
            },
        )
