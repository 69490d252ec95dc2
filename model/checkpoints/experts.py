"""Experts that were made elsewhere, one safetensors file: `layers.N.experts.NAME` (n, ...) and `layers.N.keys` (n, D).

Nobody vouches for such a file: its header is compared with the blocks that the experts are for before anything is
read, and the values are looked at before they are used. n new experts, D key size.
"""

import hashlib
import json
import math
import os
import re
import stat
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load, save_file
from torch import Tensor

from model.blocks.some import SomeBlock
from model.errors import InvalidExpertFile

MAX_HEADER_BYTES = 1 << 20
MAX_EXPERTS = 1024  # of a layer in one file
MAX_VALUE = 1e4  # in magnitude: what is larger overflows somewhere behind
ELEMENT_BYTES = {"F32": 4, "BF16": 2, "F16": 2}
NAME = re.compile(r"layers\.(0|[1-9][0-9]{0,3})\.(?:experts\.([a-z_]{1,40})|keys)", re.ASCII)

Shape = tuple[int, ...]


@dataclass(frozen=True, slots=True, eq=False)
class ExpertFile:
    """Checked experts by layer. Everything is float32."""

    matrices: Mapping[int, Mapping[str, Tensor]]  # each (n, outputs, inputs)
    keys: Mapping[int, Tensor]  # (n, D), of the layers that come with addresses
    content: bytes  # the whole file
    digest: str  # sha256 hex of the content

    def count_of(self, layer: int) -> int:
        """Number of experts for a layer."""
        return len(next(iter(self.matrices[layer].values())))


def read_experts(path: Path, blocks: Mapping[int, SomeBlock]) -> ExpertFile:
    """The experts in a file, for some of these blocks.

    Raises InvalidExpertFile naming file and tensor; a file that is not there or a link passes through as OSError.
    """
    with os.fdopen(os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_NOFOLLOW), "rb") as file:
        status = os.fstat(file.fileno())
        if not stat.S_ISREG(status.st_mode):
            raise InvalidExpertFile(f"{path.name} is no regular file")
        size = file.read(8)
        header_bytes = int.from_bytes(size, "little")
        if not 2 <= header_bytes <= min(MAX_HEADER_BYTES, status.st_size - 8):
            raise InvalidExpertFile(
                f"{path.name}: header of {header_bytes} bytes in a file of {status.st_size}; allowed: 2 to"
                f" {MAX_HEADER_BYTES}"
            )
        header = file.read(header_bytes)
        body_bytes = _check_header(path.name, header, blocks)
        if body_bytes != status.st_size - 8 - header_bytes:
            raise InvalidExpertFile(
                f"{path.name}: {status.st_size - 8 - header_bytes} bytes of tensors; its header says {body_bytes}"
            )
        content = size + header + file.read(body_bytes)
    try:
        tensors = load(content)
    except SafetensorError as error:
        raise InvalidExpertFile(f"{path.name}: {error}") from error
    return _sorted(path.name, tensors, content)


def write_experts(
    path: Path, matrices: Mapping[int, Mapping[str, Tensor]], keys: Mapping[int, Tensor]
) -> None:
    """Write experts, (n, outputs, inputs) by layer and name, and addresses if there are any; whole or not at all."""
    tensors = {
        f"layers.{layer}.experts.{name}": matrix.contiguous()
        for layer, named in matrices.items()
        for name, matrix in named.items()
    }
    tensors |= {f"layers.{layer}.keys": each.contiguous() for layer, each in keys.items()}
    partial = path.with_name(f"{path.name}.partial")
    save_file(tensors, partial)
    partial.replace(path)


def _check_header(name: str, header: bytes, blocks: Mapping[int, SomeBlock]) -> int:
    """Bytes that the tensors take. Raises InvalidExpertFile unless there is exactly what the layers need."""
    try:
        entries: Any = json.loads(header.decode())  # Any: JSON
    except (ValueError, RecursionError) as error:
        raise InvalidExpertFile(f"{name}: its header is no JSON: {error}") from error
    if not isinstance(entries, dict):
        raise InvalidExpertFile(f"{name}: its header is no JSON object")
    entries.pop("__metadata__", None)
    if not entries:
        raise InvalidExpertFile(f"{name} has no tensor")
    counts: dict[int, int] = {}
    for tensor, entry in entries.items():
        layer, shape = _place(name, tensor, blocks)
        counts.setdefault(layer, _count(f"{name}: tensor {tensor}", entry, shape))
    total = 0
    for layer, count in counts.items():
        wanted = {f"layers.{layer}.experts.{part}" for part in blocks[layer].experts.stacked}
        for missing in sorted(wanted - entries.keys()):
            raise InvalidExpertFile(f"{name}: tensor {missing} is missing")
        for tensor in wanted | ({f"layers.{layer}.keys"} & entries.keys()):
            _, shape = _place(name, tensor, blocks)
            total += _bytes(f"{name}: tensor {tensor}", entries[tensor], (count, *shape))
    return total


def _place(name: str, tensor: str, blocks: Mapping[int, SomeBlock]) -> tuple[int, Shape]:
    """The layer that a tensor is for, and the shape of one expert's part of it."""
    found = NAME.fullmatch(tensor)
    if found is None:
        raise InvalidExpertFile(
            f"{name}: tensor {tensor[:100]!r} has no place here; allowed: layers.N.experts.NAME and layers.N.keys"
        )
    layer, part = int(found[1]), found[2]
    if layer not in blocks:
        raise InvalidExpertFile(
            f"{name}: tensor {tensor} is for layer {layer}; allowed: {', '.join(map(str, blocks))}, the layers"
            " whose keys move"
        )
    if part is None:
        return layer, (blocks[layer].config.key_size,)
    matrices = blocks[layer].experts.stacked
    if part not in matrices:
        raise InvalidExpertFile(f"{name}: tensor {tensor}: allowed are {', '.join(matrices)}")
    return layer, tuple(matrices[part].shape[1:])


def _count(tensor: str, entry: Any, shape: Shape) -> int:  # Any: JSON
    """How many experts a tensor is of."""
    given: Any = entry.get("shape") if isinstance(entry, dict) else None
    if not isinstance(given, list) or len(given) != 1 + len(shape) or type(given[0]) is not int:
        raise InvalidExpertFile(f"{tensor} has shape {str(given)[:100]}; allowed: (n, {_joined(shape)})")
    if not 1 <= given[0] <= MAX_EXPERTS:
        raise InvalidExpertFile(f"{tensor} is of {given[0]} experts; allowed: 1 to {MAX_EXPERTS}")
    return given[0]


def _bytes(tensor: str, entry: Any, shape: Shape) -> int:  # Any: JSON
    given: dict[str, Any] = entry if isinstance(entry, dict) else {}
    if given.get("shape") != list(shape):
        raise InvalidExpertFile(
            f"{tensor} has shape {str(given.get('shape'))[:100]}; allowed: ({_joined(shape)})"
        )
    element = ELEMENT_BYTES.get(str(given.get("dtype")))
    if element is None:
        raise InvalidExpertFile(
            f"{tensor} is {str(given.get('dtype'))[:20]}; allowed: {', '.join(ELEMENT_BYTES)}"
        )
    return element * math.prod(shape)


def _joined(shape: Shape) -> str:
    return ", ".join(map(str, shape))


def _sorted(name: str, tensors: Mapping[str, Tensor], content: bytes) -> ExpertFile:
    matrices: dict[int, dict[str, Tensor]] = {}
    keys: dict[int, Tensor] = {}
    for tensor in sorted(tensors):
        values = tensors[tensor].float()
        if not (values.abs() <= MAX_VALUE).all():
            raise InvalidExpertFile(
                f"{name}: tensor {tensor} holds values that are not finite or above {MAX_VALUE:g} in magnitude"
            )
        found = NAME.fullmatch(tensor)
        assert found is not None, tensor
        if found[2] is None:
            keys[int(found[1])] = values
        else:
            matrices.setdefault(int(found[1]), {})[found[2]] = values
    return ExpertFile(matrices, keys, content, hashlib.sha256(content).hexdigest())
