"""Expert blocks on disk: what is saved comes back, what is wrong is named."""

import json
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file, save_file

from model.checkpoints.blocks import (
    CONFIG_FILE,
    WEIGHTS_FILE,
    load_blocks,
    save_blocks,
    shipped_folder,
    shipped_variants,
)
from model.errors import CheckpointError


@pytest.fixture
def folder(tiny, tmp_path):
    config = next(iter(tiny.blocks.values())).config
    save_blocks(tmp_path, config, tiny.blocks, torch.float32)
    return tmp_path


def test_blocks_of_every_kind_come_back_as_they_were_saved(every_tiny, block_config, tmp_path):
    save_blocks(tmp_path, block_config, every_tiny.blocks, torch.float32)
    loaded = load_blocks(tmp_path, 32)
    assert loaded.config == block_config
    assert set(loaded.blocks) == set(every_tiny.blocks)
    for layer, block in loaded.blocks.items():
        for name, parameter in block.named_parameters():
            assert torch.equal(parameter, every_tiny.blocks[layer].get_parameter(name))
            assert not parameter.requires_grad
    text = list(range(40))
    served = replace(every_tiny, variant=replace(every_tiny.variant, blocks=loaded.blocks))
    assert torch.equal(served.logits(text), every_tiny.logits(text))


def damage(folder, change):
    tensors = load_file(folder / WEIGHTS_FILE)
    change(tensors)
    save_file(tensors, folder / WEIGHTS_FILE)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.pop("layers.1.anchors"), "no tensor 'layers.1.anchors'"),
        (lambda t: t.update({"layers.1.anchors": torch.zeros(3, 3)}), r"shape \(3, 3\), expected \(8, 16\)"),
        (lambda t: t["layers.2.experts.up_proj"].fill_(float("nan")), "not finite"),
        (lambda t: t.update({"layers.9.extra": torch.zeros(1)}), "no block takes"),
    ],
)
def test_a_wrong_tensor_is_named(folder, change, message):
    damage(folder, change)
    with pytest.raises(CheckpointError, match=message):
        load_blocks(folder, 32)


def test_a_truncated_file_is_an_error_that_names_it(folder):
    whole = (folder / WEIGHTS_FILE).read_bytes()
    (folder / WEIGHTS_FILE).write_bytes(whole[: len(whole) // 2])
    with pytest.raises(CheckpointError, match=WEIGHTS_FILE):
        load_blocks(folder, 32)


def test_another_hidden_size_is_refused(folder):
    with pytest.raises(CheckpointError, match="hidden size 32, the base model has 64"):
        load_blocks(folder, 64)


@pytest.mark.parametrize(
    ("variant", "change", "message"),
    [
        ("some", {"kind": "magic"}, "kind 'magic' is not one of"),
        ("some", {"colour": "red"}, "colour"),
        ("some", {"query": "magic"}, "'magic'"),
        ("some", {"expert_form": "magic"}, "'magic'"),
        ("moe", {"expert_form": "magic"}, "'magic'"),
        ("mom", {"routing": "magic"}, "routing is 'magic'"),
        ("mom", {"backward_flow": True}, "backward flow"),
        ("fm-moe", {"solver": "magic"}, "solver is 'magic'"),
        ("moe", {"num_experts_per_tok": 9}, "num_experts_per_tok is 9"),
        ("moe", {"num_experts_per_tok": 0}, "num_experts_per_tok is 0"),
        ("ffn", {"num_experts": 2}, "num_experts is 2"),
        ("some", {"query": "identity"}, "key_size is 16"),
    ],
)
def test_a_choice_that_does_not_exist_is_an_error_that_names_the_file(
    make_tiny, tmp_path, variant, change, message
):
    blocks = make_tiny(torch.float32, variant).blocks
    save_blocks(tmp_path, blocks[1].config, blocks, torch.float32)
    path = tmp_path / CONFIG_FILE
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(CheckpointError, match=message) as raised:
        load_blocks(tmp_path, 32)
    assert str(path) in str(raised.value)


@pytest.mark.parametrize("content", ["", "[]", '"text"', "null", '{"kind": ["some"]}', '{"layers": [1]}'])
def test_a_configuration_that_is_none_is_an_error_that_names_the_file(folder, content):
    (folder / CONFIG_FILE).write_text(content)
    with pytest.raises(CheckpointError) as raised:
        load_blocks(folder, 32)
    assert str(folder / CONFIG_FILE) in str(raised.value)


@pytest.mark.parametrize("name", shipped_variants())
def test_the_shipped_blocks_load_and_contribute(name):
    shipped = load_blocks(shipped_folder(name), 576)
    assert set(shipped.blocks) == set(shipped.config.layers)
    hidden = torch.randn(1, 8, 576)
    assert all(block(hidden)[0].abs().sum() > 0 for block in shipped.blocks.values())
