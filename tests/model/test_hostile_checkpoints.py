"""Folders that are wrong or mean harm: an error that names the file and the tensor, before anything is loaded."""

import json
import os
import pickle
import shutil

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from model.checkpoints import tensor_files
from model.checkpoints.load import load_checkpoint
from model.errors import CheckpointError

WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
Q_PROJ = "model.layers.1.self_attn.q_proj.weight"
EXPERT = "model.layers.2.block_sparse_moe.experts.3.w2.weight"


@pytest.fixture
def folder(checkpoint, tmp_path):
    """A tiny Mixtral of the test's own."""
    return shutil.copytree(checkpoint("mixtral")[0], tmp_path / "mixtral")


@pytest.fixture
def sharded(checkpoint, tmp_path):
    return shutil.copytree(checkpoint("mixtral", shard_size="100KB")[0], tmp_path / "sharded")


@pytest.fixture(autouse=True)
def _reads_nothing(monkeypatch):
    """No tensor may be read; the test about values opens files again."""

    def refuse(*args, **kwargs):
        raise AssertionError("a tensor was read")

    monkeypatch.setattr(tensor_files, "safe_open", refuse)


def refusal(folder):
    with pytest.raises(CheckpointError) as raised:
        load_checkpoint(folder, torch.float32, folder / "cache")
    return str(raised.value)


def change_json(path, **fields):
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))


def change_tensors(path, change):
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path)


def header_of(path):
    content = path.read_bytes()
    size = int.from_bytes(content[:8], "little")
    return json.loads(content[8 : 8 + size]), content[8 + size :]


def with_header(path, change):
    """Rewrite a file's header and leave its body."""
    entries, body = header_of(path)
    changed = change(entries)
    header = json.dumps(entries if changed is None else changed).encode()
    path.write_bytes(len(header).to_bytes(8, "little") + header + body)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.pop(EXPERT), f"tensor '{EXPERT}' is missing"),
        (lambda t: t.pop("lm_head.weight"), "tensor 'lm_head.weight' is missing"),
        (
            lambda t: t.update({Q_PROJ: torch.zeros(64, 32)}),
            f"{WEIGHTS}: tensor '{Q_PROJ}' has shape (64, 32), expected (64, 64)",
        ),
        (lambda t: t.update({Q_PROJ: torch.zeros(64)}), f"'{Q_PROJ}' has shape (64,), expected (64, 64)"),
        (lambda t: t.update({Q_PROJ: t[Q_PROJ].to(torch.int8)}), f"tensor '{Q_PROJ}' is of type I8"),
        (
            lambda t: t.update({"model.layers.0.self_attn.q_proj.bias": torch.zeros(64)}),
            "tensor 'model.layers.0.self_attn.q_proj.bias' is not part of the model",
        ),
    ],
)
def test_a_wrong_tensor_is_named(folder, change, message):
    change_tensors(folder / WEIGHTS, change)
    assert message in refusal(folder)


def test_what_old_files_carry_and_nobody_needs_is_passed_over(folder):
    change_tensors(
        folder / WEIGHTS, lambda t: t.update({"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(8)})
    )
    with pytest.raises(AssertionError, match="a tensor was read"):
        load_checkpoint(folder, torch.float32, folder)


@pytest.mark.parametrize("kept", [0, 7, 8, 400, 200_000])
def test_a_truncated_file_is_named(folder, kept):
    path = folder / WEIGHTS
    path.write_bytes(path.read_bytes()[:kept])
    assert str(path) in refusal(folder)


def test_trailing_bytes_are_refused(folder):
    with (folder / WEIGHTS).open("ab") as file:
        file.write(b"code")
    assert f"{folder / WEIGHTS}" in refusal(folder)


@pytest.mark.parametrize("claimed", [1, 33 << 20, 1 << 40, (1 << 64) - 1])
def test_a_header_of_impossible_size_is_refused_unread(folder, claimed):
    path = folder / WEIGHTS
    path.write_bytes(claimed.to_bytes(8, "little") + path.read_bytes()[8:])
    assert f"{path}: a header of {claimed} bytes" in refusal(folder)


@pytest.mark.parametrize(
    "header",
    [
        b"{}",
        b"[]",
        b"null",
        b"{" * 1000,
        b"[" * 100_000,
        b"\xff\xfe{}",
        b'{"a": 1}',
        b'{"a": {"dtype": "F32"}}',
    ],
)
def test_a_header_that_is_none_is_refused(folder, header):
    path = folder / WEIGHTS
    path.write_bytes(len(header).to_bytes(8, "little") + header)
    assert str(path) in refusal(folder)


def shifted(name, first, end):
    def change(entries):
        begin, stop = entries[name]["data_offsets"]
        entries[name]["data_offsets"] = [begin + first, stop + end]

    return change


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (shifted(Q_PROJ, 4, 4), Q_PROJ),
        (shifted(Q_PROJ, 1 << 40, 1 << 40), Q_PROJ),
        (shifted(Q_PROJ, 0, 4), f"'{Q_PROJ}' has 16388 bytes; its type and shape need 16384"),
        (shifted(Q_PROJ, -(1 << 50), 0), f"'{Q_PROJ}' lies at"),
        (lambda e: e[Q_PROJ].update(data_offsets=e[EXPERT]["data_offsets"]), "need 16384"),
        (
            lambda e: e["model.layers.0.self_attn.q_proj.weight"].update(
                data_offsets=e[Q_PROJ]["data_offsets"]
            ),
            "where the one before it ends",
        ),
        (lambda e: e[Q_PROJ].update(data_offsets="0"), "lies at 0"),
        (lambda e: e[Q_PROJ].update(data_offsets=[0.0, 16384.0]), "lies at"),
        (lambda e: e[Q_PROJ].update(shape=[64, -64]), "has the shape [64, -64]"),
        (lambda e: e[Q_PROJ].update(shape=[1 << 47] * 8), "its type and shape need"),
        (lambda e: e[Q_PROJ].update(shape=[True, 4096]), "has the shape"),
        (lambda e: e[Q_PROJ].update(dtype="PICKLE"), "is of type PICKLE"),
        (lambda e: e[Q_PROJ].update(dtype=None), "is of type None"),
    ],
)
def test_a_tensor_that_lies_where_it_cannot_is_named(folder, change, message):
    with_header(folder / WEIGHTS, change)
    told = refusal(folder)
    assert message in told
    assert str(folder / WEIGHTS) in told


@pytest.mark.parametrize(
    "name",
    [
        "../model.safetensors",
        "/etc/passwd",
        "a/../../model.safetensors",
        "..",
        "model.bin",
        ".hidden.safetensors",
        "a\x00.safetensors",
        "sub/model.safetensors",
        7,
        None,
    ],
)
def test_an_index_may_only_name_files_beside_it(sharded, name):
    index = sharded / INDEX
    described = json.loads(index.read_text())
    described["weight_map"][Q_PROJ] = name
    index.write_text(json.dumps(described))
    told = refusal(sharded)
    assert str(index) in told
    assert Q_PROJ in told


@pytest.mark.parametrize("weight_map", [None, {}, [], "model.safetensors"])
def test_an_index_without_tensors_is_named(sharded, weight_map):
    change_json(sharded / INDEX, weight_map=weight_map)
    assert str(sharded / INDEX) in refusal(sharded)


def test_a_shard_that_is_missing_is_named(sharded):
    gone = sorted(sharded.glob("*.safetensors"))[1]
    gone.unlink()
    assert str(gone) in refusal(sharded)


def test_a_tensor_that_is_in_another_shard_than_the_index_says_is_named(sharded):
    described = json.loads((sharded / INDEX).read_text())
    names = sorted(set(described["weight_map"].values()))
    at = described["weight_map"][Q_PROJ]
    described["weight_map"][Q_PROJ] = next(name for name in names if name != at)
    (sharded / INDEX).write_text(json.dumps(described))
    assert Q_PROJ in refusal(sharded)


class Trap:
    """Runs code when it is unpickled."""

    def __init__(self, path):
        self.path = str(path)

    def __reduce__(self):
        return os.mkdir, (self.path,)


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pt", "consolidated.00.pth", WEIGHTS])
def test_pickled_weights_are_never_opened(folder, tmp_path, name):
    (folder / WEIGHTS).unlink()
    (folder / name).write_bytes(pickle.dumps({Q_PROJ: Trap(tmp_path / "sprung")}))
    assert str(folder / name) in refusal(folder)
    assert not (tmp_path / "sprung").exists()


def test_code_that_the_folder_brings_is_not_run(folder, tmp_path):
    (folder / "modeling_evil.py").write_text(f"import os\nos.mkdir({str(tmp_path / 'sprung')!r})\n")
    change_json(folder / "config.json", auto_map={"AutoModelForCausalLM": "modeling_evil.Evil"})
    change_json(folder / "config.json", model_type="evil")
    assert "the architecture is 'evil'" in refusal(folder)
    assert not (tmp_path / "sprung").exists()


def test_no_weights_at_all_are_said_to_be_missing(folder):
    (folder / WEIGHTS).unlink()
    assert f"{folder} holds no weights" in refusal(folder)


def test_weights_that_are_no_regular_file_are_refused(folder):
    (folder / WEIGHTS).unlink()
    os.mkfifo(folder / WEIGHTS)
    assert "no regular file" in refusal(folder)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"model_type": "gpt2"}, "the architecture is 'gpt2'; allowed: llama, mistral"),
        ({"model_type": None}, "the architecture is ''"),
        ({"model_type": ["llama"]}, "model_type is ['llama']; allowed: a string"),
        ({"hidden_size": -64}, "hidden_size is -64; allowed: a whole number from 1"),
        ({"hidden_size": "64"}, "hidden_size is 64"),
        ({"hidden_size": 64.0}, "hidden_size is 64.0"),
        ({"hidden_size": True}, "hidden_size is True"),
        ({"hidden_size": 1 << 40}, "hidden_size is"),
        ({"hidden_size": None}, "hidden_size is None"),
        ({"num_attention_heads": 5}, "a divisor of hidden_size, 64"),
        ({"num_key_value_heads": 3}, "a divisor of num_attention_heads, 4"),
        ({"head_dim": 7}, "head_dim is 7; allowed: an even number"),
        ({"num_hidden_layers": 10**9}, "num_hidden_layers is"),
        ({"vocab_size": 10**12}, "vocab_size is"),
        ({"vocab_size": 300}, "has 512 tokens"),
        ({"max_position_embeddings": 0}, "max_position_embeddings is 0"),
        ({"rms_norm_eps": "tiny"}, "rms_norm_eps is tiny"),
        ({"rms_norm_eps": float("nan")}, "rms_norm_eps is nan"),
        ({"rms_norm_eps": None}, "rms_norm_eps is None"),
        ({"num_experts_per_tok": 9}, "num_experts_per_tok is 9; allowed: a whole number from 1 to 8"),
        ({"num_local_experts": 0}, "num_local_experts is 0"),
        ({"intermediate_size": 100}, "intermediate_size is 100; allowed: a multiple of 8"),
        ({"num_local_experts": 65_000}, "asks for 3 layers and 195000 experts; the files hold"),
        ({"num_hidden_layers": 4000}, "asks for 4000 layers and 32000 experts; the files hold"),
        ({"hidden_act": "gelu"}, "hidden_act is gelu; allowed: silu"),
        ({"tie_word_embeddings": "yes"}, "tie_word_embeddings is yes; allowed: true or false"),
        ({"quantization_config": {"bits": 4}}, "quantization_config is {'bits': 4}; allowed: null"),
        ({"eos_token_id": "</s>"}, "eos_token_id is </s>"),
        ({"rope_parameters": []}, "rope_parameters is []; allowed: an object"),
        ({"rope_parameters": {"rope_type": "yarn"}}, "rotary positions are scaled by 'yarn'"),
        ({"rope_parameters": {"rope_theta": -1}}, "rope_parameters.rope_theta is -1"),
        ({"rope_parameters": {"rope_type": "llama3"}}, "rope_parameters.factor is None"),
        ({"rope_parameters": None, "rope_scaling": {"type": "linear", "factor": 2}}, "scaled by 'linear'"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor is 0.5; allowed: 1.0"),
        ({"sliding_window": -5}, "sliding_window is -5"),
    ],
)
def test_a_configuration_that_cannot_be_is_refused_by_field(folder, fields, message):
    change_json(folder / "config.json", **fields)
    told = refusal(folder)
    assert message in told
    assert str(folder) in told


@pytest.mark.parametrize("content", ["", "[]", "{", "7", "[" * 100_000])
@pytest.mark.parametrize(
    "name", ["config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json"]
)
def test_a_file_that_is_no_json_object_is_named(folder, name, content):
    (folder / name).write_text(content)
    assert str(folder / name) in refusal(folder)


@pytest.mark.parametrize("name", ["config.json", "tokenizer.json"])
def test_a_file_that_is_missing_is_named(folder, name):
    (folder / name).unlink()
    assert str(folder / name) in refusal(folder)


def test_a_file_larger_than_it_may_be_is_not_read(folder):
    with (folder / "config.json").open("ab") as file:
        file.truncate(5 << 20)
    assert "config.json has 5242880 bytes; allowed: 4194304" in refusal(folder)


def test_a_chat_template_that_is_none_is_refused(folder):
    (folder / "chat_template.jinja").write_text("{% for %}")
    assert f"{folder / 'chat_template.jinja'}: the chat template is none" in refusal(folder)
    (folder / "chat_template.jinja").unlink()
    change_json(folder / "tokenizer_config.json", chat_template="{{")
    assert f"{folder / 'tokenizer_config.json'}: the chat template is none" in refusal(folder)


@pytest.mark.parametrize("name", [WEIGHTS, INDEX, "config.json", "tokenizer.json", "chat_template.jinja"])
def test_a_folder_in_the_place_of_a_file_is_named(folder, name):
    (folder / name).unlink(missing_ok=True)
    (folder / name).mkdir()
    assert f"{folder / name} is no regular file" in refusal(folder)


@pytest.mark.parametrize("field", ["bos_token", "eos_token", "chat_template"])
def test_half_a_character_is_no_text(folder, field):
    change_json(folder / "tokenizer_config.json", **{field: "\ud800"})
    assert f"{folder / 'tokenizer_config.json'} holds half a character" in refusal(folder)


def change_tokenizer(folder, **fields):
    path = folder / "tokenizer.json"
    described = json.loads(path.read_text())
    path.write_text(json.dumps(described | {"model": described["model"] | fields}))


@pytest.mark.parametrize("token_id", [1 << 32, 4_000_000_000, 1 << 22, -1, 1.5, "7"])
@pytest.mark.parametrize("added", [False, True])
def test_a_token_id_beyond_any_vocabulary_is_refused_before_a_table_is_made(folder, token_id, added):
    described = json.loads((folder / "tokenizer.json").read_text())
    if added:
        change_json(folder / "tokenizer.json", added_tokens=[{"id": token_id, "content": "<x>"}])
    else:
        change_tokenizer(folder, vocab=described["model"]["vocab"] | {"<x>": token_id})
    told = refusal(folder)
    assert f"{folder / 'tokenizer.json'}: a token has the id {token_id}; allowed: 0 to" in told


def test_subwords_that_the_library_cannot_cut_are_refused_by_field(folder):
    change_tokenizer(folder, continuing_subword_prefix="x")
    told = refusal(folder)
    assert f"{folder / 'tokenizer.json'}: model.continuing_subword_prefix is x; allowed: null" in told


def test_a_tokenizer_that_spells_in_an_unknown_way_is_named(folder):
    change_json(folder / "tokenizer.json", decoder=None)
    assert f"{folder / 'tokenizer.json'}: the tokenizer spells its tokens" in refusal(folder)


def test_values_that_are_not_finite_are_named(folder, monkeypatch):
    monkeypatch.setattr(tensor_files, "safe_open", safe_open)
    change_tensors(folder / WEIGHTS, lambda t: t[EXPERT].fill_(float("inf")))
    assert f"{WEIGHTS}: tensor '{EXPERT}' holds values that are not finite" in refusal(folder)


@pytest.mark.parametrize("name", ["none", "config.json"])
def test_a_path_that_is_no_checkpoint_is_named(folder, name):
    assert str(folder / name) in refusal(folder / name)
