"""Read a GGUF llama file: configuration, dequantised weights, vocabulary. Nothing in the file is executed."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NoReturn, TypeVar

import gguf
import numpy as np
import torch
from gguf import GGMLQuantizationType as QuantizationType
from torch import Tensor

from model.checkpoints import names
from model.config import ModelConfig
from model.errors import CheckpointError
from model.native.packed import pack, packable

LARGEST_COUNT = 1 << 24
LARGEST_NUMBER = 1e12

T = TypeVar("T", str, int)


class GGUFFile:
    """An open GGUF file; tensors are dequantised one at a time, as they are asked for."""

    def __init__(self, path: Path):
        self.path = path
        try:
            self._reader = gguf.GGUFReader(path)
        except (OSError, ValueError, LookupError, TypeError, ArithmeticError) as error:
            raise CheckpointError(f"{path} cannot be read as a GGUF file: {error}") from error
        self._tensors = {tensor.name: tensor for tensor in self._reader.tensors}

    def field(
        self, key: str, default: Any = None
    ) -> Any:  # metadata values are numbers, strings or lists of them
        entry = self._reader.get_field(key)
        if entry is None and default is not None:
            return default
        if entry is None:
            raise CheckpointError(f"{self.path} has no metadata field {key!r}")
        try:
            return entry.contents()
        except (ValueError, LookupError, TypeError, ArithmeticError) as error:
            raise CheckpointError(f"{self.path}: {key} cannot be read: {error}") from error

    def count(self, key: str, default: int | None = None, lowest: int = 1) -> int:
        """A whole number of the metadata."""
        given = self.field(key, default)
        if type(given) is not int or not lowest <= given <= LARGEST_COUNT:
            self.refuse(key, f"a whole number from {lowest} to {LARGEST_COUNT}")
        return given

    def number(self, key: str, default: float | None = None) -> float:
        """A positive finite number of the metadata."""
        given = self.field(key, default)
        if type(given) not in (int, float) or not 0 < given < LARGEST_NUMBER:
            self.refuse(key, f"a number above 0 and below {LARGEST_NUMBER:g}")
        return float(given)

    def text(self, key: str, default: str | None = None) -> str:
        given = self.field(key, default)
        if not isinstance(given, str):
            self.refuse(key, "a string")
        return given

    def items(self, key: str, kind: type[T]) -> list[T]:
        """A list of strings or of whole numbers."""
        given: Any = self.field(key)
        if not isinstance(given, list) or not all(type(each) is kind for each in given):
            self.refuse(key, f"a list of {'strings' if kind is str else 'whole numbers'}")
        return given

    def refuse(self, key: str, allowed: str) -> NoReturn:
        """Raises CheckpointError saying what a field of the metadata is and what is allowed."""
        given = str(self.field(key, "missing"))[:100]
        raise CheckpointError(f"{self.path}: {key} is {given}; allowed: {allowed}")

    def config(self) -> ModelConfig:
        architecture = self.text("general.architecture")
        if architecture != "llama":
            raise CheckpointError(
                f"{self.path} is a {architecture!r} file; GGUF files of 'llama' are supported"
            )
        scaling = self.field("llama.rope.scaling.type", "none")
        if scaling != "none":
            raise CheckpointError(f"{self.path}: rotary positions are scaled by {scaling!r}; allowed: 'none'")
        hidden, heads = self.count("llama.embedding_length"), self.count("llama.attention.head_count")
        head_dim = self.count("llama.attention.key_length", hidden // heads)
        if head_dim % 2:
            self.refuse("llama.attention.key_length", "an even number")
        groups = self.count("llama.attention.head_count_kv", heads)
        if heads % groups:
            self.refuse("llama.attention.head_count_kv", f"a divisor of the heads, {heads}")
        divisors: list[float] = []
        if names.GGUF_ROPE_DIVISORS in self._tensors:
            divisors = self.tensor(names.GGUF_ROPE_DIVISORS, (head_dim // 2,)).tolist()
        return ModelConfig(
            vocab_size=self.count("llama.vocab_size"),
            hidden_size=hidden,
            intermediate_size=self.count("llama.feed_forward_length"),
            num_hidden_layers=self.count("llama.block_count"),
            num_attention_heads=heads,
            num_key_value_heads=groups,
            head_dim=head_dim,
            rms_norm_eps=self.number("llama.attention.layer_norm_rms_epsilon"),
            rope_theta=self.number("llama.rope.freq_base", 10_000.0),
            max_position_embeddings=self.count("llama.context_length"),
            bos_token_id=self.count("tokenizer.ggml.bos_token_id", lowest=0),
            eos_token_id=self.count("tokenizer.ggml.eos_token_id", lowest=0),
            rope_divisors=tuple(divisors),
        )

    def tensor(self, name: str, shape: tuple[int, ...]) -> Tensor:
        """One weight, dequantised to float32, checked against the shape that the configuration implies."""
        found = self._tensors.get(name)
        if found is None:
            raise CheckpointError(f"{self.path} has no tensor {name!r}")
        given = tuple(int(size) for size in reversed(found.shape))
        if given != shape:
            raise CheckpointError(f"{self.path}: tensor {name!r} has shape {given}, expected {shape}")
        try:
            values = np.array(gguf.dequantize(found.data, found.tensor_type), dtype=np.float32).reshape(shape)
        except (NotImplementedError, ValueError, RuntimeError) as error:
            raise CheckpointError(f"{self.path}: tensor {name!r} cannot be read: {error}") from error
        if not np.isfinite(values).all():
            raise CheckpointError(f"{self.path}: tensor {name!r} holds values that are not finite")
        return torch.from_numpy(values)

    def quants(self, name: str, shape: tuple[int, ...]) -> tuple[Tensor, Tensor, int] | None:
        """A matrix of 4 or 8 bits as it is stored: quants (N, M) uint8, scales and minima (N, M / 32, 2) float16, bits.

        w = scale q + minimum in groups of 32 inputs. Q4_1 is a scale, a minimum and 16 bytes, low nibbles first; Q8_0 a
        scale and 32 signed bytes, here shifted by 128. None for other types.
        """
        found = self._tensors.get(name)
        if found is None or found.tensor_type not in (QuantizationType.Q4_1, QuantizationType.Q8_0):
            return None
        bits, size = (4, 20) if found.tensor_type == QuantizationType.Q4_1 else (8, 34)
        blocks = np.asarray(found.data).view(np.uint8).reshape(shape[0], shape[1] // 32, size)
        header = np.ascontiguousarray(blocks[..., : 4 if bits == 4 else 2]).view(np.float16)
        if bits == 4:
            quants = np.concatenate((blocks[..., 4:] & 15, blocks[..., 4:] >> 4), axis=-1)
        else:
            quants = blocks[..., 2:] ^ 128
            header = np.concatenate((header, -128 * header), axis=-1)
        return torch.from_numpy(quants.reshape(shape)), torch.from_numpy(header), bits

    def weights(
        self, config: ModelConfig, progress: Callable[[int, int], None]
    ) -> Iterator[tuple[str, Tensor]]:
        """Every weight under our names ("embedding", "layers.3.qkv_proj", ...), float32, in file order of use."""
        shapes = _layer_shapes(config)
        self._check(config, shapes)
        yield "embedding", self.tensor(names.GGUF_EMBEDDING, (config.vocab_size, config.hidden_size))
        if names.GGUF_HEAD in self._tensors:
            yield "head", self.tensor(names.GGUF_HEAD, (config.vocab_size, config.hidden_size))
        else:
            embedding = {names.GGUF_EMBEDDING: (config.vocab_size, config.hidden_size)}
            yield from self._fused_quants("embedding", embedding, 0)
        for layer in range(config.num_hidden_layers):
            progress(layer, config.num_hidden_layers)
            for ours, theirs in names.GGUF_LAYER.items():
                prefixed = {f"blk.{layer}.{name}": shapes[name] for name in theirs}
                yield from self._fused_quants(f"layers.{layer}.{ours}", prefixed, config.head_dim)
                parts = [self._part(f"blk.{layer}.", name, shapes[name], config.head_dim) for name in theirs]
                yield f"layers.{layer}.{ours}", torch.cat(parts)
        yield "final_norm", self.tensor(names.GGUF_FINAL_NORM, (config.hidden_size,))
        progress(config.num_hidden_layers, config.num_hidden_layers)

    def _check(self, config: ModelConfig, shapes: dict[str, tuple[int, ...]]) -> None:
        """Raises CheckpointError unless the file has all that the model takes, in its shapes, and nothing else."""
        if config.num_hidden_layers > len(self._tensors):  # or the list alone might fill the memory
            self.refuse("llama.block_count", f"as many as the file's {len(self._tensors)} tensors are for")
        embedding = (config.vocab_size, config.hidden_size)
        wanted = {names.GGUF_EMBEDDING: embedding, names.GGUF_FINAL_NORM: (config.hidden_size,)}
        wanted |= {
            f"blk.{layer}.{name}": shape
            for layer in range(config.num_hidden_layers)
            for name, shape in shapes.items()
        }
        optional = {names.GGUF_HEAD: embedding, names.GGUF_ROPE_DIVISORS: (config.head_dim // 2,)}
        for name in wanted:
            if name not in self._tensors:
                raise CheckpointError(f"{self.path} has no tensor {name!r}")
        for name, tensor in self._tensors.items():
            shape = wanted.get(name) or optional.get(name)
            if shape is None:
                raise CheckpointError(
                    f"{self.path}: tensor {name!r} is not part of the model that it describes"
                )
            given = tuple(int(size) for size in reversed(tensor.shape))
            if given != shape:
                raise CheckpointError(f"{self.path}: tensor {name!r} has shape {given}, expected {shape}")

    def _fused_quants(
        self, ours: str, theirs: dict[str, tuple[int, ...]], head_dim: int
    ) -> Iterator[tuple[str, Tensor]]:
        """The packed form of a fused projection (model.native.packed), if its parts are stored in as many bits."""
        found = [self.quants(name, shape) for name, shape in theirs.items()]
        parts = [part for part in found if part is not None]
        if len({bits for _, _, bits in parts}) != 1 or len(parts) < len(found):
            return
        quants: list[Tensor] = []
        scales: list[Tensor] = []
        for name, (own_quants, own_scales, _) in zip(theirs, parts, strict=True):
            rotary = name.endswith(names.GGUF_ROTARY)
            quants.append(_halves(own_quants, head_dim) if rotary else own_quants)
            scales.append(_halves(own_scales, head_dim) if rotary else own_scales)
        fused = torch.cat(quants)
        if packable(*fused.shape):
            yield f"{ours}{names.PACKED}", pack(fused, torch.cat(scales), parts[0][2])

    def _part(self, prefix: str, name: str, shape: tuple[int, ...], head_dim: int) -> Tensor:
        weight = self.tensor(prefix + name, shape)
        return _halves(weight, head_dim) if name in names.GGUF_ROTARY else weight


def _layer_shapes(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Shapes of a layer's weights by the file's name."""
    hidden, inner = config.hidden_size, config.intermediate_size
    return {
        "attn_q.weight": (config.query_size, hidden),
        "attn_k.weight": (config.key_value_size, hidden),
        "attn_v.weight": (config.key_value_size, hidden),
        "attn_output.weight": (hidden, config.query_size),
        "ffn_gate.weight": (inner, hidden),
        "ffn_up.weight": (inner, hidden),
        "ffn_down.weight": (hidden, inner),
        "attn_norm.weight": (hidden,),
        "ffn_norm.weight": (hidden,),
    }


def _halves(rows: Tensor, head_dim: int) -> Tensor:
    """Rows (first dimension) of rotary heads from GGUF's interleaved pairs back into two halves."""
    return rows.unflatten(0, (-1, head_dim // 2, 2)).transpose(1, 2).reshape(rows.shape)
