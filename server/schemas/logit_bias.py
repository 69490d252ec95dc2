"""The field `logit_bias`: token ids, written as JSON names, to what is added to their logits."""

import re
from typing import Annotated, Any

from pydantic import Field, PlainValidator

from server.refusals import InvalidRequest, InvalidType

MOST_BIASES = 1024
STRONGEST_BIAS = 100  # OpenAI's
TOKEN_ID = re.compile(r"0|[1-9][0-9]{0,9}")


def _read(value: Any) -> dict[int, float]:  # Any: JSON
    if not isinstance(value, dict):
        raise InvalidType("logit_bias must be an object of token ids and numbers", "logit_bias")
    given: dict[str, Any] = value
    if len(given) > MOST_BIASES:
        raise InvalidRequest(f"logit_bias has {len(given)} tokens; allowed: {MOST_BIASES}", "logit_bias")
    return {_token_id(name): _bias(bias) for name, bias in given.items()}


def _token_id(name: str) -> int:
    if TOKEN_ID.fullmatch(name) is None:
        raise InvalidRequest("logit_bias: each name must be a token id, such as '50'", "logit_bias")
    return int(name)


def _bias(bias: Any) -> float:  # Any: JSON
    if not isinstance(bias, int | float) or isinstance(bias, bool):
        raise InvalidType("logit_bias: each value must be a number", "logit_bias")
    if not -STRONGEST_BIAS <= bias <= STRONGEST_BIAS:
        raise InvalidRequest(
            f"logit_bias: each value must be from -{STRONGEST_BIAS} to {STRONGEST_BIAS}", "logit_bias"
        )
    return float(bias)


Named = Annotated[str, Field(pattern=r"^(0|[1-9][0-9]{0,9})$")]
Bias = Annotated[float, Field(ge=-STRONGEST_BIAS, le=STRONGEST_BIAS)]
Biases = Annotated[
    dict[Named, Bias], Field(max_length=MOST_BIASES, json_schema_extra={"additionalProperties": False})
]
LogitBias = Annotated[dict[int, float], PlainValidator(_read, json_schema_input_type=Biases)]
