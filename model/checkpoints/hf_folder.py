"""A Hugging Face folder as a model in memory: every tensor is compared with the configuration before one is read.

H hidden, E experts.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from model.blocks.base import ExpertBlock
from model.blocks.routed_ffn import RoutedFfnBlock, RoutedFfnConfig
from model.checkpoints import names
from model.checkpoints.assemble import BaseModel, assemble
from model.checkpoints.blocks import BlockFolder
from model.checkpoints.hf_config import CONFIG_FILE, Architecture, read_architecture
from model.checkpoints.hf_tokenizer import TOKENIZER_FILE, read_tokenizer
from model.checkpoints.tensor_files import Shape, StoredTensor, TensorFiles
from model.errors import CheckpointError
from model.tokenizer import TextTokenizer

Progress = Callable[[int, int], None]


@dataclass(frozen=True, slots=True)
class Wanted:
    """One of our tensors: the checkpoint's it is made of, each of one shape, and how."""

    parts: tuple[tuple[str, Shape], ...]
    stacked: bool = False  # laid on top of each other, (parts, ...); else one behind the other


def load_folder(path: Path, dtype: torch.dtype, device: str, progress: Progress) -> BaseModel:
    """The model, its tokenizer and its routed FFNs in `dtype`. Raises CheckpointError before anything is loaded."""
    spec, tokenizer_end = read_tokenizer(path)
    architecture = read_architecture(path, tokenizer_end)
    try:
        tokenizer = TextTokenizer(spec, architecture.model.vocab_size)
    except CheckpointError as error:
        raise CheckpointError(f"{path / TOKENIZER_FILE}: {error}") from error
    files = TensorFiles(path)
    wanted = _checked_tensors(path, files.tensors, architecture)
    weights: dict[str, Tensor] = {}
    with files.reading() as read:
        for done, (name, each) in enumerate(wanted.items()):
            progress(done, len(wanted))
            parts = [files.tensors[theirs] for theirs, _ in each.parts]
            weights[name] = _joined(parts, read, dtype, stacked=each.stacked).to(device)
    progress(len(wanted), len(wanted))
    blocks = _routed_blocks(architecture.routed_ffn, weights)
    return BaseModel(
        assemble(architecture.model, weights),
        tokenizer,
        blocks=blocks,
        end_token_ids=architecture.end_token_ids,
        fingerprint=files.fingerprint,
    )


def read_routing(path: Path) -> BlockFolder:
    """A checkpoint's routing alone: blocks whose experts have shapes and no weights. Raises CheckpointError."""
    spec_end = read_tokenizer(path)[1]
    architecture, files = read_architecture(path, spec_end), TensorFiles(path)
    config = architecture.routed_ffn
    if config is None:
        raise CheckpointError(f"{path / CONFIG_FILE}: there are no experts")
    wanted = _checked_tensors(path, files.tensors, architecture)
    blocks: dict[int, ExpertBlock] = {}
    with files.reading() as read:
        for layer in config.layers:
            block = RoutedFfnBlock.without_weights(config)
            (stored, _), *_ = wanted[f"layers.{layer}.routed.anchors"].parts
            block.anchors = nn.Parameter(read(files.tensors[stored]).float(), requires_grad=False)
            blocks[layer] = block
    return BlockFolder(config, blocks, files.fingerprint)


def wanted_tensors(architecture: Architecture) -> dict[str, Wanted]:
    """Our name -> what it is made of, for the whole model."""
    config, routed = architecture.model, architecture.routed_ffn
    embedding = (config.vocab_size, config.hidden_size)
    wanted = {"embedding": Wanted(((names.HF_EMBEDDING, embedding),))}
    for layer in range(config.num_hidden_layers):
        shapes = _layer_shapes(architecture)
        tables = [names.HF_ATTENTION]
        tables += [names.HF_QKV_BIAS] if architecture.qkv_bias else []
        tables += [names.HF_O_BIAS] if architecture.o_bias else []
        tables += [names.HF_QK_NORM] if architecture.family.qk_norm else []
        is_routed = routed is not None and layer in routed.layers
        tables += [] if is_routed else [names.HF_FFN]
        tables += [names.HF_FFN_BIAS] if architecture.mlp_bias and not is_routed else []
        for table in tables:
            for ours, theirs in table.items():
                parts = tuple((f"model.layers.{layer}.{each}", shapes[each]) for each in theirs)
                wanted[f"layers.{layer}.{ours}"] = Wanted(parts)
        if routed is not None and is_routed:
            wanted |= _routed_tensors(architecture, routed, layer)
    wanted["final_norm"] = Wanted(((names.HF_FINAL_NORM, (config.hidden_size,)),))
    if not architecture.tied:
        wanted["head"] = Wanted(((names.HF_HEAD, embedding),))
    return wanted


def _layer_shapes(architecture: Architecture) -> dict[str, Shape]:
    """Shapes of everything that a layer may have, by the checkpoint's name."""
    config = architecture.model
    hidden, inner = config.hidden_size, config.intermediate_size
    query, group = config.query_size, config.key_value_size
    per_head = architecture.family.qk_norm == "head"
    return {
        "input_layernorm.weight": (hidden,),
        "post_attention_layernorm.weight": (hidden,),
        "self_attn.q_proj.weight": (query, hidden),
        "self_attn.k_proj.weight": (group, hidden),
        "self_attn.v_proj.weight": (group, hidden),
        "self_attn.o_proj.weight": (hidden, query),
        "self_attn.q_proj.bias": (query,),
        "self_attn.k_proj.bias": (group,),
        "self_attn.v_proj.bias": (group,),
        "self_attn.o_proj.bias": (hidden,),
        "self_attn.q_norm.weight": (config.head_dim if per_head else query,),
        "self_attn.k_norm.weight": (config.head_dim if per_head else group,),
        "mlp.gate_proj.weight": (inner, hidden),
        "mlp.up_proj.weight": (inner, hidden),
        "mlp.down_proj.weight": (hidden, inner),
        "mlp.gate_proj.bias": (inner,),
        "mlp.up_proj.bias": (inner,),
        "mlp.down_proj.bias": (hidden,),
    }


def _routed_tensors(architecture: Architecture, config: RoutedFfnConfig, layer: int) -> dict[str, Wanted]:
    """One routed FFN's, under the names that its block has for them."""
    family = architecture.family.routed_ffn
    assert family is not None, layer
    hidden, width, shared = config.hidden_size, config.expert_size, config.shared_size
    inward, outward = (width, hidden), (hidden, width)
    ours, theirs = f"layers.{layer}.routed", f"model.layers.{layer}"
    norm, stored_norm = names.HF_ROUTED_NORM
    anchors, router = names.HF_ROUTER
    wanted = {
        f"{ours}.{norm}": Wanted(((f"{theirs}.{stored_norm}", (hidden,)),)),
        f"{ours}.{anchors}": Wanted(((f"{theirs}.{family.prefix}.{router}", (config.num_experts, hidden)),)),
    }
    for name, stored in family.experts.items():
        shape = outward if name == "down_proj" else inward
        wanted[f"{ours}.experts.{name}"] = Wanted(
            tuple(
                (f"{theirs}.{family.prefix}.experts.{expert}.{stored}", shape)
                for expert in range(config.num_experts)
            ),
            stacked=True,
        )
    shapes = {"shared_down_proj": (hidden, shared), "shared_gate": (1, hidden)}
    for name, stored in names.HF_SHARED.items() if shared else ():
        shape = shapes.get(name, (shared, hidden))
        wanted[f"{ours}.{name}"] = Wanted(((f"{theirs}.{family.prefix}.{stored}", shape),))
    return wanted


def _checked_tensors(
    folder: Path, stored: Mapping[str, StoredTensor], architecture: Architecture
) -> dict[str, Wanted]:
    """What the model takes. Raises CheckpointError unless the files hold exactly that, in its shapes."""
    layers, routed = architecture.model.num_hidden_layers, architecture.routed_ffn
    experts = 0 if routed is None else len(routed.layers) * routed.num_experts
    if max(layers, experts) > len(stored):  # or the list alone might fill the memory
        raise CheckpointError(
            f"{folder / CONFIG_FILE} asks for {layers} layers and {experts} experts; the files hold {len(stored)}"
            " tensors"
        )
    wanted = wanted_tensors(architecture)
    shapes = dict(part for each in wanted.values() for part in each.parts)
    for name, shape in shapes.items():
        if name not in stored:
            raise CheckpointError(f"{folder}: tensor {name!r} is missing; {CONFIG_FILE} asks for it")
        if stored[name].shape != shape:
            raise CheckpointError(f"{stored[name]} has shape {stored[name].shape}, expected {shape}")
    ignored = {names.HF_HEAD} if architecture.tied else set[str]()
    for name, tensor in stored.items():
        if name not in shapes and name not in ignored and not name.endswith(names.HF_IGNORED):
            raise CheckpointError(f"{tensor} is not part of the model that {CONFIG_FILE} describes")
    return wanted


def _joined(
    parts: list[StoredTensor], read: Callable[[StoredTensor], Tensor], dtype: torch.dtype, *, stacked: bool
) -> Tensor:
    """One tensor in memory of its own, filled part by part."""
    shape = parts[0].shape
    if stacked:
        joined = torch.empty(len(parts), *shape, dtype=dtype)
        for place, part in zip(joined, parts, strict=True):
            place.copy_(read(part))
        return joined
    joined = torch.empty(sum(part.shape[0] for part in parts), *shape[1:], dtype=dtype)
    for place, part in zip(joined.split([part.shape[0] for part in parts]), parts, strict=True):
        place.copy_(read(part))
    return joined


def _routed_blocks(config: RoutedFfnConfig | None, weights: dict[str, Tensor]) -> dict[int, RoutedFfnBlock]:
    """Takes the routed FFNs' tensors out of the weights."""
    if config is None:
        return {}
    blocks: dict[int, RoutedFfnBlock] = {}
    for layer in config.layers:
        prefix = f"layers.{layer}.routed."
        own = [name for name in weights if name.startswith(prefix)]
        tensors = {name.removeprefix(prefix): weights.pop(name) for name in own}
        blocks[layer] = RoutedFfnBlock.of(config, tensors)
    return blocks
