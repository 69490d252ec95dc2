"""GGUF llama files of one's own: what they may hold beside the base's, and what is refused by name."""

import gguf
import numpy as np
import pytest
import torch
from torch.testing import assert_close

from model.checkpoints.load import load_checkpoint
from model.errors import CheckpointError
from model.kv_cache import CacheBudget
from model.transformer import Segment

DIVISORS = [1.0, 1.0, 2.0, 4.0, 8.0, 8.0, 8.0, 8.0]
HF_NAMES = {
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
    "attn_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm",
}
TEXT = [(7 * i * i + 3 * i + 5) % 256 for i in range(40)]


def interleaved(weight, heads):
    """Rotary halves to llama.cpp's pairs."""
    return weight.unflatten(0, (heads, 2, -1)).transpose(1, 2).reshape(weight.shape)


def tensors_of(model):
    """The tensors of transformers' model under GGUF's names."""
    state = model.state_dict()
    tensors = {"token_embd": state["model.embed_tokens.weight"], "output_norm": state["model.norm.weight"]}
    if not model.config.tie_word_embeddings:
        tensors["output"] = state["lm_head.weight"]
    for layer in range(model.config.num_hidden_layers):
        for ours, theirs in HF_NAMES.items():
            weight = state[f"model.layers.{layer}.{theirs}.weight"]
            if ours in ("attn_q", "attn_k"):
                weight = interleaved(weight, 4 if ours == "attn_q" else 2)
            tensors[f"blk.{layer}.{ours}"] = weight
    return {f"{name}.weight": tensor.numpy() for name, tensor in tensors.items()}


def write(path, model, architecture="llama", fields=(), tensors=()):
    """A file of the model, with some fields and tensors added or, when None, left out."""
    config = model.config
    writer = gguf.GGUFWriter(path, architecture)
    described = {
        "llama.vocab_size": config.vocab_size,
        "llama.embedding_length": config.hidden_size,
        "llama.attention.head_count": config.num_attention_heads,
        "llama.attention.head_count_kv": config.num_key_value_heads,
        "llama.feed_forward_length": config.intermediate_size,
        "llama.block_count": config.num_hidden_layers,
        "llama.context_length": config.max_position_embeddings,
        "tokenizer.ggml.bos_token_id": 256,
        "tokenizer.ggml.eos_token_id": 257,
        "llama.attention.layer_norm_rms_epsilon": config.rms_norm_eps,
        "tokenizer.ggml.pre": "smollm",
        "tokenizer.ggml.tokens": [*(chr(256 + i) for i in range(256)), "<s>", "</s>", "Āā"],
        "tokenizer.ggml.merges": ["Ā ā"],
        "tokenizer.ggml.token_type": [1] * 256 + [3, 3, 1],
    } | dict(fields)
    add = {int: writer.add_uint32, float: writer.add_float32, str: writer.add_string, list: writer.add_array}
    for key, value in described.items():
        if value is not None:
            add[type(value)](key, value)
    for name, array in (tensors_of(model) | dict(tensors)).items():
        if array is not None:
            writer.add_tensor(name, np.ascontiguousarray(array, dtype=np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def logits(path):
    model = load_checkpoint(path, torch.float32, path.parent / "cache").transformer
    cache = CacheBudget(model.config, 64, model.dtype, model.device).reserve(64)
    return model.logits(model.step([Segment(TEXT, 0, cache)]))


@pytest.mark.parametrize("tied", [True, False])
def test_a_file_gives_the_logits_of_transformers_with_a_head_of_its_own_or_without(
    checkpoint, tmp_path, tied
):
    _, model = checkpoint("llama", tie_word_embeddings=tied)
    path = write(tmp_path / "m.gguf", model)
    with torch.inference_mode():
        expected = model(torch.tensor([TEXT])).logits[0]
    assert_close(logits(path), expected, atol=1e-4, rtol=0)
    assert_close(logits(path), expected, atol=1e-4, rtol=0)  # from the converted copy


def test_scaled_positions_of_a_file_are_followed(checkpoint, tmp_path):
    _, model = checkpoint("llama")
    path = write(tmp_path / "m.gguf", model, tensors={"rope_freqs.weight": np.array(DIVISORS)})
    rotary = model.model.rotary_emb
    plain = rotary.inv_freq
    rotary.inv_freq = plain / torch.tensor(DIVISORS)
    with torch.inference_mode():
        expected = model(torch.tensor([TEXT])).logits[0]
    rotary.inv_freq = plain
    assert_close(logits(path), expected, atol=1e-4, rtol=0)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"architecture": "qwen2"}, "is a 'qwen2' file"),
        ({"fields": {"llama.vocab_size": None}}, "no metadata field 'llama.vocab_size'"),
        (
            {"fields": {"tokenizer.ggml.eos_token_id": 999}},
            "tokenizer.ggml.eos_token_id is 999; allowed: 0 to 258",
        ),
        ({"fields": {"llama.block_count": 0}}, "llama.block_count is 0"),
        ({"fields": {"llama.embedding_length": "wide"}}, "llama.embedding_length is wide"),
        ({"fields": {"llama.rope.scaling.type": "yarn"}}, "scaled by 'yarn'"),
        ({"fields": {"llama.block_count": 10_000_000}}, "llama.block_count is 10000000; allowed: as many as"),
        (
            {"fields": {"llama.attention.key_length": 15}},
            "llama.attention.key_length is 15; allowed: an even",
        ),
        ({"fields": {"llama.attention.head_count_kv": 3}}, "head_count_kv is 3; allowed: a divisor"),
        (
            {"fields": {"llama.attention.layer_norm_rms_epsilon": float("nan")}},
            "layer_norm_rms_epsilon is nan",
        ),
        (
            {"fields": {"llama.rope.freq_base": -1.0}},
            "llama.rope.freq_base is -1.0; allowed: a number above 0",
        ),
        ({"fields": {"tokenizer.ggml.tokens": 7}}, "tokenizer.ggml.tokens is 7; allowed: a list of strings"),
        (
            {"fields": {"tokenizer.ggml.merges": [1, 2]}},
            "tokenizer.ggml.merges is [1, 2]; allowed: a list of",
        ),
        ({"fields": {"tokenizer.ggml.token_type": [1, 3]}}, "token_type has 2 kinds for 259 tokens"),
        ({"fields": {"tokenizer.chat_template": 7}}, "tokenizer.chat_template is 7; allowed: a string"),
        (
            {"tensors": {"output_norm.weight": np.full(64, np.inf, np.float32)}},
            "tensor 'output_norm.weight' holds values that are not finite",
        ),
        ({"fields": {"llama.vocab_size": 99}}, "'token_embd.weight' has shape (512, 64), expected (99, 64)"),
        ({"tensors": {"blk.1.ffn_up.weight": None}}, "no tensor 'blk.1.ffn_up.weight'"),
        ({"tensors": {"blk.1.ffn_up.weight": np.zeros((4, 4))}}, "'blk.1.ffn_up.weight' has shape (4, 4)"),
        ({"tensors": {"blk.0.attn_q.bias": np.zeros(64)}}, "'blk.0.attn_q.bias' is not part of the model"),
        (
            {"tensors": {"blk.0.ffn_gate_exps.weight": np.zeros((2, 4))}},
            "'blk.0.ffn_gate_exps.weight' is not part",
        ),
    ],
)
def test_what_cannot_be_computed_is_refused_by_name(checkpoint, tmp_path, changes, message):
    path = write(tmp_path / "m.gguf", checkpoint("llama")[1], **changes)
    with pytest.raises(CheckpointError) as raised:
        load_checkpoint(path, torch.float32, tmp_path / "cache")
    assert message in str(raised.value)
    assert str(path) in str(raised.value)


@pytest.mark.parametrize("kept", [0, 3, 20, 300, 5000, 100_000])
def test_a_truncated_file_is_named(checkpoint, tmp_path, kept):
    path = write(tmp_path / "m.gguf", checkpoint("llama")[1])
    path.write_bytes(path.read_bytes()[:kept])
    with pytest.raises(CheckpointError, match=r"m\.gguf"):
        load_checkpoint(path, torch.float32, tmp_path / "cache")


def test_a_file_that_is_something_else_is_named(tmp_path):
    path = tmp_path / "m.gguf"
    path.write_bytes(b"\x80\x04" + bytes(range(256)) * 64)
    with pytest.raises(CheckpointError, match=r"m\.gguf cannot be read as a GGUF file"):
        load_checkpoint(path, torch.float32, tmp_path / "cache")


def test_metadata_that_is_no_text_is_named(checkpoint, tmp_path):
    path = write(tmp_path / "m.gguf", checkpoint("llama")[1])
    content = path.read_bytes()
    at = content.index(b"smollm")
    path.write_bytes(content[:at] + b"\xff" + content[at + 1 :])
    with pytest.raises(CheckpointError, match=r"m\.gguf: tokenizer\.ggml\.pre cannot be read"):
        load_checkpoint(path, torch.float32, tmp_path / "cache")
