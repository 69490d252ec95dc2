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
                parts = [self._part(f"blk.{layer}.", name, shapes[name], config.head_dim) for name in theirs]
                yield f"layers.{layer}.{ours}", torch.cat(parts)
        yield "final_norm", self.tensor(names.GGUF_FINAL_NORM, (hidden,))
        progress(config.num_hidden_layers, config.num_hidden_layers)

    def _part(self, prefix: str, name: str, shape: tuple[int, ...], head_dim: int) -> Tensor:
        weight = self.tensor(prefix + name, shape)
        if name in names.GGUF_ROTARY:
            weight = weight.view(-1, head_dim // 2, 2, shape[1]).transpose(1, 2).reshape(shape)
        return weight
