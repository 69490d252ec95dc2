"""A JSON object that somebody else wrote: read with a limit on its size, every value checked where it is asked for."""

import json
import re
from pathlib import Path
from typing import Any, NoReturn

from model.checkpoints.plain_file import read_small
from model.errors import CheckpointError

MAX_BYTES = 4 << 20
SURROGATE = re.compile(rb"\\u[dD][89a-fA-F]")
LARGEST = 1e12


class JsonFile:
    """The top level of one file. Every method raises CheckpointError naming file and field."""

    def __init__(self, path: Path, table: dict[str, Any]):  # Any: JSON
        self.path, self._table = path, table

    @classmethod
    def read(cls, path: Path, max_bytes: int = MAX_BYTES) -> "JsonFile":
        return cls(path, parsed_object(str(path), read_small(path, max_bytes)))

    @classmethod
    def read_if_there(cls, path: Path) -> "JsonFile":
        """An empty one where there is no such file."""
        return cls.read(path) if path.exists() else cls(path, {})

    def has(self, name: str) -> bool:
        """Whether the field is there and not null."""
        return self._table.get(name) is not None

    def value(self, name: str) -> Any:  # Any: JSON
        """The field as it is; None where it is missing."""
        return self._table.get(name)

    def count(self, name: str, default: int | None = None, lowest: int = 1, highest: int = 1 << 20) -> int:
        """A whole number."""
        if not self.has(name) and default is not None:
            return default
        given: Any = self._table.get(name)
        if type(given) is not int or not lowest <= given <= highest:
            self.refuse(name, f"a whole number from {lowest} to {highest}")
        return int(given)

    def number(self, name: str, default: float | None = None) -> float:
        """A positive finite number."""
        if not self.has(name) and default is not None:
            return default
        given: Any = self._table.get(name)
        if type(given) not in (int, float) or not 0 < given < LARGEST:
            self.refuse(name, f"a number above 0 and below {LARGEST:g}")
        return float(given)

    def flag(self, name: str, *, default: bool) -> bool:
        given = self._table.get(name)
        if given is None:
            return default
        if type(given) is not bool:
            self.refuse(name, "true or false")
        return given

    def text(self, name: str, default: str = "") -> str:
        given = self._table.get(name)
        if given is None:
            return default
        if not isinstance(given, str):
            self.refuse(name, "a string")
        return given

    def section(self, name: str) -> "JsonFile":
        """An object within the object, empty where it is missing; its fields are named `name.field`."""
        given = self._table.get(name)
        if given is None:
            given = {}
        if not isinstance(given, dict):
            self.refuse(name, "an object")
        return Section(self.path, given, f"{name}.")

    def refuse(self, name: str, allowed: str) -> NoReturn:
        """Raises CheckpointError saying what the field is and what is allowed."""
        given = str(self._table.get(name))[:100]
        raise CheckpointError(f"{self.path}: {self._shown(name)} is {given}; allowed: {allowed}")

    def _shown(self, name: str) -> str:
        return name


class Section(JsonFile):
    """A part of a file."""

    def __init__(self, path: Path, table: dict[str, Any], prefix: str):  # Any: JSON
        super().__init__(path, table)
        self._prefix = prefix

    def _shown(self, name: str) -> str:
        return self._prefix + name


def parsed_object(name: str, content: bytes) -> dict[str, Any]:  # Any: JSON
    """A JSON object. Raises CheckpointError with `name`."""
    try:
        table: Any = json.loads(content.decode())
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{name} is no JSON: {str(error)[:200]}") from error
    if not isinstance(table, dict):
        raise CheckpointError(f"{name} is no JSON object")
    if SURROGATE.search(content):
        try:
            json.dumps(table, ensure_ascii=False).encode()
        except UnicodeEncodeError as error:
            raise CheckpointError(f"{name} holds half a character, a lone surrogate") from error
    return table
