"""Reading a safetensors file that nobody vouches for: everything is bounded and compared before it is used.

Layout: u64 little-endian header size | header, JSON | tensors, back to back. Only float32 tensors of names and
shapes that the caller expects are read. Does not know what the tensors mean.
"""

import json
import math
import os
import stat
from collections.abc import Generator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from keystore.errors import InvalidSnapshot
from keystore.records import Float32Array

MAX_HEADER_BYTES = 1 << 20

Shape = tuple[int, ...]


@dataclass(frozen=True, slots=True)
class TensorFile:
    """An open file whose header has been read; `read` may be called once."""

    name: str
    metadata: Mapping[str, str]
    _entries: Mapping[str, Any]  # Any: JSON, checked by `read`
    _file: BinaryIO
    _body_bytes: int

    def read(self, shapes: Mapping[str, Shape]) -> Mapping[str, Float32Array]:
        """Exactly the tensors of `shapes`, each an array of its own.

        Raises InvalidSnapshot naming file and tensor when one is missing, unknown, of another type, shape or
        size, or when the file is not exactly as long as they are together.
        """
        entries = self._entries
        for missing in sorted(shapes.keys() - entries.keys()):
            raise InvalidSnapshot(f"{self.name}: tensor {missing} is missing")
        for unknown in sorted(entries.keys() - shapes.keys()):
            raise InvalidSnapshot(f"{self.name}: tensor {unknown[:100]!r} has no place here")
        spans = {each: _span(f"{self.name}: tensor {each}", entries[each], shapes[each]) for each in shapes}
        end = 0
        for tensor in sorted(spans, key=lambda each: spans[each]):
            if spans[tensor][0] != end:
                raise InvalidSnapshot(
                    f"{self.name}: tensor {tensor} starts at byte {spans[tensor][0]}; allowed: {end}"
                )
            end = spans[tensor][1]
        body = memoryview(self._file.read(end) if end == self._body_bytes else b"")
        if len(body) != end:
            raise InvalidSnapshot(f"{self.name}: {self._body_bytes} bytes of tensors; its header says {end}")
        return {
            tensor: np.frombuffer(body[first:last], "<f4").astype(np.float32).reshape(shapes[tensor])
            for tensor, (first, last) in spans.items()
        }


@contextmanager
def open_tensors(path: Path) -> Generator[TensorFile]:
    """The file with its header read. Raises InvalidSnapshot naming the file; OSError passes through."""
    # One descriptor, and no memory map: a file that shrinks meanwhile is a short read, not a dead process.
    with os.fdopen(os.open(path, os.O_RDONLY | os.O_NONBLOCK), "rb") as file:
        status = os.fstat(file.fileno())
        if not stat.S_ISREG(status.st_mode):
            raise InvalidSnapshot(f"{path.name} is no regular file")
        size = int.from_bytes(file.read(8), "little")
        if not 2 <= size <= min(MAX_HEADER_BYTES, status.st_size - 8):
            raise InvalidSnapshot(
                f"{path.name}: header of {size} bytes in a file of {status.st_size}; allowed: 2 to"
                f" {MAX_HEADER_BYTES}"
            )
        entries = _parsed(path.name, file.read(size))
        metadata = _metadata(path.name, entries.pop("__metadata__", {}))
        yield TensorFile(path.name, metadata, entries, file, status.st_size - 8 - size)


def _parsed(name: str, header: bytes) -> dict[str, Any]:  # Any: JSON
    try:
        entries: Any = json.loads(header.decode(), object_pairs_hook=_unique)
    except (ValueError, RecursionError) as error:
        raise InvalidSnapshot(f"{name}: its header is no JSON: {error}") from error
    if not isinstance(entries, dict):
        raise InvalidSnapshot(f"{name}: its header is no JSON object")
    return entries


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:  # Any: JSON
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ValueError("a name comes twice")
    return found


def _metadata(name: str, entry: Any) -> Mapping[str, str]:  # Any: JSON
    if not isinstance(entry, dict) or not all(isinstance(value, str) for value in entry.values()):
        raise InvalidSnapshot(f"{name}: its metadata is no object of strings")
    return entry


def _span(name: str, entry: Any, shape: Shape) -> tuple[int, int]:  # Any: JSON
    """First and last byte of a tensor whose type, shape and size are as they must be."""
    if not isinstance(entry, dict) or entry.keys() != {"dtype", "shape", "data_offsets"}:
        raise InvalidSnapshot(f"{name} is not described by dtype, shape and data_offsets")
    if entry["dtype"] != "F32" or entry["shape"] != list(shape):
        found = f"{str(entry['dtype'])[:20]} {str(entry['shape'])[:100]}"
        raise InvalidSnapshot(f"{name} is {found}; allowed: F32 {list(shape)}")
    offsets: Any = entry["data_offsets"]
    if not isinstance(offsets, list) or [type(each) for each in offsets] != [int, int]:
        raise InvalidSnapshot(f"{name}: data_offsets are not two whole numbers")
    first, last = offsets
    if first < 0 or last - first != 4 * math.prod(shape):
        raise InvalidSnapshot(f"{name} takes bytes {first} to {last}; allowed: {4 * math.prod(shape)} bytes")
    return first, last
