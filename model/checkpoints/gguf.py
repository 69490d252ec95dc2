"""Read a GGUF llama file: configuration, dequantised weights, vocabulary. Nothing in the file is executed."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from torch import Tensor

from model.checkpoints import names
from model.config import ModelConfig
from model.errors import CheckpointError


class GGUFFile:
    """An open GGUF file; tensors are dequantised one at a time, as they are asked for."""

    def __init__(self, path: Path):
        self.path = path
        try:
            self._reader = gguf.GGUFReader(path)
        except (OSError, ValueError, IndexError) as error:
            raise CheckpointError(f"{path} cannot be read as a GGUF file: {error}") from error
        self._tensors = {tensor.name: tensor for tensor in self._reader.tensors}

    def field(self, key: str) -> Any:  # metadata values are numbers, strings or lists of them
        entry = self._reader.get_field(key)
        if entry is None:
            raise CheckpointError(f"{self.path} has no metadata field {key!r}")
        return entry.contents()

    def config(self) -> ModelConfig:
        architecture = self.field("general.architecture")
        if architecture != "llama":
            raise CheckpointError(
                f"{self.path} is a {architecture!r} file; GGUF files of 'llama' are supported"
            )
        hidden = int(self.field("llama.embedding_length"))
        heads = int(self.field("llama.attention.head_count"))
        return ModelConfig(
            vocab_size=int(self.field("llama.vocab_size")),
            hidden_size=hidden,
            intermediate_size=int(self.field("llama.feed_forward_length")),
            num_hidden_layers=int(self.field("llama.block_count")),
            num_attention_heads=heads,
            num_key_value_heads=int(self.field("llama.attention.head_count_kv")),
            head_dim=hidden // heads,
            rms_norm_eps=float(self.field("llama.attention.layer_norm_rms_epsilon")),
            rope_theta=float(self.field("llama.rope.freq_base")),
            max_position_embeddings=int(self.field("llama.context_length")),
            bos_token_id=int(self.field("tokenizer.ggml.bos_token_id")),
            eos_token_id=int(self.field("tokenizer.ggml.eos_token_id")),
        )

    def tensor(self, name: str, shape: tuple[int, ...]) -> Tensor:
        """One weight, dequantised to float32, checked against the shape that the configuration implies."""
        found = self._tensors.get(name)
        if found is None:
            raise CheckpointError(f"{self.path} has no tensor {name!r}")
        given = tuple(int(size) for size in reversed(found.shape))
        if given != shape:
            raise CheckpointError(f"{self.path}: tensor {name!r} has shape {given}, expected {shape}")
        values = np.array(gguf.dequantize(found.data, found.tensor_type), dtype=np.float32)
        return torch.from_numpy(values).reshape(shape)

    def quants(self, name: str, shape: tuple[int, ...]) -> tuple[Tensor, Tensor] | None:
        """A Q4_1 matrix as it is stored: quants (N, M) uint8, scales and zeros (N, M / 32, 2) float32.

        A block of 32 inputs is a scale d, a minimum m and 16 bytes, low nibbles first: w = d q + m, which is
        d (q - 8) + (m + 8 d). None for other types.
        """
        found = self._tensors.get(name)
        if found is None or found.tensor_type != gguf.GGMLQuantizationType.Q4_1:
            return None
        rows, columns = shape
        blocks = np.asarray(found.data).view(np.uint8).reshape(rows, columns // 32, 20)
        scale, minimum = (
            np.ascontiguousarray(blocks[..., at : at + 2]).view(np.float16)[..., 0].astype(np.float32)
            for at in (0, 2)
        )
        nibbles = np.concatenate((blocks[..., 4:] & 15, blocks[..., 4:] >> 4), axis=-1)
        pairs = np.stack((scale, minimum + 8 * scale), axis=-1)
        return torch.from_numpy(nibbles.reshape(shape)), torch.from_numpy(pairs)

    def weights(
        self, config: ModelConfig, progress: Callable[[int, int], None]
    ) -> Iterator[tuple[str, Tensor]]:
        """Every weight under our names ("embedding", "layers.3.qkv_proj", ...), float32, in file order of use."""
        hidden, inner = config.hidden_size, config.intermediate_size
        shapes = {
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
        yield "embedding", self.tensor(names.GGUF_EMBEDDING, (config.vocab_size, hidden))
        for layer in range(config.num_hidden_layers):
            progress(layer, config.num_hidden_layers)
            for ours, theirs in names.GGUF_LAYER.items():
                prefixed = {f"blk.{layer}.{name}": shapes[name] for name in theirs}
                yield from self._fused_quants(f"layers.{layer}.{ours}", prefixed, config.head_dim)
                parts = [self._part(f"blk.{layer}.", name, shapes[name], config.head_dim) for name in theirs]
                yield f"layers.{layer}.{ours}", torch.cat(parts)
        yield "final_norm", self.tensor(names.GGUF_FINAL_NORM, (hidden,))
        progress(config.num_hidden_layers, config.num_hidden_layers)

    def _fused_quants(
        self, ours: str, theirs: dict[str, tuple[int, ...]], head_dim: int
    ) -> Iterator[tuple[str, Tensor]]:
        """The fused 4-bit form of a projection, if every part of it is stored in 4 bits.

        `.quants` (N, M) uint8 and `.scales` (M / 32, N, 2) bfloat16, as model.projection takes them.
        """
        quants: list[Tensor] = []
        scales: list[Tensor] = []
        for name, shape in theirs.items():
            found = self.quants(name, shape)
            if found is None:
                return
            rotary = name.endswith(names.GGUF_ROTARY)
            quants.append(_halves(found[0], head_dim) if rotary else found[0])
            scales.append(_halves(found[1], head_dim) if rotary else found[1])
        yield f"{ours}.quants", torch.cat(quants)
        yield f"{ours}.scales", torch.cat(scales).transpose(0, 1).bfloat16().contiguous()

    def _part(self, prefix: str, name: str, shape: tuple[int, ...], head_dim: int) -> Tensor:
        weight = self.tensor(prefix + name, shape)
        return _halves(weight, head_dim) if name in names.GGUF_ROTARY else weight


def _halves(rows: Tensor, head_dim: int) -> Tensor:
    """Rows (first dimension) of rotary heads from GGUF's interleaved pairs back into two halves."""
    return rows.unflatten(0, (-1, head_dim // 2, 2)).transpose(1, 2).reshape(rows.shape)
