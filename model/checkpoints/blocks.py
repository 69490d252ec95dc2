"""A variant's expert blocks on disk: `config.json` and `blocks.safetensors` in one folder."""

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn

from model.blocks import BLOCKS, build_block
from model.blocks.base import BlockConfig, ExpertBlock
from model.errors import CheckpointError, UnsupportedConfig

WEIGHTS_FILE = "blocks.safetensors"
CONFIG_FILE = "config.json"
SHIPPED = Path(__file__).parent.parent / "weights"


@dataclass(frozen=True, slots=True)
class BlockFolder:
    """What a folder holds: a variant's configuration and its blocks by layer."""

    config: BlockConfig
    blocks: dict[int, ExpertBlock]
    fingerprint: str = (
        ""  # of the files, where it is known; else the blocks' own parameters tell them from others
    )


def shipped_variants() -> list[str]:
    """Names of everything that comes with Libration, the controls of training included."""
    return sorted(path.parent.name for path in SHIPPED.glob(f"*/{CONFIG_FILE}"))


def shipped_folder(variant: str) -> Path:
    """Where the blocks that come with Libration lie."""
    return SHIPPED / variant


def read_config(folder: Path) -> BlockConfig:
    """The block configuration of a folder. Raises CheckpointError naming what is missing or wrong."""
    path = folder / CONFIG_FILE
    try:
        raw: dict[str, Any] = json.loads(path.read_text())
        kind = raw["kind"]
        if kind not in BLOCKS:
            raise CheckpointError(f"{path}: kind {kind!r} is not one of {sorted(BLOCKS)}")
        raw["layers"] = tuple(raw["layers"])
        config_type, _ = BLOCKS[kind]
        return config_type(**raw)
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise CheckpointError(f"{path} is no block configuration: {error}") from error


def load_blocks(folder: Path, hidden_size: int) -> BlockFolder:
    """Blocks by layer, float32, without gradients. Raises CheckpointError on any missing or misshapen tensor."""
    config = read_config(folder)
    if config.hidden_size != hidden_size:
        raise CheckpointError(
            f"{folder}: blocks are for hidden size {config.hidden_size}, the base model has {hidden_size}"
        )
    path = folder / WEIGHTS_FILE
    try:
        stored = load_file(path)
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{path} cannot be read: {error}") from error
    blocks: dict[int, ExpertBlock] = {}
    for layer in config.layers:
        try:
            block = build_block(config)
        except UnsupportedConfig as error:
            raise CheckpointError(f"{folder / CONFIG_FILE}: {error}") from error
        for name, parameter in block.named_parameters():
            key = f"layers.{layer}.{name}"
            tensor = stored.pop(key, None)
            if tensor is None:
                raise CheckpointError(f"{path} has no tensor {key!r}")
            if tensor.shape != parameter.shape:
                raise CheckpointError(
                    f"{path}: tensor {key!r} has shape {tuple(tensor.shape)}, expected {tuple(parameter.shape)}"
                )
            if not torch.isfinite(tensor).all():
                raise CheckpointError(f"{path}: tensor {key!r} holds values that are not finite")
            parameter.data = tensor.float()
            parameter.requires_grad = False
        blocks[layer] = block.eval()
    if stored:
        raise CheckpointError(f"{path} has tensors that no block takes: {sorted(stored)[:3]}")
    return BlockFolder(config, blocks)


def save_blocks(
    folder: Path, config: BlockConfig, blocks: Mapping[int, nn.Module], dtype: torch.dtype
) -> None:
    """Write blocks in `dtype`; each file appears whole or not at all."""
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {
        f"layers.{layer}.{name}": parameter.detach().to(dtype).contiguous()
        for layer, block in blocks.items()
        for name, parameter in block.named_parameters()
    }
    partial = folder / f"{WEIGHTS_FILE}.partial"
    save_file(tensors, partial)
    partial.replace(folder / WEIGHTS_FILE)
    (folder / CONFIG_FILE).write_text(json.dumps(asdict(config), indent=1) + "\n")
