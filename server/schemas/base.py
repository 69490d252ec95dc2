"""What every body has in common: strict types, null means default, unknown fields are errors."""

from collections.abc import Mapping
from typing import Annotated, Any, ClassVar

from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Field,
    GetJsonSchemaHandler,
    WithJsonSchema,
    model_validator,
)
from pydantic.json_schema import JsonSchemaValue
from pydantic_core import CoreSchema

from keystore.errors import InvalidConfig
from keystore.records import ScopeId
from server.refusals import UnsupportedParameter

MOST_FIELDS = 256
MAX_VERSION = 2**53  # what a JSON number can hold in every client


def _session_name(name: str) -> str:
    try:
        ScopeId("session", "any", name)
    except InvalidConfig as error:
        raise ValueError(str(error)) from error
    return name


Name = Annotated[str, Field(min_length=1, max_length=256)]
SessionId = Annotated[
    str, AfterValidator(_session_name), WithJsonSchema({"type": "string", "minLength": 1, "maxLength": 128})
]
ScopeName = Annotated[str, Field(min_length=1, max_length=300)]
KeyVersion = Annotated[int, Field(ge=0, le=MAX_VERSION)]


class Body(BaseModel):
    """A request body. `neutral` lists known fields that are not offered, with values that change nothing."""

    model_config = ConfigDict(strict=True, extra="forbid", allow_inf_nan=False, frozen=True)

    neutral: ClassVar[Mapping[str, tuple[Any, ...]]] = {}  # Any: JSON values

    @classmethod
    def __get_pydantic_json_schema__(
        cls, core_schema: CoreSchema, handler: GetJsonSchemaHandler
    ) -> JsonSchemaValue:
        """With null for every field that may be left out, and the neutral fields."""
        described = handler(core_schema)
        resolved = handler.resolve_ref_schema(described)
        fields: dict[str, Any] = resolved.setdefault("properties", {})
        for name, field in fields.items():
            if name not in resolved.get("required", ()) and {"type": "null"} not in field.get("anyOf", ()):
                kept = {
                    each: field.pop(each) for each in ("title", "description", "default") if each in field
                }
                fields[name] = {"anyOf": [field, {"type": "null"}]} | kept
        for name, allowed in cls.neutral.items():
            fields[name] = {"enum": [*allowed, None], "description": "Not offered: leave it out."}
        return described

    @model_validator(mode="before")
    @classmethod
    def _drop_what_says_nothing(cls, data: Any) -> Any:  # Any: JSON, checked by the fields afterwards
        if not isinstance(data, dict):
            return data
        given: dict[str, Any] = data
        if len(given) > MOST_FIELDS:  # one error each would take far more memory than the body itself
            raise UnsupportedParameter(f"an object has {len(given)} fields; allowed: {MOST_FIELDS}")
        kept: dict[str, Any] = {}
        for name, value in given.items():
            if name in cls.neutral:
                _check_neutral(name, value, cls.neutral[name])
            elif value is not None or name not in cls.model_fields:
                kept[name] = value
        return kept


def _check_neutral(name: str, value: Any, allowed: tuple[Any, ...]) -> None:  # Any: JSON values
    if value is None or any(
        value == each and isinstance(value, bool) == isinstance(each, bool) for each in allowed
    ):
        return
    shown = " or ".join(repr(each) for each in allowed) or "null"
    raise UnsupportedParameter(f"{name!r} is not supported; leave it out or send {shown}", name)
