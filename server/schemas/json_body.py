"""From the bytes of a body to plain values, strictly: no NaN, no lone surrogate, no absurd shape."""

import re
from typing import Any

import orjson

from server.refusals import MalformedBody

MAX_NESTING = 64
MAX_CONTAINERS = 20_000  # lists and objects; each costs far more memory than its two bytes
MAX_MEMBERS = 50_000  # names in objects

STRING = re.compile(rb'"[^"\\]*(?:\\.[^"\\]*)*"?', re.DOTALL)
BRACKET = re.compile(rb"[\[{\]}]")


def parse_json(body: bytes) -> Any:  # Any: JSON
    """The value of a JSON text. Raises MalformedBody."""
    _check_shape(body)
    try:
        return orjson.loads(body)
    except orjson.JSONDecodeError as error:
        raise MalformedBody(
            f"the body is not valid JSON: {error.msg} (line {error.lineno}, column {error.colno})"
        ) from None


def _check_shape(body: bytes) -> None:
    """Refuse what would grow to many times its size once parsed."""
    if body.count(b"[") + body.count(b"{") <= MAX_NESTING and body.count(b":") <= MAX_MEMBERS:
        return
    structure = STRING.sub(b"", body)
    if structure.count(b":") > MAX_MEMBERS or structure.count(b"[") + structure.count(b"{") > MAX_CONTAINERS:
        raise MalformedBody(
            f"the body has too many parts; allowed: {MAX_CONTAINERS} lists and objects, {MAX_MEMBERS} members"
        )
    depth = 0
    for bracket in BRACKET.finditer(structure):
        depth += 1 if bracket.group() in b"[{" else -1
        if depth > MAX_NESTING:
            raise MalformedBody(f"the body is nested too deeply; allowed: {MAX_NESTING} levels")
