"""The field `routed_experts`: what an answer told under that name, sent back to be followed."""

import base64
import binascii
import io
import math
from typing import Annotated, Any

import numpy as np
from pydantic import PlainValidator

from server.engine.sequence import RoutedRows
from server.refusals import InvalidRequest, InvalidType

FORM = "the base64 of a .npy file of uint8 or uint16, (tokens, layers, experts per token)"
MAX_HEADER_BYTES = 1024


def _read(value: Any) -> RoutedRows | None:  # Any: JSON
    """The array, its header held against its size before anything is allocated."""
    if value is None:
        return None
    if not isinstance(value, str):
        raise InvalidType(f"routed_experts must be {FORM}", "routed_experts")
    try:
        file = io.BytesIO(base64.b64decode(value, validate=True))
        version = np.lib.format.read_magic(file)
        shape, fortran, dtype = np.lib.format.read_array_header_1_0(file, max_header_size=MAX_HEADER_BYTES)
    except (binascii.Error, ValueError) as error:
        raise InvalidRequest(f"routed_experts is not {FORM}", "routed_experts") from error
    body = file.read()
    plain = version == (1, 0) and not fortran
    known = plain and dtype in (np.dtype("u1"), np.dtype("<u2")) and len(shape) == 3
    if not known or math.prod(shape) * dtype.itemsize != len(body):
        raise InvalidRequest(f"routed_experts is not {FORM}", "routed_experts")
    return np.frombuffer(body, dtype).reshape(shape)


RoutedExperts = Annotated[RoutedRows | None, PlainValidator(_read, json_schema_input_type=str | None)]
