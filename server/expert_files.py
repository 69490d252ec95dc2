"""Files of experts to add: read, given addresses, and kept where the next start finds them. Knows no engine."""

import os
import tempfile
from collections.abc import Collection, Mapping
from pathlib import Path

import numpy as np

from keystore.backends.data_file import make_folder
from keystore.records import Float32Array
from model.blocks.base import ExpertBlock
from model.blocks.some import SomeBlock
from model.checkpoints.experts import ExpertFile, read_experts
from model.errors import CheckpointError
from server.settings import Settings


def kept_folder(settings: Settings, endpoint: str) -> Path:
    """Where the files of an endpoint's experts are kept, by digest."""
    return settings.data_dir / f"experts-{endpoint}"


def plastic_blocks(
    blocks: Mapping[int, ExpertBlock], plastic_layers: Collection[int]
) -> dict[int, SomeBlock]:
    """The blocks that experts may be added to."""
    return {
        layer: block
        for layer, block in blocks.items()
        if layer in plastic_layers and isinstance(block, SomeBlock)
    }


def addresses(file: ExpertFile, blocks: Mapping[int, SomeBlock], seed: int) -> dict[int, Float32Array]:
    """Initial keys (n, D) by layer: the file's, or else random ones as long as the anchors are on average."""
    keys: dict[int, Float32Array] = {}
    for layer in file.matrices:
        if layer in file.keys:
            keys[layer] = file.keys[layer].numpy()
            continue
        anchors = blocks[layer].anchors.detach().float().numpy(force=True)
        shape = (file.count_of(layer), anchors.shape[1])
        directions = np.random.default_rng((seed, layer)).standard_normal(shape)
        length = np.linalg.norm(anchors.astype(np.float64), axis=1).mean()
        directions *= length / np.linalg.norm(directions, axis=1, keepdims=True)
        keys[layer] = directions.astype(np.float32)
    return keys


def keep(file: ExpertFile, folder: Path) -> None:
    """Write the file durably under its digest; whole, or not at all. Once there it is left alone."""
    path = _path(folder, file.digest)
    if not folder.is_dir():
        make_folder(folder)
        folder.chmod(0o700)
    if not path.exists():
        _write(file.content, path)
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)  # also of a file that was there: whoever wrote it may have died before this
    finally:
        os.close(descriptor)


def read_kept(name: str, digest: str, folder: Path, blocks: Mapping[int, SomeBlock]) -> ExpertFile:
    """The file of the expert group `name`. Raises CheckpointError naming file and group."""
    path = _path(folder, digest)
    try:
        file = read_experts(path, blocks)
    except OSError as error:
        raise CheckpointError(
            f"the experts of group {name!r} cannot be read: {path}: {error.strerror}; put the file back, or"
            f" retire the group: libration keys experts retire"
        ) from error
    if file.digest != digest:
        raise CheckpointError(
            f"the experts of group {name!r} are not those that were added: {path} has the digest {file.digest}"
        )
    return file


def _write(content: bytes, path: Path) -> None:
    with tempfile.NamedTemporaryFile(dir=path.parent, suffix=".partial", delete=False) as partial:
        try:
            partial.write(content)
            partial.flush()
            os.fsync(partial.fileno())
            Path(partial.name).replace(path)
        except BaseException:
            Path(partial.name).unlink()
            raise


def _path(folder: Path, digest: str) -> Path:
    return folder / f"{digest}.safetensors"
