"""The field `response_format`: whether the answer must be JSON, and of which schema.

A schema is bounded before it is compiled: its size, how deep it is nested, how many objects it has (each costs stack
where references chain them), and the two places where a few bytes make a large automaton.
"""

from collections.abc import Iterator
from decimal import Decimal
from typing import Annotated, Any, Literal

import orjson
from pydantic import Field, model_validator

from server.refusals import InvalidRequest
from server.schemas.base import Body

MAX_SCHEMA_BYTES = 64 * 1024
MAX_SCHEMA_DEPTH = 32  # lists and objects within each other
MAX_SCHEMA_OBJECTS = 1000
MAX_ENUM_VALUES = 1000  # OpenAI's
MAX_MULTIPLE_OF = 10_000  # the digits of all of a schema's, added up: an automaton has as many states
PARAM = "response_format.json_schema.schema"
ANY_OBJECT: dict[str, Any] = {"type": "object"}  # Any: JSON


class JsonSchema(Body):
    """A schema and what it is called. It is always kept to, `strict` or not."""

    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9_-]{1,64}$")]
    description: Annotated[str, Field(max_length=4096)] | None = None
    schema_: Annotated[dict[str, Any], Field(alias="schema")]  # Any: JSON
    strict: bool = False

    @model_validator(mode="after")
    def _bounded(self) -> "JsonSchema":
        check_schema(self.schema_)
        return self


class ResponseFormat(Body):
    type: Literal["text", "json_object", "json_schema"]
    json_schema: JsonSchema | None = None

    @model_validator(mode="after")
    def _schema_where_it_belongs(self) -> "ResponseFormat":
        if (self.json_schema is None) == (self.type == "json_schema"):
            raise InvalidRequest(
                "'json_schema' is required with type 'json_schema', and has no meaning with another",
                "response_format.json_schema",
            )
        return self

    @property
    def schema_of_answer(self) -> dict[str, Any] | None:
        """What the answer must fit; None: it is free."""
        if self.json_schema is not None:
            return self.json_schema.schema_
        return ANY_OBJECT if self.type == "json_object" else None


def check_schema(schema: dict[str, Any]) -> None:
    """Raises InvalidRequest for a schema beyond one of the limits."""
    size = len(orjson.dumps(schema))
    if size > MAX_SCHEMA_BYTES:
        raise InvalidRequest(f"{PARAM} has {size} bytes; allowed: {MAX_SCHEMA_BYTES}", PARAM)
    objects, multiples = 0, 0
    for value, depth in _containers(schema):
        if depth > MAX_SCHEMA_DEPTH:
            raise InvalidRequest(f"{PARAM} is nested too deeply; allowed: {MAX_SCHEMA_DEPTH} levels", PARAM)
        if isinstance(value, dict):
            objects += 1
            multiples += _digits(value.get("multipleOf"))
            _check_enum(value.get("enum"))
    if objects > MAX_SCHEMA_OBJECTS:
        raise InvalidRequest(f"{PARAM} has {objects} objects; allowed: {MAX_SCHEMA_OBJECTS}", PARAM)
    if multiples > MAX_MULTIPLE_OF:
        raise InvalidRequest(
            f"{PARAM}: the digits of 'multipleOf' come to {multiples}; allowed: {MAX_MULTIPLE_OF} in all",
            PARAM,
        )


def _containers(schema: Any) -> Iterator[tuple[Any, int]]:  # Any: JSON
    """Every object and list with its depth, the schema's own being 1."""
    waiting = [(schema, 1)]
    while waiting:
        value, depth = waiting.pop()
        yield value, depth
        within = value.values() if isinstance(value, dict) else value
        waiting += [(each, depth + 1) for each in within if isinstance(each, dict | list)]


def _check_enum(values: Any) -> None:  # Any: JSON
    if isinstance(values, list) and len(values) > MAX_ENUM_VALUES:
        raise InvalidRequest(f"{PARAM}: 'enum' has {len(values)} values; allowed: {MAX_ENUM_VALUES}", PARAM)


def _digits(number: Any) -> int:  # Any: JSON
    """A number's decimal digits as a whole number, without zeros at either end; 0 for anything else."""
    if not isinstance(number, int | float) or isinstance(number, bool):
        return 0
    digits = Decimal(str(number)).normalize().as_tuple().digits
    return int("".join(map(str, digits)))
