"""A checkpoint's chat template: Jinja that nobody vouches for, run in a sandbox with limits on time and size."""

import json
import re
import sys
import time
from collections.abc import Callable, Generator, Mapping, Sequence, Sized
from contextlib import contextmanager
from datetime import datetime
from functools import wraps
from types import FrameType
from typing import Any, NoReturn

import jinja2
from jinja2 import nodes
from jinja2.exceptions import SecurityError
from jinja2.ext import Extension, LoopControlExtension
from jinja2.parser import Parser
from jinja2.runtime import Context
from jinja2.sandbox import ImmutableSandboxedEnvironment

from model.errors import ChatTemplateError, CheckpointError

RENDER_TIMEOUT_S = 2.0
MAX_CHARS = 4 << 20  # of a prompt, and of anything that a template makes on the way
LARGE_WIDTH = re.compile(r"\*|\d{6}")  # in a format


class ChatTemplate:
    """One template. Safe to use from several threads."""

    def __init__(self, source: str):
        """Raises CheckpointError when it is none."""
        environment = _Sandbox(
            trim_blocks=True, lstrip_blocks=True, extensions=[LoopControlExtension, _Generation]
        )
        environment.filters = {name: _checked(each) for name, each in environment.filters.items()}
        environment.filters["tojson"] = _to_json
        try:
            self._template = environment.from_string(
                source, globals={"raise_exception": _refuse, "strftime_now": _now}
            )
        except (jinja2.TemplateError, RecursionError) as error:
            raise CheckpointError(f"the chat template is none: {error}") from error

    def render(self, messages: Sequence[Mapping[str, Any]], **names: Any) -> str:  # Any: JSON of a request
        """The prompt with the assistant's turn opened. Raises ChatTemplateError."""
        try:
            with _limited():
                return self._template.render(messages=messages, add_generation_prompt=True, **names)
        except jinja2.TemplateError as error:
            raise ChatTemplateError(f"the chat template refuses these messages: {error}") from error
        except (ArithmeticError, LookupError, MemoryError, RecursionError, TypeError, ValueError) as error:
            raise ChatTemplateError(f"the chat template fails on these messages: {error}") from error


class _Sandbox(ImmutableSandboxedEnvironment):
    """Jinja's own, without ways to ask for more memory than there is in one call."""

    intercepted_binops = frozenset({"+", "*", "**", "%"})

    def call_binop(
        self, context: Context, operator: str, left: Any, right: Any
    ) -> Any:  # Any: template values
        if operator == "%" and isinstance(left, str):
            _check_format(left)
        elif operator == "**":
            _check_size(_size(left) * _size(right))
        elif isinstance(left, Sized) or isinstance(right, Sized):
            _check_size(_size(left) * _size(right) if operator == "*" else _size(left) + _size(right))
        return super().call_binop(context, operator, left, right)

    def call(self, context: Context, obj: Any, *args: Any, **kwargs: Any) -> Any:  # Any: template values
        _check_arguments(*args, **kwargs)
        of = getattr(getattr(obj, "__wrapped__", obj), "__self__", None)
        if isinstance(of, str) and getattr(obj, "__name__", "") in ("format", "format_map"):
            _check_format(of)
        return super().call(context, obj, *args, **kwargs)


class _Generation(Extension):
    """`{% generation %}` marks what a model is trained on, and changes nothing in a prompt."""

    tags: set[str] = {"generation"}  # noqa: RUF012 - as Extension declares it

    def parse(self, parser: Parser) -> list[nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


@contextmanager
def _limited() -> Generator[None]:
    """Watches every line of Python that a template comes to, on this thread; raises SecurityError in it."""
    deadline = time.monotonic() + RENDER_TIMEOUT_S

    def watch(frame: FrameType, event: str, result: Any) -> Any:  # Any: as sys.settrace wants it
        if time.monotonic() > deadline:
            raise SecurityError(f"it takes longer than {RENDER_TIMEOUT_S:g} s")
        if event == "return" and isinstance(result, str):
            _check_size(len(result))
        return watch

    before = sys.gettrace()
    sys.settrace(watch)
    try:
        yield
    finally:
        sys.settrace(before)


def _checked(function: Callable[..., Any]) -> Callable[..., Any]:  # Any: of any filter
    """A filter that refuses widths and counts that are too large: constant ones are computed without a watch."""

    @wraps(function)
    def checked(*args: Any, **kwargs: Any) -> Any:
        _check_arguments(*args, **kwargs)
        return function(*args, **kwargs)

    return checked


def _check_arguments(*args: Any, **kwargs: Any) -> None:  # Any: template values
    for each in (*args, *kwargs.values()):
        if isinstance(each, int):
            _check_size(abs(each))


def _check_size(size: float) -> None:
    if size > MAX_CHARS:
        raise SecurityError(f"it makes something of size {size:g}; allowed: {MAX_CHARS}")


def _check_format(text: str) -> None:
    if LARGE_WIDTH.search(text):
        raise SecurityError(f"it formats with a width like {text[:40]!r}")


def _size(value: Any) -> float:  # Any: a template's value
    """Of a text or list its length, of a number the number itself."""
    return len(value) if isinstance(value, Sized) else abs(value)


def _to_json(
    value: Any,  # Any: a template's value
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """As transformers renders it: plain JSON, nothing escaped for HTML."""
    return json.dumps(
        value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys
    )


def _now(form: str) -> str:
    return datetime.now().strftime(form)


def _refuse(message: str) -> NoReturn:
    raise jinja2.TemplateError(message)
