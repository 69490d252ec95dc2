"""The safetensors files of a checkpoint: what they hold, checked before a single tensor is read.

Nobody vouches for them: the header's size, every type, shape and place are compared with the file, and an index may
only name files beside it. Pickled weights are never opened.
"""

import hashlib
import math
import re
from collections.abc import Callable, Generator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from model.checkpoints.json_file import JsonFile, parsed_object
from model.checkpoints.plain_file import opened
from model.errors import CheckpointError

ONE_FILE, INDEX_FILE = "model.safetensors", "model.safetensors.index.json"
PLAIN_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._-]{0,199}\.safetensors", re.ASCII)
PICKLED = ("*.bin", "*.pt", "*.pth", "*.ckpt", "*.pkl")
MAX_HEADER_BYTES = 32 << 20
MAX_INDEX_BYTES = 64 << 20
EDGE_BYTES = 1 << 20  # of a file's content that its fingerprint reads at both ends
DTYPES: Mapping[str, torch.dtype] = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}

Shape = tuple[int, ...]


@dataclass(frozen=True, slots=True)
class StoredTensor:
    """Where a tensor lies and what it is."""

    path: Path
    name: str
    shape: Shape

    def __str__(self) -> str:
        return f"{self.path}: tensor {self.name[:200]!r}"


class TensorFiles:
    """Every tensor of a folder by name. Raises CheckpointError naming file and tensor."""

    def __init__(self, folder: Path):
        self.tensors: dict[str, StoredTensor] = {}
        index = folder / INDEX_FILE
        listed = _weight_map(index) if index.exists() else None
        digest = hashlib.sha256()
        for path in _files(folder, listed):
            tensors, fingerprint = _read_header(path)
            digest.update(fingerprint)
            for tensor in tensors:
                if listed is not None and listed.get(tensor.name) != path.name:
                    raise CheckpointError(f"{tensor}: {INDEX_FILE} does not place it there")
                self.tensors[tensor.name] = tensor
        missing = next((name for name in listed or () if name not in self.tensors), None)
        if missing is not None:
            raise CheckpointError(f"{index}: tensor {missing[:200]!r} is not in the file that it names")
        self.fingerprint = digest.hexdigest()

    @contextmanager
    def reading(self) -> Generator[Callable[[StoredTensor], Tensor]]:
        """A function that reads a tensor as it is stored, for as long as the files are open.

        It raises CheckpointError, also for values that are not finite.
        """
        with ExitStack() as stack:
            files: dict[Path, Any] = {}  # Any: safetensors has no type for an open file

            def read(tensor: StoredTensor) -> Tensor:
                try:
                    if tensor.path not in files:
                        files[tensor.path] = stack.enter_context(safe_open(tensor.path, framework="pt"))
                    values: Tensor = files[tensor.path].get_tensor(tensor.name)
                except (SafetensorError, OSError) as error:
                    raise CheckpointError(f"{tensor} cannot be read: {error}") from error
                if not torch.isfinite(values).all():
                    raise CheckpointError(f"{tensor} holds values that are not finite")
                return values

            yield read


def _files(folder: Path, listed: Mapping[str, str] | None) -> list[Path]:
    if listed is not None:
        return [folder / name for name in sorted(set(listed.values()))]
    if (folder / ONE_FILE).exists():
        return [folder / ONE_FILE]
    pickled = next((path.name for pattern in PICKLED for path in sorted(folder.glob(pattern))), None)
    if pickled is not None:
        raise CheckpointError(
            f"{folder / pickled} is pickled and can run code: it is never opened; allowed: {ONE_FILE} or {INDEX_FILE}"
        )
    raise CheckpointError(f"{folder} holds no weights; allowed: {ONE_FILE} or {INDEX_FILE}")


def _weight_map(index: Path) -> dict[str, str]:
    """Tensor name to the name of the file beside the index that holds it."""
    given: Any = JsonFile.read(index, MAX_INDEX_BYTES).value("weight_map")
    if not isinstance(given, dict) or not given:
        raise CheckpointError(f"{index}: weight_map is no object with tensors")
    for tensor, name in given.items():
        if not isinstance(name, str) or not PLAIN_NAME.fullmatch(name):
            raise CheckpointError(
                f"{index}: tensor {tensor[:200]!r} is in {str(name)[:200]!r}; allowed: files beside the index,"
                " NAME.safetensors"
            )
    return given


def _read_header(path: Path) -> tuple[list[StoredTensor], bytes]:
    """The tensors of a file, and a digest of what decides its content cheaply."""
    with opened(path) as (file, size):
        prefix = file.read(8)
        header_bytes = int.from_bytes(prefix, "little")
        if len(prefix) < 8 or not 2 <= header_bytes <= min(MAX_HEADER_BYTES, size - 8):
            raise CheckpointError(
                f"{path}: a header of {header_bytes} bytes in a file of {size}; allowed: 2 to {MAX_HEADER_BYTES},"
                " within the file"
            )
        header = file.read(header_bytes)
        entries = parsed_object(f"{path}: its header", header)
        first = file.read(EDGE_BYTES)
        file.seek(max(8 + header_bytes, size - EDGE_BYTES))
        content = path.name.encode() + size.to_bytes(8, "little") + header + first + file.read(EDGE_BYTES)
    entries.pop("__metadata__", None)
    if not entries:
        raise CheckpointError(f"{path} holds no tensor")
    places = [_place(path, name, entry) for name, entry in entries.items()]
    _check_places(path, places, size - 8 - header_bytes)
    return [tensor for tensor, _, _ in places], hashlib.sha256(content).digest()


def _place(path: Path, name: str, entry: Any) -> tuple[StoredTensor, int, int]:  # Any: JSON
    """A tensor with its first byte and the one behind its last."""
    fields: dict[str, Any] = entry if isinstance(entry, dict) else {}
    shape: Any = fields.get("shape")
    offsets: Any = fields.get("data_offsets")
    tensor = StoredTensor(path, name, ())
    if not _whole_numbers(shape) or len(shape) > 8:
        raise CheckpointError(f"{tensor} has the shape {str(shape)[:100]}; allowed: a list of sizes")
    dtype = DTYPES.get(str(fields.get("dtype")))
    if dtype is None:
        raise CheckpointError(
            f"{tensor} is of type {str(fields.get('dtype'))[:20]}; allowed: {', '.join(DTYPES)}"
        )
    if not _whole_numbers(offsets) or len(offsets) != 2:
        raise CheckpointError(f"{tensor} lies at {str(offsets)[:100]}; allowed: [first byte, byte behind it]")
    first, end = offsets
    needed = math.prod(shape) * dtype.itemsize
    if end - first != needed:
        raise CheckpointError(f"{tensor} has {end - first} bytes; its type and shape need {needed}")
    return StoredTensor(path, name, tuple(shape)), first, end


def _check_places(path: Path, places: list[tuple[StoredTensor, int, int]], body_bytes: int) -> None:
    """Raises CheckpointError unless the tensors fill the file, one behind the other."""
    for tensor, _, end in places:
        if end > body_bytes:
            raise CheckpointError(
                f"{tensor} ends at byte {end} of {body_bytes}: the file is truncated, or it lies"
            )
    at = 0
    for tensor, first, end in sorted(places, key=lambda place: place[1:]):
        if first != at:
            raise CheckpointError(
                f"{tensor} begins at byte {first}; allowed: {at}, where the one before it ends"
            )
        at = end
    if at != body_bytes:
        raise CheckpointError(f"{path}: {body_bytes} bytes of tensors; its header says {at}")


def _whole_numbers(given: Any) -> bool:  # Any: JSON
    return isinstance(given, list) and all(type(each) is int and 0 <= each < 1 << 48 for each in given)
