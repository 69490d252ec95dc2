"""A Hugging Face `config.json` as the shape of a model. Reads no weights and runs nothing that the file names.

What this code cannot compute exactly is refused by name: it would answer, but not as the model does.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from model.blocks.routed_ffn import WIDTH_MULTIPLE, RoutedFfnConfig
from model.checkpoints.families import FAMILIES, Family, Flag, RoutedFfnNames
from model.checkpoints.json_file import JsonFile
from model.checkpoints.rope_scaling import rope_of
from model.config import ModelConfig
from model.errors import CheckpointError

CONFIG_FILE, GENERATION_FILE = "config.json", "generation_config.json"
MAX_CONTEXT = 262_144  # positions that are prepared; what a server holds is decided by its memory
MAX_VOCABULARY = 1 << 22
# Fields that change what a model computes, and the one value that this code computes.
NOT_SUPPORTED: Mapping[str, object] = {"hidden_act": "silu", "clip_qkv": None, "quantization_config": None}


@dataclass(frozen=True, slots=True)
class Architecture:
    """What a checkpoint's files have to hold, and how it is computed."""

    family: Family
    model: ModelConfig
    routed_ffn: RoutedFfnConfig | None
    tied: bool  # the output head is the embedding
    qkv_bias: bool
    o_bias: bool
    mlp_bias: bool
    sliding_window: int | None  # positions; a longer context than this is not served
    end_token_ids: frozenset[int]  # any of them ends an answer


def read_architecture(folder: Path, tokenizer_end: int | None) -> Architecture:
    """`tokenizer_end`: the end token that the tokenizer names. Raises CheckpointError naming the file and the field."""
    file = JsonFile.read(folder / CONFIG_FILE)
    name = file.text("model_type")
    family = FAMILIES.get(name)
    if family is None:
        raise CheckpointError(
            f"{file.path}: the architecture is {name[:100]!r}; allowed: {', '.join(sorted(FAMILIES))}"
        )
    for field, allowed in NOT_SUPPORTED.items():
        if file.has(field) and file.value(field) != allowed:
            file.refuse(field, "null" if allowed is None else str(allowed))
    window = _window(file, family)
    ends = _end_tokens(file, JsonFile.read_if_there(folder / GENERATION_FILE), tokenizer_end)
    model = _model(file, family, window, ends[0])
    return Architecture(
        family=family,
        model=model,
        routed_ffn=_routed_ffn(file, family.routed_ffn, model),
        tied=file.flag("tie_word_embeddings", default=False),
        qkv_bias=_flag(file, family.qkv_bias),
        o_bias=_flag(file, family.o_bias),
        mlp_bias=_flag(file, family.mlp_bias),
        sliding_window=window,
        end_token_ids=frozenset(ends),
    )


def _model(file: JsonFile, family: Family, window: int | None, eos_token_id: int) -> ModelConfig:
    hidden, heads = file.count("hidden_size"), file.count("num_attention_heads")
    if not file.has("head_dim") and hidden % heads:
        file.refuse("num_attention_heads", f"a divisor of hidden_size, {hidden}")
    head_dim = file.count("head_dim", hidden // heads)
    if head_dim % 2:
        file.refuse("head_dim", "an even number")
    groups = file.count("num_key_value_heads", heads)
    if heads % groups:
        file.refuse("num_key_value_heads", f"a divisor of num_attention_heads, {heads}")
    theta, divisors = rope_of(file, family.rope_theta, head_dim)
    positions = file.count("max_position_embeddings", highest=1 << 30)
    return ModelConfig(
        vocab_size=_vocab_size(file),
        hidden_size=hidden,
        intermediate_size=file.count("intermediate_size"),
        num_hidden_layers=file.count("num_hidden_layers", highest=4096),
        num_attention_heads=heads,
        num_key_value_heads=groups,
        head_dim=head_dim,
        rms_norm_eps=file.number("rms_norm_eps"),
        rope_theta=theta,
        max_position_embeddings=min(positions, window or positions, MAX_CONTEXT),
        bos_token_id=None,  # the tokenizer knows
        eos_token_id=eos_token_id,
        rope_divisors=divisors,
    )


def _window(file: JsonFile, family: Family) -> int | None:
    """Positions that a token may look back on in some layer. Within them attention is full."""
    if family.windows is None or not file.value("sliding_window"):
        return None
    if family.windows == "if used" and not file.flag("use_sliding_window", default=False):
        return None
    return file.count("sliding_window", highest=1 << 30)


def _routed_ffn(file: JsonFile, names: RoutedFfnNames | None, model: ModelConfig) -> RoutedFfnConfig | None:
    if names is None:
        return None
    counted = next((name for name in names.num_experts if file.has(name)), names.num_experts[0])
    experts = file.count(counted, highest=65_536)
    per_token = file.count("num_experts_per_tok", highest=experts)
    layers = tuple(i for i in range(model.num_hidden_layers) if _is_routed(file, names, i))
    if not layers:
        raise CheckpointError(f"{file.path}: no layer has experts")
    return RoutedFfnConfig(
        kind="routed-ffn",
        layers=layers,
        hidden_size=model.hidden_size,
        num_experts=experts,
        num_experts_per_tok=per_token,
        expert_size=_width(file, names.expert_size),
        rms_norm_eps=model.rms_norm_eps,
        key_size=model.hidden_size,
        query="identity",
        expert_form="swiglu",
        norm_topk_prob=_flag(file, names.norm_topk_prob),
        shared_size=0 if names.shared_size is None else _width(file, names.shared_size),
    )


def _width(file: JsonFile, name: str) -> int:
    """The width of an expert."""
    width = file.count(name)
    if width % WIDTH_MULTIPLE:
        file.refuse(name, f"a multiple of {WIDTH_MULTIPLE}")
    return width


def _is_routed(file: JsonFile, names: RoutedFfnNames, layer: int) -> bool:
    if not names.may_skip_layers:
        return True
    dense = file.value("mlp_only_layers") or []
    if not isinstance(dense, list) or any(type(each) is not int for each in dense):
        file.refuse("mlp_only_layers", "a list of layers")
    return layer not in dense and (layer + 1) % file.count("decoder_sparse_step", 1) == 0


def _flag(file: JsonFile, flag: Flag) -> bool:
    return flag if isinstance(flag, bool) else file.flag(flag[0], default=flag[1])


def _vocab_size(file: JsonFile) -> int:
    return file.count("vocab_size", highest=MAX_VOCABULARY)


def _end_tokens(file: JsonFile, generation: JsonFile, tokenizer_end: int | None) -> list[int]:
    """The end tokens that the files name, one or a list each, as far as the vocabulary has them; one at least."""
    found: list[int] = []
    for each in (generation, file):
        given = each.value("eos_token_id")
        listed = given if isinstance(given, list) else [] if given is None else [given]
        if any(type(token) is not int for token in listed):
            each.refuse("eos_token_id", "a token id, or a list of them")
        found += listed
    found += [] if tokenizer_end is None else [tokenizer_end]
    known = [token for token in dict.fromkeys(found) if 0 <= token < _vocab_size(file)]
    if not known:
        raise CheckpointError(
            f"{file.path}: neither it nor its neighbours name an end token of the vocabulary"
        )
    return known
